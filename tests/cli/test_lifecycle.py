"""A mount from its start to its end, through the real command line and the real kernel."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fix_mounts import run_pbkfs
from fix_place import Place, mine, snapshot
from machine import ROOT

from pbkfs.errors import TimedOutError
from pbkfs.mount import lock, privileges, sealing


def test_mount_write_unmount_remount(at: Place) -> None:
    done = at.mount("--wait")
    worker = at.owner()
    assert done.stdout == f"mounted an empty base on {at.mnt} (pid {worker.pid})\n"
    assert os.path.ismount(at.mnt)
    assert worker.is_alive()
    assert worker.mountpoint == str(at.mnt)
    (at.mnt / "dir").mkdir()
    (at.mnt / "dir" / "file").write_text("hello")
    assert run_pbkfs("unmount", "-D", at.mnt).stdout == f"unmounted {at.mnt}\n"
    assert not os.path.ismount(at.mnt)
    assert not worker.is_alive()
    assert not lock.is_held(at.diff)
    assert lock.read_owner(at.diff) is None
    assert not (at.diff / "control.sock").exists()
    # Again, without saying of what: the binding knows.
    at.mount("--reuse")
    assert (at.mnt / "dir" / "file").read_text() == "hello"
    run_pbkfs("unmount", "-d", at.diff)


def test_worker_is_a_daemon(at: Place) -> None:
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    subprocess.run(
        [sys.executable, "-m", "pbkfs", "mount", "--empty", "-D", at.mnt, "-d", at.diff,
         "--owner", "0:0"] if os.geteuid() == 0 else
        [sys.executable, "-m", "pbkfs", "mount", "--empty", "-D", at.mnt, "-d", at.diff],
        pass_fds=[write_end], check=True, capture_output=True,
    )  # fmt: skip
    os.close(write_end)
    # Our pipe's other end is closed in the worker too, or this would wait for ever.
    assert select.select([read_end], [], [], 10)[0] == [read_end]
    os.close(read_end)
    pid = at.owner().pid
    proc = Path(f"/proc/{pid}")
    assert os.readlink(proc / "cwd") == "/"
    assert os.readlink(proc / "fd" / "0") == "/dev/null"
    assert os.readlink(proc / "fd" / "2") == str(at.diff / "log" / "worker.log")
    assert os.getsid(pid) != os.getsid(0)
    status = (proc / "status").read_text()
    assert re.search(r"^Umask:\s+0000$", status, re.M)
    limits = (proc / "limits").read_text()
    soft, hard = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits).groups()  # type: ignore[union-attr]
    assert soft == hard


def test_started_with_closed_descriptors(at: Place) -> None:
    command = f"{sys.executable} -m pbkfs mount --empty -D {at.mnt} -d {at.diff}"
    command += f" --owner {os.geteuid()} <&- >&- 2>&-"
    subprocess.run(["sh", "-c", command], check=True)
    proc = Path(f"/proc/{at.owner().pid}/fd")
    assert os.readlink(proc / "0") == "/dev/null"
    assert lock.is_held(at.diff)
    (at.mnt / "file").write_text("x")


def test_base_is_shown_and_not_changed(at: Place, base: Path) -> None:
    before = snapshot(base)
    at.mount("--base", base)
    assert (at.mnt / "PG_VERSION").read_text() == "15\n"
    assert (at.mnt / "base/1/1259").read_bytes() == (base / "base/1/1259").read_bytes()
    assert at.mnt.stat().st_mode & 0o777 == 0o700
    with (at.mnt / "base/1/1259").open("r+b") as file:
        file.seek(8192)
        file.write(b"x" * 8192)
    (at.mnt / "postgresql.conf").unlink()
    run_pbkfs("unmount", "-D", at.mnt)
    assert snapshot(base) == before
    at.mount("--reuse")
    content = (base / "base/1/1259").read_bytes()
    expected = content[:8192] + b"x" * 8192 + content[16384:]
    assert (at.mnt / "base/1/1259").read_bytes() == expected
    assert not (at.mnt / "postgresql.conf").exists()


def test_wal_is_a_plain_directory_of_the_diff(at: Place, base: Path) -> None:
    at.mount("--base", base)
    assert os.readlink(at.mnt / "pg_wal") == str(at.diff / "pg_wal")
    name = "000000010000000000000001"
    assert (at.mnt / "pg_wal" / name).read_bytes() == (base / "pg_wal" / name).read_bytes()
    assert (at.diff / "pg_wal").stat().st_mode & 0o777 == 0o700
    assert (at.diff / "pg_wal" / "archive_status").is_dir()
    (at.mnt / "pg_wal" / name).write_bytes(b"newer")
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse")
    # Filled once: what the server wrote there is not overwritten by the base's.
    assert (at.mnt / "pg_wal" / name).read_bytes() == b"newer"


def test_wal_made_inside_of_an_empty_base_moves_out_later(at: Place) -> None:
    at.mount()
    (at.mnt / "pg_wal" / "archive_status").mkdir(parents=True)
    (at.mnt / "pg_wal" / "1").write_text("one")
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse")
    assert (at.mnt / "pg_wal").is_symlink()
    assert (at.diff / "pg_wal" / "1").read_text() == "one"
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse")
    assert (at.mnt / "pg_wal" / "1").read_text() == "one"


def test_killed_worker_leaves_a_dead_endpoint_then_mounts_again(at: Place) -> None:
    at.mount()
    (at.mnt / "file").write_text("kept")
    fd = os.open(at.mnt / "file", os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    at.kill()
    assert at.is_dead()
    (row,) = mine(at)
    assert row["state"] == "dead"
    done = run_pbkfs("stat", "-D", at.mnt, check=False)
    assert done.returncode == 3
    at.mount("--reuse")
    assert (at.mnt / "file").read_text() == "kept"
    (row,) = mine(at)
    assert row["state"] == "alive"
    assert row["pid"] == at.owner().pid


@pytest.mark.parametrize("how", ["-D", "-d"])
def test_dead_endpoint_is_unmounted(at: Place, how: str) -> None:
    at.mount()
    at.kill()
    run_pbkfs("unmount", how, at.mnt if how == "-D" else at.diff)
    assert not at.is_dead()
    assert os.listdir(at.mnt) == []
    assert mine(at) == []


def test_dead_mount_of_another_diff_is_not_taken(at: Place) -> None:
    at.mount()
    at.kill()
    done = run_pbkfs("mount", "--empty", "-D", at.mnt, "-d", at.root / "other", check=False)
    assert done.returncode == 8
    assert f"holds the dead mount of another diff, {at.diff}" in done.stderr
    assert not (at.root / "other").exists()


def test_busy_mount_is_refused_by_name(at: Place) -> None:
    at.mount()
    (at.mnt / "file").write_text("x")
    with (at.mnt / "file").open(), subprocess.Popen(["sleep", "600"], cwd=at.mnt) as sleeper:
        try:
            done = run_pbkfs("unmount", "-D", at.mnt, check=False)
            assert done.returncode == 8
            assert f"mount point {at.mnt} is busy: in use by pid " in done.stderr
            assert f"pid {sleeper.pid} (sleep)" in done.stderr
            assert f"pid {os.getpid()} " in done.stderr
            assert (at.mnt / "file").read_text() == "x"
        finally:
            sleeper.kill()
    run_pbkfs("unmount", "-D", at.mnt)


def test_forced_unmount_of_a_busy_mount(at: Place) -> None:
    at.expected = ["forced: detaching .* while it is in use"]
    at.mount()
    worker = at.owner()
    with (at.mnt / "file").open("w") as file:
        file.write("kept")
        file.flush()
        run_pbkfs("unmount", "-D", at.mnt, "--force")
        assert not worker.is_alive()
        assert not os.path.ismount(at.mnt)
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.fstat(file.fileno()) and os.pread(file.fileno(), 1, 0)
        with contextlib.suppress(OSError):
            file.close()
    at.mount("--reuse")
    assert (at.mnt / "file").read_text() == "kept"


def test_forced_unmount_of_a_stopped_worker(at: Place) -> None:
    at.mount()
    worker = at.owner()
    os.kill(worker.pid, signal.SIGSTOP)
    run_pbkfs("unmount", "-D", at.mnt, "--force", "--timeout", "0.5")
    assert not worker.is_alive()
    assert not os.path.ismount(at.mnt)
    at.mount("--reuse")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may end a connection")
def test_forced_unmount_of_a_worker_that_waits_for_itself(at: Place) -> None:
    logs = at.root / "logs"
    logs.mkdir()
    at.mount("--log-file", logs / "log")
    worker = at.owner()
    # The next line of the log goes through the mount itself: not even SIGKILL ends that.
    logs.rename(at.root / "before")
    logs.symlink_to(at.mnt)
    with pytest.raises(TimedOutError):
        sealing.seal(at.diff, new_live=at.root / "live", timeout_s=1)
    run_pbkfs("unmount", "-D", at.mnt, "--force", "--timeout", "1")
    assert not worker.is_alive()
    assert not os.path.ismount(at.mnt)


def test_force_never_kills_a_process_with_a_recycled_pid(at: Place) -> None:
    at.mount()
    at.kill()
    with subprocess.Popen(["sleep", "600"]) as bystander:
        try:
            record = json.loads((at.diff / "lock").read_bytes())
            record["pid"] = bystander.pid
            (at.diff / "lock").write_text(json.dumps(record))
            run_pbkfs("unmount", "-D", at.mnt, "--force", "--timeout", "1")
            assert bystander.poll() is None
        finally:
            bystander.kill()


def wait_for_log(at: Place, pattern: str) -> None:
    """Wait until the worker's log has a line."""
    deadline = time.monotonic() + 30
    while not re.search(pattern, at.log()):
        assert time.monotonic() < deadline, at.log()
        time.sleep(0.02)


