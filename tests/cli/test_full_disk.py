"""A full disk under the diff: written pages wait for space, and nothing is lost or failed."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty import Faulty
from fix_mounts import run_pbkfs
from fix_place import Place, fill, mine
from fix_postgres import wait_until

MIB = 1 << 20

WAITING = "no space left for the diff: written pages wait until there is some"
NO_LONGER = "no written page waits for space any more"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a small file system")


@pytest.fixture
def small(at: Place) -> Iterator[Callable[[int], None]]:
    """Put the diff on a file system of 16 MiB; called, it gives it another size in MiB."""
    at.diff.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", at.diff], check=True)

    def resize(n_mib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={n_mib}m", at.diff], check=True)

    try:
        yield resize
    finally:
        at.close()
        subprocess.run(["umount", at.diff], check=True)


_WRITE = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
content = sys.stdin.buffer.read()
try:
    assert os.pwrite(fd, content, 0) == len(content)
    os.fsync(fd)
except OSError as error:
    sys.exit(error.errno)
"""


class Writer:
    """Overwrites a file and syncs it, in a process of its own: a close of its file waits, too."""

    def __init__(self, path: Path, content: bytes) -> None:
        command = [sys.executable, "-c", _WRITE, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(content)
        self.process.stdin.close()

    def is_waiting(self) -> bool:
        return self.process.poll() is None

    def error(self) -> int:
        """Return the errno that it ended with, 0 for none."""
        return self.process.wait(30)


def add_relation(base: Path, n_mib: int) -> tuple[Path, bytes]:
    content = random.Random(1).randbytes(n_mib * MIB)
    path = base / "base" / "1" / "16384"
    path.write_bytes(content)
    return path, content


def is_full(at: Place) -> bool:
    return bool(mine(at)[0]["state"] == "full")


def wait_until_said(at: Place, words: str) -> None:
    """The log is written beside the answers."""
    wait_until(lambda: words in at.log())


def test_written_pages_wait_for_space(at: Place, base: Path, small: Callable[[int], None]) -> None:
    at.expected += ["no space left", "waits for space any more"]
    _, old = add_relation(base, 40)
    at.mount("--base", base)
    relation = at.mnt / "base" / "1" / "16384"
    new = random.Random(2).randbytes(len(old))
    writer = Writer(relation, new)
    wait_until(lambda: is_full(at))
    assert "disk is full" in run_pbkfs("stat", "-D", at.mnt).stdout
    wait_until_said(at, WAITING)
    assert NO_LONGER not in at.log()
    # Everything else goes on: what is there is read, and a change that needs no space is made.
    assert (at.mnt / "PG_VERSION").read_text() == "15\n"
    os.rename(at.mnt / "postgresql.conf", at.mnt / "renamed.conf")
    refused = run_pbkfs("unmount", "-D", at.mnt, check=False)
    assert refused.returncode == 8
    assert "wait for space" in refused.stderr
    assert writer.is_waiting()

    small(64)
    assert writer.error() == 0
    assert relation.read_bytes() == new
    assert not is_full(at)
    wait_until_said(at, NO_LONGER)
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse")
    assert relation.read_bytes() == new
    assert (base / "base" / "1" / "16384").read_bytes() == old


@pytest.mark.usefixtures("small")
def test_a_copy_up_waits_for_space(at: Place, base: Path) -> None:
    """A file that is copied whole needs all its space at once."""
    at.expected += ["no space left", "waits for space any more"]
    (base / "small").write_bytes(b"s" * MIB)
    at.mount("--base", base)
    filler = at.diff / "filler"
    fill(filler)
    writer = Writer(at.mnt / "small", b"new")
    wait_until(lambda: is_full(at))
    filler.unlink()
    assert writer.error() == 0
    assert (at.mnt / "small").read_bytes() == b"new" + b"s" * (MIB - 3)
    run_pbkfs("unmount", "-D", at.mnt)


@pytest.mark.usefixtures("small")
def test_names_change_on_a_full_disk(at: Place, base: Path) -> None:
    """The journal has room of its own, so files can be removed to make space."""
    (base / "other").write_bytes(b"o")
    at.mount("--base", base)
    (at.mnt / "made").write_bytes(b"m" * MIB)
    os.sync()
    fill(at.diff / "filler")
    for n in range(500):
        os.rename(at.mnt / ("other" if n == 0 else f"other{n}"), at.mnt / f"other{n + 1}")
    (at.mnt / "made").unlink()
    directory = os.open(at.mnt, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    (at.diff / "filler").unlink()
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse")
    assert (at.mnt / "other500").read_bytes() == b"o"
    assert not (at.mnt / "made").exists()


@pytest.mark.parametrize("how", ["error", "wait:1"])
def test_waiting_ends_in_an_error(
    at: Place, base: Path, small: Callable[[int], None], how: str
) -> None:
    at.expected += ["no space left", "waits for space any more", "No space left on device"]
    _, old = add_relation(base, 40)
    at.mount("--base", base, "--on-full", how)
    relation = at.mnt / "base" / "1" / "16384"
    writer = Writer(relation, bytes(len(old)))
    assert writer.error() == errno.ENOSPC
    small(64)
    # What could not be written is as it was or as it was to be, page by page; never anything else.
    os.posix_fadvise(fd := os.open(relation, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse")
    found = relation.read_bytes()
    assert len(found) == len(old)
    pages = {
        "old" if found[at:to] == old[at:to] else "new" if not any(found[at:to]) else "other"
        for at, to in ((n, n + 8192) for n in range(0, len(old), 8192))
    }
    assert pages == {"old", "new"}


@pytest.mark.parametrize("how", ["wait", "error"])
@pytest.mark.parametrize("op", ["write", "create"])
def test_a_quota_that_is_used_up_is_a_full_disk(at: Place, base: Path, op: str, how: str) -> None:
    """Where pages are written to an object that is there, and where one has to be made."""
    _, old = add_relation(base, 1)
    relation = at.mnt / "base" / "1" / "16384"
    at.mount("--base", base)
    if op == "write":
        assert Writer(relation, b"first").error() == 0
        old = b"first" + old[5:]
    run_pbkfs("unmount", "-D", at.mnt)
    faulty = Faulty(at.diff / "objects")
    try:
        at.mount("--reuse", "--on-full", how)
        new = random.Random(2).randbytes(len(old))
        faulty.fail({"op": op, "path": "", "errno": errno.EDQUOT})
        writer = Writer(relation, new)
        if how == "wait":
            at.expected += [WAITING, NO_LONGER]
            wait_until(lambda: is_full(at))
            wait_until_said(at, WAITING)
            assert writer.is_waiting()
            faulty.fail()
            assert writer.error() == 0
            wait_until_said(at, NO_LONGER)
        else:
            assert writer.error() == errno.EDQUOT
            os.posix_fadvise(fd := os.open(relation, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
            assert relation.read_bytes() == old
            faulty.fail()
            assert Writer(relation, new).error() == 0
        assert not is_full(at)
        run_pbkfs("unmount", "-D", at.mnt)
        at.mount("--reuse")
        assert relation.read_bytes() == new
    finally:
        at.close()
        faulty.close()


@pytest.mark.usefixtures("small")
def test_the_kernel_holds_back_only_so_much(at: Place, base: Path) -> None:
    """Without a bound 40 MiB were taken at once, and nobody would know that there is no room."""
    at.expected += ["no space left", "waits for space any more", "forced"]
    at.mount("--base", base)
    write = (
        "import os, sys; os.write(1, b'%d' % os.write(os.open(sys.argv[1], 66), bytes(40 << 20)))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", write, at.mnt / "new"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: is_full(at), 30)
        assert writer.stdout is not None
        os.set_blocking(writer.stdout.fileno(), False)
        assert writer.stdout.read() is None
    finally:
        writer.kill()
        run_pbkfs("unmount", "-D", at.mnt, "--force")
        writer.communicate(timeout=30)


@pytest.mark.usefixtures("small")
def test_what_is_dirty_has_room_in_reserve(at: Place, base: Path) -> None:
    at.mount("--base", base)
    space = json.loads(run_pbkfs("stat", "-D", at.mnt, "-o", "json").stdout)["space"]
    assert space["is_bounded"]
    assert MIB // 2 < space["dirty_bytes"] <= space["reserve_bytes"] <= 2 * MIB
    assert "in reserve for at most" in run_pbkfs("stat", "-D", at.mnt).stdout
    filler = at.diff / "filler"
    fill(filler)
    os.truncate(filler, filler.stat().st_size - space["reserve_bytes"] // 4 * 3)

    there, here = os.statvfs(at.diff), os.statvfs(at.mnt)
    assert there.f_bavail > 0
    assert here.f_bavail == here.f_bfree == 0
    with open(at.mnt / "new", "xb") as file:
        with pytest.raises(OSError, match="No space left") as caught:
            os.posix_fallocate(file.fileno(), 0, MIB // 4)
        assert caught.value.errno == errno.ENOSPC
        file.write(b"n" * (MIB // 4))
        file.flush()
        os.fsync(file.fileno())
        # Room that the file has already is no question.
        os.posix_fallocate(file.fileno(), 0, MIB // 4)

    filler.unlink()
    here, there = os.statvfs(at.mnt), os.statvfs(at.diff)
    assert here.f_bavail == there.f_bavail - -(-space["reserve_bytes"] // there.f_frsize)
    with open(at.mnt / "new", "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, MIB)
    run_pbkfs("unmount", "-D", at.mnt)


@pytest.mark.usefixtures("small")
def test_force_gives_up_what_waits(at: Place, base: Path) -> None:
    at.expected += [
        "no space left",
        "waits for space any more",
        "forced",
        "No space left on device",
    ]
    add_relation(base, 40)
    at.mount("--base", base)
    writer = Writer(at.mnt / "base" / "1" / "16384", bytes(40 * MIB))
    wait_until(lambda: is_full(at))
    run_pbkfs("unmount", "-D", at.mnt, "--force")
    assert writer.error() != 0


@pytest.mark.parametrize("text", ["", "wait:", "wait:0", "never", "error:1", "wait:-1"])
def test_bad_words(at: Place, text: str) -> None:
    done = at.mount("--on-full", text, check=False)
    assert done.returncode == 2
    assert "not understood" in done.stderr
