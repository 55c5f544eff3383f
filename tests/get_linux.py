#!/usr/bin/env python3
"""Put a kernel for the tests' virtual machine into a directory.

    tests/get_linux.py          # into /var/tmp/pbkfs-tests/linux

DIR/vmlinuz and DIR/initrd.cpio: Debian's kernel for virtual machines, fetched by apt-get from the
archive that this machine is configured with, and a first root directory that loads the few modules
that a guest of QEMU needs, mounts /dev/vda and goes on there. Nothing is installed into the system
and no root is needed. On a directory that is finished it does nothing but print.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from get_postgres import GetError, apt_options, check_owner, debian_archive, run

DEFAULT = "/var/tmp/pbkfs-tests/linux"
SUITE, PACKAGE = "bookworm", "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "fuse")

_INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
until [ -b /dev/vda ]; do usleep 50000; done
mount -o ro /dev/vda /root
for each in proc sys dev; do mount --move /$each /root/$each; done
exec switch_root /root /sbin/init
"""


def say(message: str) -> None:
    print(f"get_linux: {message}", file=sys.stderr, flush=True)


def with_dependencies(names: tuple[str, ...], tree: Path) -> dict[str, bytes]:
    """Modules by name, each after those that it needs; what is not there is part of the kernel."""
    places = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in found or name not in places:
            return
        content = places[name].read_bytes()
        needed = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in needed[1].decode().split(",") if needed else ():
            add(other.replace("-", "_"))
        found[name] = content

    for name in names:
        if name not in places:
            raise GetError(f"the kernel has no module {name}")
        add(name)
    return found


def pack(tree: Path, into: Path) -> None:
    """Pack a first root directory as the kernel wants it."""
    names = "\n".join(str(path.relative_to(tree)) for path in [tree, *sorted(tree.rglob("*"))])
    with into.open("wb") as file:
        subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"],
            cwd=tree, input=names.encode(), stdout=file, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip


def install(directory: Path, work: Path) -> str:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise GetError("busybox is missing (package busybox-static)")
    archive = debian_archive()
    if archive is None:
        raise GetError("apt-get has no archive of Debian here")
    options = apt_options(archive, SUITE, work / "apt")
    run(["apt-get", "-q", *options, "update"], tries=3)
    listed = run(["apt-cache", *options, "depends", PACKAGE])
    found = re.search(r"Depends: (linux-image-\d\S+)", listed)
    if found is None:
        raise GetError(f"{archive} has no package {PACKAGE}")
    run(["apt-get", "-q", *options, "download", found[1]], tries=3, cwd=work)
    (package,) = work.glob("linux-image-*.deb")
    run(["dpkg", "-x", package, work / "kernel"])
    (image,) = (work / "kernel" / "boot").glob("vmlinuz-*")
    shutil.copyfile(image, directory / "vmlinuz")
    root = work / "root"
    for name in ("bin", "modules", "proc", "sys", "dev", "root"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox, root / "bin" / "busybox")
    modules = with_dependencies(MODULES, work / "kernel" / "lib" / "modules")
    for number, (name, content) in enumerate(modules.items()):
        (root / "modules" / f"{number:02}-{name}.ko").write_bytes(content)
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    pack(root, directory / "initrd.cpio")
    return package.name.removesuffix(".deb")


def get(directory: Path) -> None:
    """Install unless it is there."""
    mark = directory / ".complete"
    directory.parent.mkdir(parents=True, exist_ok=True)
    check_owner(directory)
    if mark.exists():
        return
    if os.uname().machine != "x86_64":
        raise GetError("only for x86_64")
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if mark.exists():
            return
        directory.mkdir(exist_ok=True)
        say(f"fetching a kernel for the tests' virtual machine into {directory}")
        work = Path(tempfile.mkdtemp(prefix="get-linux."))
        try:
            name = install(directory, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        mark.write_text(f"{name}\n")
        say(f"ready: {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Put a kernel for a virtual machine into DIR.")
    parser.add_argument("directory", nargs="?", help=f"default: {DEFAULT}")
    args = parser.parse_args()
    default = os.environ.get("PBKFS_TEST_LINUX", DEFAULT)
    directory = Path(args.directory or default).expanduser().absolute()
    os.umask(0o022)
    try:
        get(directory)
    except (GetError, OSError, subprocess.CalledProcessError) as error:
        say(str(error))
        return 1
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