def test_sigterm_unmounts_unless_busy(at: Place) -> None:
    at.expected = ["not unmounted: mount point .* is busy"]
    at.mount()
    worker = at.owner()
    with (at.mnt / "file").open("w"):
        os.kill(worker.pid, signal.SIGTERM)
        wait_for_log(
            at, rf"not unmounted: mount point {at.mnt} is busy: in use by pid {os.getpid()}"
        )
        assert worker.is_alive()
    for harmless in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM):
        os.kill(worker.pid, harmless)
        wait_for_log(at, f"got {harmless.name}, which does nothing")
    pidfd = os.pidfd_open(worker.pid)
    os.kill(worker.pid, signal.SIGTERM)
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)
    assert not os.path.ismount(at.mnt)
    assert lock.read_owner(at.diff) is None


def test_plain_umount_ends_the_worker(at: Place) -> None:
    at.mount()
    worker = at.owner()
    pidfd = os.pidfd_open(worker.pid)
    command = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    subprocess.run([*command, str(at.mnt)], check=True)
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)
    assert lock.read_owner(at.diff) is None


def test_unmount_makes_unsynced_data_durable(at: Place) -> None:
    at.mount()
    (at.mnt / "file").write_bytes(b"z" * 100_000)
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse")
    assert (at.mnt / "file").read_bytes() == b"z" * 100_000


