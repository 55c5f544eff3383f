"""The keeper with workers that do nothing but die: whom it starts, what they get, when it ends."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from machine import ROOT

from pbkfs.errors import HostError
from pbkfs.mount import keeping

_SOON_S = 60.0

# A worker that says what it got, serves, and ends as a file tells it to.
_HEIR = """
import json, os, socket, sys, time
sock = socket.socket(fileno=3)
sock.send(b"warm\\0")
data, fds, _, _ = socket.recv_fds(sock, 65536, 16)
event, *words = data.decode().split("\\0")[:-1]
pairs = [word.split("=", 1) for word in words]
message = dict(pairs)
fds = dict(zip([value for name, value in pairs if name == "fd"], fds))
said = {"pid": os.getpid(), "event": event, "by": sys.argv[1],
        "n_takeovers": int(message["takeovers"]), "why": message["why"],
        "fuse": os.pread(fds["fuse"], 100, 0).decode()}
with open(sys.argv[2] + ".tmp", "w") as file:
    json.dump(said, file)
os.rename(sys.argv[2] + ".tmp", sys.argv[2])
%s
sock.send(b"serving\\0")
while not os.path.exists(sys.argv[2] + ".end"):
    time.sleep(0.01)
os._exit(int(open(sys.argv[2] + ".end").read()))
"""


def heir(place: Path, name: str = "first", *, before: str = "pass") -> list[str]:
    return [sys.executable, "-I", "-S", "-c", _HEIR % before, name, str(place / "said")]


@contextmanager
def kept(place: Path, command: list[str], worker: Callable[[keeping.Link], None]) -> Iterator[int]:
    """Run a keeper, whose first worker arms it and then does ``worker``; yields its pid."""
    fuse = place / "fuse"
    fuse.write_text("the connection")
    pid = os.fork()
    if pid == 0:
        try:
            link = keeping.become_keeper()
            fd = os.open(fuse, os.O_RDONLY)
            link.send("armed", {"fuse": fd}, command, log=str(place / "log"), style="text")
            worker(link)
        finally:
            os._exit(99)
    try:
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _SOON_S
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.01)


def hear(place: Path) -> dict[str, object]:
    """Wait for what the next worker says."""
    said = place / "said"
    wait_for(said.exists, "a new worker")
    found: dict[str, object] = json.loads(said.read_text())
    said.unlink()
    return found


def end_of(pid: int) -> int:
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the keeper be one with other limits."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")

    def limit(**limits: int) -> None:
        program = tmp_path / "pbkfs-keeper"
        words = [f"-D{name}={value}" for name, value in limits.items()]
        source = ROOT / "native" / "keeper" / "keeper.c"
        subprocess.run([compiler, *words, "-o", program, source], check=True)
        monkeypatch.setattr(keeping, "PROGRAM", str(program))

    return limit


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kill_self(_link: keeping.Link) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_workers_are_replaced_until_one_ends_well(tmp_path: Path) -> None:
    with kept(tmp_path, heir(tmp_path), kill_self) as keeper:
        said = hear(tmp_path)
        assert said["event"] == "go"
        assert said["fuse"] == "the connection"
        assert said["n_takeovers"] == 1
        assert "died of signal 9" in str(said["why"])
        time.sleep(1.1)  # more than the keeper takes for service
        os.kill(int(str(said["pid"])), signal.SIGKILL)
        again = hear(tmp_path)
        assert again["n_takeovers"] == 2
        assert again["pid"] != said["pid"]
        (tmp_path / "said.end").write_text("0")
        assert end_of(keeper) == 0


def test_death_is_seen_where_the_command_ignored_that_of_its_children(tmp_path: Path) -> None:
    """A signal that is ignored stays so in what is started."""

    def die_later(link: keeping.Link) -> None:
        wait_for(lambda: is_keeper(link.pid), "the keeper")
        time.sleep(0.2)
        kill_self(link)

    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with kept(tmp_path, heir(tmp_path), die_later) as keeper:
            signal.signal(signal.SIGCHLD, before)
            assert "died of signal 9" in str(hear(tmp_path)["why"])
            (tmp_path / "said.end").write_text("0")
            assert end_of(keeper) == 0
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_death_before_arming_is_no_matter() -> None:
    pid = os.fork()
    if pid == 0:
        keeping.become_keeper()
        os._exit(7)
    assert end_of(pid) == 7


def test_keeper_ends_with_a_worker_that_refuses(tmp_path: Path) -> None:
    command = heir(tmp_path, before=f"os._exit({keeping.EXIT_REFUSED})")
    with kept(tmp_path, command, kill_self) as keeper:
        assert end_of(keeper) == keeping.EXIT_REFUSED
    assert "nobody can take over" in (tmp_path / "log").read_text()


def test_keeper_gives_up_where_all_die_at_once(tmp_path: Path) -> None:
    command = heir(tmp_path, before="os._exit(1)")
    with kept(tmp_path, command, kill_self) as keeper:
        assert end_of(keeper) == 1
    assert "so did too many others" in (tmp_path / "log").read_text()


def test_keeper_gives_up_where_too_many_die_after_some_service(
    tmp_path: Path, limited: Callable[..., None]
) -> None:
    limited(SERVICE_MS=0, MAX_DEATHS_AN_HOUR=20)
    counted = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); sock.send(b'serving\\0'); "
    with kept(tmp_path, heir(tmp_path, before=counted + "os._exit(1)"), kill_self) as keeper:
        assert end_of(keeper) == 1
    assert "so did too many others" in (tmp_path / "log").read_text()
    assert (tmp_path / "count").read_text() == 20 * "x"


def test_keeper_does_not_wait_for_ever_for_a_worker(
    tmp_path: Path, limited: Callable[..., None]
) -> None:
    limited(TAKEOVER_LIMIT_MS=1000)
    command = heir(tmp_path, before=f"time.sleep({_SOON_S})")
    with kept(tmp_path, command, kill_self) as keeper:
        late = int(str(hear(tmp_path)["pid"]))
        assert end_of(keeper) == 1
        wait_for(lambda: has_ended(late), "its end")
    assert "did not take over in time" in (tmp_path / "log").read_text()


def test_program_before_is_tried_where_the_new_one_hangs(
    tmp_path: Path, limited: Callable[..., None]
) -> None:
    limited(TAKEOVER_LIMIT_MS=3000)

    def replace(link: keeping.Link) -> None:
        link.send("replace", command=heir(tmp_path, "second", before=f"time.sleep({_SOON_S})"))
        time.sleep(_SOON_S)

    with kept(tmp_path, heir(tmp_path), replace) as keeper:
        assert hear(tmp_path)["by"] == "second"
        assert hear(tmp_path)["by"] == "first"
        (tmp_path / "said.end").write_text("0")
        assert end_of(keeper) == 0


def test_replacement_takes_over_when_it_is_ready(tmp_path: Path) -> None:
    def replace(link: keeping.Link) -> None:
        link.send("replace", command=heir(tmp_path, "second"))
        time.sleep(_SOON_S)

    with kept(tmp_path, heir(tmp_path), replace) as keeper:
        said = hear(tmp_path)
        assert said["by"] == "second"
        assert "was replaced" in str(said["why"])
        (tmp_path / "said.end").write_text("0")
        assert end_of(keeper) == 0


def test_worker_stays_where_its_replacement_dies(tmp_path: Path) -> None:
    def replace(link: keeping.Link) -> None:
        link.send("replace", command=[sys.executable, "-c", "raise SystemExit(1)"])
        wait_for((tmp_path / "log").exists, "the keeper's word")
        os._exit(0)

    with kept(tmp_path, heir(tmp_path), replace) as keeper:
        assert end_of(keeper) == 0
    assert "was to replace it, but it died" in (tmp_path / "log").read_text()


def test_keeper_goes_back_to_the_program_before(tmp_path: Path) -> None:
    def replace(link: keeping.Link) -> None:
        link.send("replace", command=heir(tmp_path, "second", before="os._exit(1)"))
        time.sleep(_SOON_S)

    with kept(tmp_path, heir(tmp_path), replace) as keeper:
        wait_for(
            lambda: (tmp_path / "log").exists() and "going back" in (tmp_path / "log").read_text(),
            "the program before",
        )
        (tmp_path / "said").unlink(missing_ok=True)
        assert hear(tmp_path)["by"] == "first"
        (tmp_path / "said.end").write_text("0")
        assert end_of(keeper) == 0


def test_what_can_not_be_kept_can_not_be_taken_over(tmp_path: Path) -> None:
    """Half of it might be a mount that does not know of its write errors."""

    def send_more(link: keeping.Link) -> None:
        wait_for(lambda: is_keeper(link.pid), "the keeper")
        fuse = os.stat(tmp_path / "fuse")
        wait_for(lambda: has_open(link.pid, fuse), "the keeper is armed")
        used = {int(path.name) for path in Path(f"/proc/{link.pid}/fd").iterdir()}
        free = min(set(range(len(used) + 1)) - used)
        resource.prlimit(link.pid, resource.RLIMIT_NOFILE, (free, free))
        fd = os.open(tmp_path, os.O_RDONLY)
        link.send("added", {"objects-2": fd})
        kill_self(link)

    with kept(tmp_path, heir(tmp_path), send_more) as keeper:
        assert end_of(keeper) == keeping.EXIT_REFUSED
    assert not (tmp_path / "said").exists()


def test_connection_that_is_over_is_let_go(tmp_path: Path) -> None:
    """At once, and nobody takes over from a worker that dies after it."""

    def end(link: keeping.Link) -> None:
        link.send("over")
        wait_for(lambda: is_keeper(link.pid), "the keeper")
        fuse = os.stat(tmp_path / "fuse")
        wait_for(lambda: not has_open(link.pid, fuse), "the keeper lets go")
        (tmp_path / "let-go").touch()
        kill_self(link)

    with kept(tmp_path, heir(tmp_path), end) as keeper:
        assert end_of(keeper) == 1
    assert (tmp_path / "let-go").exists()
    assert not (tmp_path / "said").exists()


def has_open(pid: int, wanted: os.stat_result) -> bool:
    return any(os.path.samestat(path.stat(), wanted) for path in Path(f"/proc/{pid}/fd").iterdir())


@pytest.mark.parametrize("other", [signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM])
def test_signal_is_passed_on(tmp_path: Path, other: signal.Signals) -> None:
    """However early; what others mean to most programs is no reason to end a mount."""

    def await_signal(_link: keeping.Link) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        (tmp_path / "armed").touch()
        time.sleep(_SOON_S)

    with kept(tmp_path, heir(tmp_path), await_signal) as keeper:
        wait_for((tmp_path / "armed").exists, "the worker")
        wait_for(lambda: is_keeper(keeper), "the keeper")
        os.kill(keeper, other)
        os.kill(keeper, signal.SIGTERM)
        assert end_of(keeper) == 0


def is_keeper(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "pbkfs-keeper"


def test_signal_that_comes_early_is_passed_on() -> None:
    pid = os.fork()
    if pid == 0:
        # Before there is a program that could take it; a fork inherits no pending signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        os.kill(os.getpid(), signal.SIGTERM)
        keeping.become_keeper()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        time.sleep(_SOON_S)
        os._exit(1)
    assert end_of(pid) == 0


def test_command_that_is_not_there_counts_as_a_death(tmp_path: Path) -> None:
    with kept(tmp_path, [str(tmp_path / "gone")], kill_self) as keeper:
        assert end_of(keeper) == 1
    said = (tmp_path / "log").read_text()
    assert "a worker can't be started: No such file or directory" in said
    assert "so did too many others" in said


def test_another_worker_takes_over_while_a_replacement_gets_ready(tmp_path: Path) -> None:
    slow = [sys.executable, "-c", f"import time; time.sleep({_SOON_S})"]

    def replace(link: keeping.Link) -> None:
        link.send("replace", command=slow)
        kill_self(link)

    with kept(tmp_path, heir(tmp_path), replace) as keeper:
        assert hear(tmp_path)["by"] == "first"
        (tmp_path / "said.end").write_text("0")
        assert end_of(keeper) == 0


def test_file_systems_that_tell_of_write_errors(tmp_path: Path) -> None:
    """Of others a new worker would learn nothing; of overlayfs above all."""
    for path, answer in ((tmp_path, True), (Path("/dev/shm"), True), (Path("/proc"), False)):
        fd = os.open(path, os.O_RDONLY)
        assert keeping.tells_errors(fd) is answer, path
        os.close(fd)


@pytest.mark.parametrize("release", ["6.8.12", "6.9.0-1", "7.0"])
def test_old_kernels_have_no_keeper(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: type("Name", (), {"release": release})())
    if release != "6.8.12":
        keeping.check_host()
        return
    with pytest.raises(HostError, match=r"can't be supervised on Linux 6\.8\.12"):
        keeping.check_host()


def test_mount_without_the_program_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "PROGRAM", str(tmp_path / "gone"))
    with pytest.raises(HostError, match="can't be supervised without"):
        keeping.check_host()
