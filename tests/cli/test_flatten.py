"""``pbkfs flatten``, of a mount in use and offline, through the real kernel."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from cli.test_seal import PAGE, contents, mounted, seal_at
from fix_mounts import run_pbkfs
from fix_place import Place

from pbkfs.mount import control
from pbkfs.overlay.superblock import read_superblock


def worker_paths(diff: Path) -> set[str]:
    """What the worker has open, but for sockets and pipes."""
    pid = control.call(diff, "ping")["pid"]
    found = set()
    for fd in os.scandir(f"/proc/{pid}/fd"):
        try:
            found.add(os.readlink(fd.path))
        except FileNotFoundError:
            continue
    return found


def test_flatten_of_a_mount_in_use(at: Place) -> None:
    """Files that are open and mapped stay so, and nothing refers to the old layers any more."""
    at.mount()
    path = at.mnt / "base"
    path.mkdir()
    with open(path / "16384", "w+b", buffering=0) as file, open(path / "16385", "w+b") as other:
        file.write(b"a" * 20 * PAGE)
        os.fsync(file)
        with mmap.mmap(file.fileno(), 20 * PAGE) as memory:
            for number in range(4):
                os.pwrite(file.fileno(), b"%d" % number * PAGE, number * PAGE)
                other.write(b"o" * PAGE)
                other.flush()
                os.fsync(other)
                seal_at(at, number, has_child=False)
            memory[10 * PAGE : 10 * PAGE + 4] = b"live"
            layers = read_superblock(at.diff).layers
            old = {str(at.diff / "objects"), *(str(at.root / f"live{n}") for n in range(3))}
            assert any(each.startswith(tuple(old)) for each in worker_paths(at.diff))
            before = contents(at.mnt)
            out = run_pbkfs("flatten", "-d", at.diff)
            assert out.stdout.startswith(f"folded {len(layers)} layers of {at.diff} into one: ")
            assert "does not need these layers any more" in out.stderr
            (made,) = read_superblock(at.diff).layers
            assert made.path.startswith("layers/")
            assert not any(each.startswith(tuple(old)) for each in worker_paths(at.diff))
            for number in range(3):
                for part in (at.root / f"live{number}").rglob("*"):
                    if part.is_file():
                        part.unlink()
            assert memory[:PAGE] == b"0" * PAGE
            assert memory[10 * PAGE : 10 * PAGE + 4] == b"live"
            assert contents(at.mnt) == before
            memory[3 * PAGE : 3 * PAGE + 5] = b"after"
            memory.flush()
            os.fsync(file)
            assert os.pread(file.fileno(), 5, 3 * PAGE) == b"after"
        before = contents(at.mnt)
    run_pbkfs("unmount", "-D", at.mnt)
    out = run_pbkfs("flatten", "-d", at.diff, "--delete")
    assert out.stdout == (
        f"nothing to fold in {at.diff}: sealed layers 1\ndeleted the layer in {at.diff}\n"
    )
    assert not (at.diff / "journal").exists()
    assert run_pbkfs("check", "-d", at.diff).returncode == 0
    # It is a diff that can be moved with the layer that it has inside.
    at.mount()
    assert contents(at.mnt) == before


def test_flatten_of_a_diff_that_is_not_mounted(at: Place, base: Path) -> None:
    child = at.root / "child1"
    with mounted(at, at.diff, base) as mnt:
        for number in range(3):
            (mnt / f"file{number}").write_bytes(b"%d" % number * PAGE)
            (mnt / "postgresql.conf").write_bytes(b"%d" % number)
            seal_at(at, number, has_child=number == 1)
            if number == 1:
                expected = contents(mnt)
        (mnt / "last").write_bytes(b"last")
        before = contents(mnt)
    out = run_pbkfs("flatten", "-d", at.diff).stdout
    assert "folded 3 layers" in out
    assert run_pbkfs("flatten", "-d", at.diff).stdout == (
        f"nothing to fold in {at.diff}: sealed layers 1\n"
    )
    assert run_pbkfs("check", "-d", at.diff).returncode == 0
    with mounted(at, at.diff, base) as mnt:
        assert contents(mnt) == before
    # What else lies upon the old layers has them still.
    with mounted(at, child, base) as mnt:
        assert contents(mnt) == expected
    done = run_pbkfs("cleanup", "-d", at.diff, check=False)
    assert done.returncode != 0
    run_pbkfs("cleanup", "-d", at.diff, "--force")


def test_bad_calls(at: Place) -> None:
    done = run_pbkfs("flatten", check=False)
    assert done.returncode == 2
    done = run_pbkfs("flatten", "-d", at.root / "nope", check=False)
    assert "does not exist" in done.stderr
    at.mount()
    done = run_pbkfs("flatten", "-d", at.diff, "--delete", check=False)
    assert done.returncode == 8
    assert "in use" in done.stderr