def test_stat(at: Place, base: Path) -> None:
    at.mount("--base", base)
    with (at.mnt / "base/1/1259").open("r+b") as file:
        file.write(b"y" * 8192)
        os.fsync(file.fileno())
    found = json.loads(run_pbkfs("stat", "-D", at.mnt, "--format", "json").stdout)
    assert found["pid"] == at.owner().pid
    assert found["state"] == "serving"
    assert found["mountpoint"] == str(at.mnt)
    assert found["diff"] == str(at.diff)
    assert found["changed"]["files"] == 1
    assert found["changed"]["bytes"] == 8192
    assert found["disk"]["wal_bytes"] >= 1 << 20
    assert found["disk"]["journal_bytes"] > 0
    assert found["overlay"]
    assert found["fuse"]
    text = run_pbkfs("stat", "-d", at.diff).stdout
    assert f"mount point: {at.mnt}" in text
    assert "1 files, 8 KiB" in text


def events(found: dict[str, dict[str, int]]) -> int:
    return found["fuse"]["tasks_total"]


def test_stat_resets_counters(at: Place) -> None:
    at.mount()
    for n in range(50):
        (at.mnt / f"file{n}").write_text("x")
    before = json.loads(run_pbkfs("stat", "-D", at.mnt, "-o", "json", "--counters-reset").stdout)
    after = json.loads(run_pbkfs("stat", "-D", at.mnt, "-o", "json").stdout)
    assert events(before) > events(after)


def test_stat_watch_ends_by_interrupt(at: Place) -> None:
    at.mount()
    with subprocess.Popen(
        [sys.executable, "-m", "pbkfs", "stat", "-D", str(at.mnt), "--watch", "0.05"],
        stdout=subprocess.PIPE,
        text=True,
    ) as watcher:
        assert watcher.stdout is not None
        seen = 0
        for line in watcher.stdout:
            seen += line.startswith("mount point:")
            if seen == 3:
                watcher.send_signal(signal.SIGINT)
                break
        watcher.stdout.read()
        assert watcher.wait(30) == 0


def test_list_shows_the_mount(at: Place) -> None:
    at.mount()
    (row,) = mine(at)
    assert row["state"] == "alive"
    assert row["pid"] == at.owner().pid
    assert row["diff"] == str(at.diff)
    assert row["base"]["kind"] == "empty"  # type: ignore[index]
    lines = run_pbkfs("list").stdout.splitlines()
    assert lines[0].startswith("MOUNT POINT")
    assert any(str(at.mnt) in line and "alive" in line for line in lines)
    run_pbkfs("unmount", "-D", at.mnt)
    assert mine(at) == []


