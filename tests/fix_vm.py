"""A virtual machine that can be switched off: this checkout, its Python and PostgreSQL inside.

``guest`` has the programs of this machine at the same places, on a disk that is only read and made
anew each time, and a data disk with a write cache (volatile_disk.py) that goes on from boot to
boot. The kernel is from get_linux.py; QEMU emulates the processors, as there may be no others.
Commands are run by guest_agent.py, clients reach the server from outside over TCP.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import guest_agent
import pytest
from fix_postgres import Programs, free_port, wait_until
from machine import ROOT, TESTS
from servers import Clients
from volatile_disk import GRAIN, VolatileDisk

QEMU = "qemu-system-x86_64"
DATA = Path("/data")
DATA_BYTES = 3 << 30
PORT = 5432
BASE = Path("/base")
# Emulated processors are ten to twenty times slower than these.
_COMMAND_LIMIT_S = 300.0
_BOOT_LIMIT_S = 180.0

_SETUP = """\
#!/bin/sh
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
for each in /dev/shm /tmp /run; do mount -t tmpfs -o mode=1777 tmpfs $each; done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t ext4 /dev/vdb /data
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
# Let the kernel write what nobody has asked for, or it would never overtake what somebody has.
echo 20 > /proc/sys/vm/dirty_writeback_centisecs
echo 50 > /proc/sys/vm/dirty_expire_centisecs
"""


def linux_directory() -> Path:
    """Where get_linux.py puts the kernel."""
    return Path(os.environ.get("PBKFS_TEST_LINUX", "/var/tmp/pbkfs-tests/linux"))


def guest_obstacle() -> str | None:
    """Why there can be no virtual machine here, or None."""
    for program in (QEMU, "busybox", "mke2fs"):
        if _which(program) is None:
            return f"{program} is missing"
    if not (linux_directory() / ".complete").exists():
        return f"no kernel in {linux_directory()}: run tests/get_linux.py"
    return None


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/sbin:/usr/sbin")


# --- the disk of programs -------------------------------------------------------------------------


class Tree:
    """The root directory of the guest in the making."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, path: Path, *, without: Iterable[str] = ()) -> None:
        """Copy a file or directory of this machine to the same place, with all that it links to."""
        place = self.root / str(path).lstrip("/")
        if os.path.lexists(place):
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            place.symlink_to(os.readlink(path))
            self.add(path.parent.resolve() / os.readlink(path))
        elif path.is_dir():
            ignored = shutil.ignore_patterns(*without)
            shutil.copytree(path, place, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(path, place)

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        """Write a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def add_libraries(self) -> None:
        """Add the libraries of this machine that the programs in the tree need."""
        programs = [path for path in self.root.rglob("*") if _is_program(path)]
        real = [Path("/", path.relative_to(self.root)) for path in programs]
        listed = subprocess.run(
            ["ldd", *[path for path in real if path.exists()]], capture_output=True, text=True
        ).stdout
        for name in set(re.findall(r"(/\S+)(?= \(0x)", listed)):
            place = self.root / os.path.normpath(name).lstrip("/")
            if not os.path.lexists(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(name, place)


def _is_program(path: Path) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size < 64:
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def packages() -> set[Path]:
    """The files of what pbkfs requires, and of what that requires."""
    wanted, known, files = ["pbkfs"], set(), set()
    while wanted:
        name = re.split(r"[^A-Za-z0-9._-]", wanted.pop())[0].lower().replace("_", "-")
        if name in known:
            continue
        known.add(name)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another version of Python, or another system
        wanted += [each for each in found.requires or () if "extra ==" not in each]
        if name != "pbkfs":
            files |= {Path(str(each.locate())) for each in found.files or ()}
    return {path for path in files if path.is_file() and ".." not in path.parts}


def build_root(tree: Tree, programs: Programs, base: Path) -> None:
    """Fill the guest's root directory; ``base`` is a stopped cluster for it."""
    for name in ("proc", "sys", "dev", "tmp", "run", "data", "bin", "etc"):
        (tree.root / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, tree.root / "bin" / "busybox")
    for applet in subprocess.run(
        [busybox, "--list-full"], capture_output=True, text=True, check=True
    ).stdout.split():
        link = tree.root / applet
        link.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(link):
            link.symlink_to("/bin/busybox")
    python = Path(sys.executable).resolve()
    tree.add(python)
    tree.add(
        Path(sysconfig.get_path("stdlib")),
        without=("test", "tests", "site-packages", "dist-packages", "config-*", "idlelib",
                 "lib2to3", "tkinter", "ensurepip", "turtledemo", "pydoc_data"),
    )  # fmt: skip
    for path in packages():
        tree.add(path)
    tree.add(ROOT / "pbkfs")
    # Its root directory is only read, and compiling takes an emulated processor seconds.
    sources = tree.root / str(ROOT / "pbkfs").lstrip("/")
    subprocess.run([sys.executable, "-m", "compileall", "-q", sources], check=True)
    tree.add(TESTS / "guest_agent.py")
    tree.add(programs.bindir.parent, without=("lock", "bitcode"))
    tree.add_libraries()
    subprocess.run(["cp", "-a", "-T", base, tree.root / str(BASE).lstrip("/")], check=True)
    user = programs.user
    tree.write(
        "etc/passwd",
        f"root:x:0:0:root:/tmp:/bin/sh\n{user.name}:x:{user.uid}:{user.gid}::/tmp:/bin/sh\n",
    )
    tree.write("etc/group", f"root:x:0:\n{user.name}:x:{user.gid}:\n")
    tree.write("etc/hosts", "127.0.0.1 localhost\n")
    (tree.root / "etc" / "mtab").symlink_to("/proc/self/mounts")
    tree.write("guest/setup", _SETUP, 0o755)
    agent = " ".join([f"{k}={v}" for k, v in environment(programs).items()])
    tree.write(
        "guest/agent",
        f"#!/bin/sh\nexec env -i {agent} {python} {TESTS / 'guest_agent.py'}\n",
        0o755,
    )
    tree.write(
        "etc/inittab",
        "::sysinit:/guest/setup\nttyS0::respawn:/guest/agent\n::shutdown:/bin/umount -a -r\n",
    )


def environment(programs: Programs) -> dict[str, str]:
    """The environment of all commands in the guest."""
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "LC_ALL": "C",
        "PYTHONPATH": f"{ROOT}:{sysconfig.get_path('platlib')}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PBKFS_PG_BINDIR": str(programs.bindir),
        "PBKFS_RUN_DIR": "/run/pbkfs",
        "PBKFS_DATA_DIR": f"{DATA}/pbkfs",
        "PBKFS_LISTEN_ADDRESSES": "0.0.0.0",
        # A branch gets the port that is forwarded, a trunk another one.
        "PBKFS_PORT_RANGE_START": str(PORT),
        "PBKFS_DEFAULT_TRUNK_PORT": str(PORT + 1000),
    }


