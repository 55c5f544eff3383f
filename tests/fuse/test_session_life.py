"""How mounts begin and end: cleanly, while in use, by signal, by force, and not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fuse.served import Served, is_mounted
from machine import mounts_of, open_to_everybody, own_mounts

from pbkfs.errors import BusyError, HostError, NotRunningError
from pbkfs.fuse import mounting

Serve = Callable[..., Served]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mount namespaces")


def test_a_clean_end(serve: Serve) -> None:
    served = serve()
    (served.path / "file").write_bytes(b"x")
    assert served.unmount() == {}
    assert served.wait() == 0
    assert not is_mounted(served.path)
    assert os.listdir(served.path) == []
    assert "ERROR" not in served.log


def test_unmounted_from_outside(serve: Serve) -> None:
    served = serve()
    (served.path / "file").write_bytes(b"x")
    mounting.unmount(served.path)
    assert served.wait() == 0
    assert (serve().path / "file").read_bytes() == b"x"
    assert "ERROR" not in served.log


def test_sigterm_unmounts(serve: Serve) -> None:
    served = serve()
    (served.path / "file").write_bytes(b"x")
    served.process.send_signal(signal.SIGTERM)
    assert served.wait() == 0
    assert not is_mounted(served.path)


@pytest.mark.parametrize("kind", ["file", "cwd"])
def test_a_mount_in_use_stays(serve: Serve, kind: str) -> None:
    served = serve()
    file = served.path / "file"
    file.write_bytes(b"x")
    flags = os.O_RDONLY | (os.O_DIRECTORY if kind == "cwd" else 0)
    fd = os.open(served.path if kind == "cwd" else file, flags)
    answer = served.unmount()
    assert answer["error"] == "BusyError"
    assert str(served.path) in answer["message"]
    with pytest.raises(BusyError):
        mounting.unmount(served.path)
    served.process.send_signal(signal.SIGTERM)
    assert served.hear()["error"] == "BusyError"
    assert file.read_bytes() == b"x"
    os.close(fd)
    assert served.unmount() == {}


def test_detached_in_use_lives_until_closed(serve: Serve) -> None:
    served = serve()
    fd = os.open(served.path / "file", os.O_CREAT | os.O_RDWR, 0o600)
    os.write(fd, b"x" * 100)
    served.ask("detach")
    assert not is_mounted(served.path)
    assert os.pread(fd, 5, 0) == b"xxxxx"
    os.fsync(fd)
    os.close(fd)
    assert served.wait() == 0


def test_close_ends_a_detached_mount(serve: Serve) -> None:
    served = serve()
    fd = os.open(served.path / "file", os.O_CREAT | os.O_RDWR, 0o600)
    os.write(fd, b"x" * 100)
    os.fsync(fd)
    served.ask("detach")
    served.ask("close")
    assert served.wait() == 0
    for use in (os.fsync, os.close):
        with pytest.raises(OSError, match=r"not connected|aborted") as caught:
            use(fd)
        assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert (serve().path / "file").read_bytes() == b"x" * 100


def test_killed_worker_leaves_a_dead_endpoint(serve: Serve) -> None:
    served = serve()
    (served.path / "file").write_bytes(b"x")
    os.sync()
    served.process.kill()
    served.wait()
    # Never an empty directory where a cluster was.
    with pytest.raises(OSError, match="not connected") as caught:
        os.listdir(served.path)
    assert caught.value.errno == errno.ENOTCONN
    mounting.detach(served.path)
    with pytest.raises(NotRunningError):
        mounting.unmount(served.path)
    assert (serve().path / "file").read_bytes() == b"x"


def test_nothing_leaks_over_many_mounts(serve: Serve) -> None:
    held = serve(None, "--cycles", "50").said["held"]
    assert len(held) == 50
    # What one mount leaked, 45 would have leaked 45 times. A few come and go: trio keeps as many
    # worker threads as the load ever needed at once.
    for what in ("descriptors", "threads"):
        first, last = ([one[what] for one in part] for part in (held[:5], held[-5:]))
        assert min(last) < max(first) + 10


def test_a_failed_mount_leaves_nothing(serve: Serve, place: Path) -> None:
    (place / "m").touch()
    with pytest.raises(FileExistsError):
        serve()
    (place / "m").unlink()
    said = serve(None, "--missing").said
    assert said["error"] == "HostError"
    assert said["hint"] == "Make the directory first."
    assert said["after"] == said["before"]


def test_no_fuse_device(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(mounting, "DEVICE", str(place / "fuse"))
    with pytest.raises(HostError, match="no such file") as caught:
        mounting.open_and_mount(place, fsname="x", subtype="pbkfs", allow_other=False)
    assert "modprobe fuse" in (caught.value.hint or "")
    assert not is_mounted(place)


def test_no_helper(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setattr(mounting, "HELPER", str(place / "fusermount3"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match="not installed") as caught:
        mounting.open_and_mount(place, fsname="x", subtype="pbkfs", allow_other=False)
    assert "package fuse3" in (caught.value.hint or "")
    with pytest.raises(HostError, match="not installed"):
        mounting.unmount(place)


def test_awkward_names(serve: Serve, place: Path) -> None:
    """Spaces, commas and backslashes in paths, which mount options and the kernel's list escape."""
    name = "a b,c\\d"
    served = serve(None, name=name)
    (served.path / "file").write_bytes(b"x")
    device = mounting.find_device(served.path)
    assert device is not None
    assert Path("/sys/class/bdi", device).exists()
    assert served.unmount() == {}
    assert place.joinpath(name).is_dir()