def test_awkward_names(place: Path) -> None:
    root = place / "a b,c\\d\té"
    root.mkdir()
    at = Place(root)
    try:
        at.mount()
        (at.mnt / "file").write_text("x")
        assert run_pbkfs("stat", "-D", at.mnt).returncode == 0
        (row,) = mine(at)
        assert row["diff"] == str(at.diff)
        run_pbkfs("unmount", "-D", at.mnt)
    finally:
        at.close()


def test_cleanup(at: Place) -> None:
    at.mount()
    (at.mnt / "file").write_text("x")
    done = run_pbkfs("cleanup", "-d", at.diff, check=False)
    assert done.returncode == 8
    assert f"diff {at.diff} is mounted on {at.mnt}" in done.stderr
    done = run_pbkfs("cleanup", "-d", at.diff, "--force", check=False)
    assert done.returncode == 8
    assert (at.mnt / "file").read_text() == "x"
    run_pbkfs("unmount", "-D", at.mnt)
    run_pbkfs("cleanup", "-d", at.diff)
    assert not at.diff.exists()


def test_cleanup_leaves_a_directory_that_it_did_not_make(at: Place) -> None:
    at.diff.mkdir()
    at.mount()
    run_pbkfs("unmount", "-D", at.mnt)
    run_pbkfs("cleanup", "-d", at.diff)
    assert list(at.diff.iterdir()) == []


def test_cleanup_of_a_dead_mount_needs_force(at: Place) -> None:
    at.mount()
    at.kill()
    assert run_pbkfs("cleanup", "-d", at.diff, check=False).returncode == 8
    assert at.is_dead()
    run_pbkfs("cleanup", "-d", at.diff, "--force")
    assert not at.is_dead()
    assert not at.diff.exists()


def test_cleanup_respects_another_host(at: Place) -> None:
    at.mount()
    at.kill()
    run_pbkfs("unmount", "-D", at.mnt)
    record = json.loads((at.diff / "lock").read_bytes())
    record.update(host="elsewhere", machine_id="m", boot_id="b")
    (at.diff / "lock").write_text(json.dumps(record))
    done = run_pbkfs("cleanup", "-d", at.diff, check=False)
    assert done.returncode == 8
    assert "host elsewhere" in done.stderr
    done = at.mount("--reuse", check=False)
    assert done.returncode == 8
    assert json.loads((at.diff / "lock").read_bytes()) == record
    run_pbkfs("cleanup", "-d", at.diff, "--force")
    assert not at.diff.exists()


def test_console_stays_in_front(at: Place) -> None:
    arguments = ["mount", "--empty", "-D", str(at.mnt), "-d", str(at.diff), "--console"]
    with subprocess.Popen(
        [sys.executable, "-m", "pbkfs", *arguments], stderr=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stderr is not None
        for line in worker.stderr:
            if line.rstrip().endswith(": ready"):
                break
        assert at.owner().pid == worker.pid
        (at.mnt / "file").write_text("x")
        worker.send_signal(signal.SIGINT)
        worker.stderr.read()
        assert worker.wait(30) == 0
    assert not os.path.ismount(at.mnt)
    assert not (at.diff / "log").exists()


def test_pid_file(at: Place) -> None:
    path = at.root / "pid"
    at.mount("--pid-file", path)
    assert path.read_text() == f"{at.owner().pid}\n"
    run_pbkfs("unmount", "-D", at.mnt)
    assert not path.exists()


def test_what_took_the_place_of_the_pid_file_stays(at: Place) -> None:
    path = at.root / "pid"
    for put in (os.mkfifo, Path.mkdir, lambda path: path.write_bytes(b"\xff" * 100)):
        at.mount("--pid-file", path)
        worker = at.owner()
        path.unlink()
        put(path)
        run_pbkfs("unmount", "-D", at.mnt, "--timeout", "20")
        assert not worker.is_alive()
        assert path.exists()
        shutil.rmtree(at.diff)
        path.rmdir() if path.is_dir() else path.unlink()


def test_fifo_in_the_place_of_the_log(at: Place) -> None:
    path = at.root / "here.log"
    at.mount("--log-file", path)
    path.unlink()
    os.mkfifo(path)
    run_pbkfs("unmount", "-D", at.mnt, "--timeout", "20")
    assert path.is_fifo()


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no privilege to give up")
def test_worker_keeps_of_root_what_it_needs(at: Place) -> None:
    at.mount()
    kept = sum(1 << number for number in privileges.KEPT.values())
    for task in Path(f"/proc/{at.owner().pid}/task").iterdir():
        text = (task / "status").read_text()
        found = dict(re.findall(r"^(Cap\w+|NoNewPrivs):\t(\w+)$", text, re.MULTILINE))
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert int(found[name], 16) & ~kept == 0, (task.name, found)
        assert found["NoNewPrivs"] == "1"
    run_pbkfs("unmount", "-D", at.mnt)


def test_json_log_in_a_file_of_choice(at: Place) -> None:
    path = at.root / "here.log"
    at.mount("--log-file", path, "--log-format", "json", "--debug")
    run_pbkfs("unmount", "-D", at.mnt)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"ready", f"unmounted {at.mnt}"} <= {entry["message"] for entry in entries}
    assert not (at.diff / "log" / "worker.log").exists()