def make_disk(image: Path, n_bytes: int, *options: str | Path) -> None:
    """Make an image with an ext4."""
    with image.open("wb") as file:
        file.truncate(n_bytes)
    mke2fs = _which("mke2fs")
    assert mke2fs is not None
    make = [mke2fs, "-q", "-F", "-t", "ext4", "-b", str(GRAIN)]
    subprocess.run([*make, *options, image], check=True)


# --- the machine ----------------------------------------------------------------------------------


@dataclass
class Guest:
    """The virtual machine."""

    place: Path
    disk: VolatileDisk
    server_port: int = 0
    _agent_port: int = 0
    _process: subprocess.Popen[bytes] | None = None
    n_boots: int = 0
    console: list[Path] = field(default_factory=list)

    def boot(self) -> None:
        """Switch it on and wait until it does what it is asked for."""
        assert self._process is None
        self.server_port, self._agent_port = free_port(), free_port()
        self.n_boots += 1
        self.console.append(self.place / f"console{self.n_boots}")
        forwarded = "".join(
            f",hostfwd=tcp:127.0.0.1:{outside}-10.0.2.15:{inside}"
            for outside, inside in (
                (self.server_port, PORT), (self._agent_port, guest_agent.PORT)
            )
        )  # fmt: skip
        kernel = linux_directory()
        root = "driver=raw,node-name=root,read-only=on,file.driver=file,"
        root += f"file.filename={self.place}/root.img"
        data = f"driver=nbd,node-name=data,server.type=unix,server.path={self.place}/disk"
        device = "virtio-blk-pci,logical_block_size=4096,physical_block_size=4096"
        self.disk.power_on()
        with self.console[-1].open("wb") as console:
            self._process = subprocess.Popen(
                [
                    "nice", "-n", "5", QEMU,
                    "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max",
                    "-smp", "2", "-m", "1024", "-display", "none", "-nodefaults", "-no-reboot",
                    "-serial", "stdio",
                    "-kernel", kernel / "vmlinuz", "-initrd", kernel / "initrd.cpio",
                    "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
                    "-blockdev", root, "-device", "virtio-blk-pci,drive=root",
                    "-blockdev", data, "-device", f"{device},drive=data,write-cache=on",
                    "-netdev", f"user,id=net,restrict=on{forwarded}",
                    "-device", "virtio-net-pci,netdev=net,romfile=",
                ],
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_until(self._is_up, _BOOT_LIMIT_S)

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.said()
        try:
            return self._ask({"args": ["true"], "cgroup": None}, 30)["code"] == 0
        except (OSError, ValueError):
            return False

    def said(self) -> str:
        """The end of what the kernel and the agent have written since the last boot."""
        return self.console[-1].read_text(errors="replace")[-5000:]

    def _ask(self, question: dict[str, object], limit_s: float) -> dict[str, object]:
        address = ("127.0.0.1", self._agent_port)
        with socket.create_connection(address, timeout=limit_s) as connection:
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as file:
                answer: dict[str, object] = json.loads(file.readline())
        return answer

    def run(
        self, *args: object, check: bool = True, cgroup: Path | None = None,
        limit_s: float = _COMMAND_LIMIT_S,
    ) -> str:  # fmt: skip
        """Run a command as root; returns what it printed."""
        words = [str(each) for each in args]
        asked = {"args": words, "cgroup": None if cgroup is None else str(cgroup)}
        start = time.monotonic()
        answer = self._ask(asked, limit_s)
        print(f"{time.monotonic() - start:6.1f} s: {' '.join(words)}"[:200])
        text = str(answer["out"])
        assert not check or answer["code"] == 0, f"{' '.join(words)}: {text}\n{self.said()}"
        return text

    def pbkfs(self, *args: object, check: bool = True, cgroup: Path | None = None) -> str:
        """Run ``pbkfs ARGS`` in it."""
        python = Path(sys.executable).resolve()
        return self.run(python, "-m", "pbkfs", *args, check=check, cgroup=cgroup)

    def read(self, path: Path | str) -> str:
        """Return the content of a file in it."""
        return self.run("cat", path)

    def write(self, path: Path | str, text: str) -> None:
        """Write to a file of its kernel."""
        self.run("sh", "-c", 'printf %s "$1" > "$2"', "sh", text, path)

    def cut(self, kept: float) -> tuple[int, int]:
        """Cut its power; see ``VolatileDisk.power_off``."""
        self.kill()
        return self.disk.power_off(kept)

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def shut_down(self) -> None:
        """End it in order; all that was written is on the disk."""
        assert self._process is not None
        self.run("umount", DATA)
        self.run("poweroff")
        self._process.wait(120)
        self._process = None
        n_held, _ = self.disk.power_off(0)
        assert n_held == 0


class GuestServer(Clients):
    """A server in the guest, on a mount; its clients are outside."""

    limit_s = 900

    def __init__(self, guest: Guest, pgdata: Path, bindir: Path) -> None:
        self.guest = guest
        self.pgdata = pgdata
        self.bindir = bindir
        self.port = guest.server_port
        self.uri = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self, *options: str, cgroup: Path | None = None) -> None:
        """Start it; commits are durable whatever the cluster's own configuration says."""
        self.guest.pbkfs(
            "start", "-D", self.pgdata, "--port", PORT, "--listen", "0.0.0.0",
            "-c", "fsync=on", *options, cgroup=cgroup,
        )  # fmt: skip

    def stop(self) -> None:
        """Stop it."""
        self.guest.pbkfs("stop", "-D", self.pgdata)


@pytest.fixture
def guest(place: Path, newest_programs: Programs, stopped_cluster: Path) -> Iterator[Guest]:
    """A virtual machine, switched off, whose data disk is empty; ``stopped_cluster`` is in BASE."""
    obstacle = guest_obstacle()
    if obstacle is not None:
        pytest.skip(f"no virtual machine: {obstacle}")
    tree = Tree(place / "root")
    build_root(tree, newest_programs, stopped_cluster)
    with (tree.root / "base" / "pg_hba.conf").open("a") as file:
        file.write("host all all 10.0.2.0/24 trust\n")
    n_kib = int(subprocess.check_output(["du", "-sk", tree.root]).split()[0])
    make_disk(place / "root.img", n_kib * 1280, "-O", "^has_journal", "-d", tree.root)
    shutil.rmtree(tree.root)
    make_disk(place / "disk.img", DATA_BYTES, "-E", "lazy_itable_init=0")
    seed = random.randrange(1 << 32)
    print(f"the disk's seed {seed}")
    disk = VolatileDisk(place / "disk.img", place / "disk", random.Random(seed))
    made = Guest(place, disk)
    try:
        yield made
    finally:
        made.kill()
        disk.close()