@needs_root
def test_write_back_and_read_ahead_are_set(serve: Serve) -> None:
    device = mounting.find_device(serve().path)
    bdi = Path("/sys/class/bdi", str(device))
    assert (bdi / "read_ahead_kb").read_text() == "1024\n"
    if (bdi / "max_bytes").exists():
        assert (bdi / "strict_limit").read_text() == "1\n"
        # The kernel keeps a share of its threshold, which moves with the memory that is free.
        assert 64 << 20 < int((bdi / "max_bytes").read_text()) < 1 << 30


# --- as an ordinary user, through fusermount3 -----------------------------------------------------


@pytest.fixture
def as_user(place: Path) -> tuple[str, ...]:
    """A command's prefix: user 65534 in a mount namespace whose /dev/fuse everybody may open."""
    place.chmod(0o777)
    become = 'exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    return (*own_mounts(), "sh", "-ec", f"{open_to_everybody(place)}; {become}", "sh")


def enter(served: Served, script: str) -> subprocess.Popen[str]:
    """Run a script beside the served process: same namespace, same user."""
    namespace = mounts_of(served.process.pid)
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*namespace, *user, "sh", "-c", script], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


@needs_root
def test_an_ordinary_user_mounts(serve: Serve, as_user: tuple[str, ...]) -> None:
    served = serve(None, "--fsname", "a,b\\c d", name="user", prefix=as_user)
    assert served.said == {"ready": True}
    with enter(served, f"cd {served.path} && echo hello >f && cat f && stat -c '%u %a' .") as done:
        assert done.communicate() == ("hello\n65534 700\n", "")
    with enter(served, f"grep {served.path} /proc/self/mountinfo") as done:
        line, _ = done.communicate()
    assert "nosuid,nodev" in line
    assert "fuse.pbkfs a,b\\134c\\040d" in line
    with enter(served, f"cd {served.path} && echo here && cat") as busy:
        assert busy.stdout is not None
        assert busy.stdout.readline() == "here\n"
        assert served.unmount().get("error") == "BusyError"
        busy.communicate()
    assert served.unmount() == {}
    assert served.wait() == 0


@needs_root
def test_an_ordinary_user_is_refused_with_a_hint(serve: Serve, as_user: tuple[str, ...]) -> None:
    said = serve(None, "--allow-other", name="user", prefix=as_user).said
    assert said["error"] == "HostError"
    assert "user_allow_other" in said["hint"]
    said = serve(None, "--missing", name="other", prefix=as_user).said
    assert said["error"] == "HostError"
    assert said["after"] == said["before"]