class Held:
    """A mount whose worker waits, all but ready, for a reader of a fifo."""

    def __init__(self, at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at = at
        self.fifo = at.root / "fifo"
        os.mkfifo(self.fifo)
        site = at.root / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "from pathlib import Path\nfrom pbkfs.mount import process\n"
            f"def held(path, pid): Path({str(self.fifo)!r}).write_text(str(pid))\n"
            "process.write_pid_file = held\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT}")

    def wait_until_mounted(self) -> None:
        deadline = time.monotonic() + 30
        while not any(row["mountpoint"] == str(self.at.mnt) for row in mine(self.at)):
            assert time.monotonic() < deadline
        assert self.at.owner().is_alive()

    def let_go(self) -> None:
        """Let the worker get ready; then unmount."""
        assert self.fifo.read_text() == str(self.at.owner().pid)
        run_pbkfs("unmount", "-D", self.at.mnt)


def test_timeout_is_no_failure(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(at, monkeypatch)
    done = at.mount("--timeout", "0.5")
    assert done.returncode == 0
    assert done.stdout.endswith(f"is still in progress (pid {at.owner().pid})\n")
    held.wait_until_mounted()
    held.let_go()


def test_interrupt_ends_the_wait_only(at: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(at, monkeypatch)
    arguments = ["--empty", "-D", str(at.mnt), "-d", str(at.diff)]
    arguments += ["--owner", str(os.geteuid())]
    with subprocess.Popen(
        [sys.executable, "-m", "pbkfs", "mount", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as command:
        held.wait_until_mounted()
        command.send_signal(signal.SIGINT)
        out, err = command.communicate(timeout=30)
    assert command.returncode == 0, err
    assert err == f"no longer waiting; the worker goes on (pid {at.owner().pid})\n"
    assert out == ""
    held.let_go()


def test_full_catalog_of_one_instance(at: Place, catalog_store: object) -> None:
    store = catalog_store("a_full_none_stream")  # type: ignore[operator]
    done = at.mount("-B", store, "-i", "latest", "--wait")
    assert re.fullmatch(rf"mounted backup \w+ of instance \w+ in {store} on .*\n", done.stdout)
    assert (at.mnt / "PG_VERSION").read_text() == "15\n"
    (row,) = mine(at)
    assert row["base"]["store"] == str(store)  # type: ignore[index]
    run_pbkfs("unmount", "-D", at.mnt)
    at.mount("--reuse", "-i", str(row["base"]["backup_id"]).lower())  # type: ignore[index]
    run_pbkfs("unmount", "-D", at.mnt)
    done = at.mount("-B", store, "-i", "AAAAAA", check=False)
    assert done.returncode == 7
    shutil.rmtree(at.diff)


_MOUNT_AGAIN = """
import os, signal, sys
from pathlib import Path
from pbkfs.mount import ending, launch
from pbkfs.mount.opening import open_mount
from pbkfs.mount.request import MountRequest
mnt, diff = map(Path, sys.argv[1:])
owner = os.geteuid(), os.getegid()
for _ in range(2):
    n_open = len(os.listdir("/proc/self/fd"))
    request = MountRequest(mnt, diff, 1 << 20, is_empty=True, owner=owner)
    opened = open_mount(request)
    launched = launch.start_worker(opened, foreign=set(), wait=True, timeout_s=None)
    assert launched.state == "ready"
    assert len(os.listdir("/proc/self/fd")) == n_open
    os.kill(launched.pid, signal.SIGKILL)
    ending.unmount(mnt, diff, force=True)
"""


def test_who_has_mounted_keeps_nothing_of_the_mount(at: Place) -> None:
    """Another process serves; when it is gone, the same one has to be able to mount again."""
    command = [sys.executable, "-c", _MOUNT_AGAIN, at.mnt, at.diff]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
