"""Without root: mounted by fusermount3, served and unmounted as an ordinary user.

Run by root, these tests become the user ``nobody`` in a mount namespace of their own, in which
/dev/fuse is open to everybody, as it is on most machines.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fix_mounts import needs_takeovers
from fix_place import Place
from machine import ROOT, mounts_of, open_to_everybody, own_mounts

from pbkfs import errors

UID = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, as root only can")

Run = Callable[..., subprocess.CompletedProcess[str]]


class UserPlace(Place):
    """A place in a mount namespace of its own, used by an ordinary user."""

    def __init__(self, root: Path, namespace: int) -> None:
        super().__init__(root)
        root.chmod(0o777)
        self.mnt.chmod(0o777)
        os.chown(self.mnt, UID, UID)
        enter, *where = mounts_of(namespace)
        self.enter = [found(enter), *where]
        self.become = [found("setpriv"), f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]

    def as_root(self, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace."""
        return subprocess.run(
            [*self.enter, *args],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **env},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )

    def pbkfs(self, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command of pbkfs as the user."""
        return self.as_root(*self.become, sys.executable, "-m", "pbkfs", *args, **env)

    def sh(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script as the user."""
        return self.as_root(*self.become, "sh", "-ec", script, "sh", self.mnt)

    def close(self) -> None:
        """Leave no worker behind; the mounts end with their namespace."""
        command = [sys.executable, "-m", "pbkfs", "unmount", "-D", self.mnt, "--force"]
        self.as_root(*command, "--timeout", "5")


def found(program: str) -> str:
    """Return where a program is: tests change PATH."""
    path = shutil.which(program)
    assert path is not None, f"{program} is missing"
    return path


@pytest.fixture
def user_at(place: Path) -> Iterator[UserPlace]:
    """A place of the user nobody."""
    with subprocess.Popen(
        [*own_mounts(), "sh", "-ec", f"{open_to_everybody(place)}; echo ready; exec sleep 600"],
        cwd="/",
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"ready\n"
            made = UserPlace(place, holder.pid)
            yield made
            made.close()
        finally:
            holder.kill()


def test_life_of_a_users_mount(user_at: UserPlace) -> None:
    base = ["--empty", "-D", user_at.mnt, "-d", user_at.diff]
    done = user_at.pbkfs("mount", *base, "--wait")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert user_at.owner().uid == UID
    for task in Path(f"/proc/{user_at.owner().pid}/task").iterdir():
        held = re.findall(
            r"^Cap(?:Inh|Prm|Eff|Amb):\t(\w+)$", (task / "status").read_text(), re.MULTILINE
        )
        assert [int(mask, 16) for mask in held] == [0] * 4, task.name
    done = user_at.sh('echo hello > "$1/file"; mkdir "$1/dir"; stat -c "%a %u %g" "$1"')
    assert done.stdout == f"700 {UID} {UID}\n"
    # Not shown to others, not even to root.
    hidden = user_at.as_root("ls", user_at.mnt)
    assert "Permission denied" in hidden.stderr
    assert str(user_at.mnt) in user_at.pbkfs("list").stdout
    assert "alive" in user_at.pbkfs("list").stdout
    assert user_at.pbkfs("stat", "-D", user_at.mnt).returncode == 0
    assert user_at.pbkfs("unmount", "-D", user_at.mnt).returncode == 0
    assert user_at.pbkfs("mount", "-D", user_at.mnt, "-d", user_at.diff).returncode == 0
    assert user_at.sh('cat "$1/file"').stdout == "hello\n"


@pytest.mark.expect_log("died of signal 9|was replaced")
@needs_takeovers
def test_worker_of_a_users_mount_dies(user_at: UserPlace) -> None:
    """Nobody needs root to go on."""
    base = ["--empty", "-D", user_at.mnt, "-d", user_at.diff, "--supervised"]
    assert user_at.pbkfs("mount", *base, "--wait").returncode == 0
    script = 'cd "$1"; echo before > file; rm -f gone; exec 3> gone; rm gone; echo ready; '
    script += "read word; echo $word > file; echo open >&3; cat file; cd /"
    holder = subprocess.Popen(
        [*user_at.enter, *user_at.become, "sh", "-ec", script, "sh", str(user_at.mnt)],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        before = json.loads(user_at.pbkfs("stat", "-D", user_at.mnt, "--format", "json").stdout)
        os.kill(before["pid"], signal.SIGKILL)
        said, _ = holder.communicate("after\n", timeout=60)
        assert said == "after\n"
        assert holder.returncode == 0
    done = user_at.pbkfs("upgrade", "-D", user_at.mnt)
    assert done.returncode == 0, done.stderr
    assert user_at.sh('cat "$1/file"').stdout == "after\n"
    assert user_at.pbkfs("unmount", "-D", user_at.mnt).returncode == 0
    assert user_at.pbkfs("check", "-d", user_at.diff).returncode == 0


JOURNALD = """
import os, socket
os.makedirs("/run/systemd/journal")
server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.bind("/run/systemd/journal/socket")
os.chmod("/run/systemd/journal/socket", 0o666)
print("ready", flush=True)
while True:
    data = server.recv(65536).decode()
    print(repr(data), flush=True)
    if "MESSAGE=unmounted" in data:
        break
"""


def test_log_goes_to_the_journal(user_at: UserPlace) -> None:
    user_at.as_root("mount", "-t", "tmpfs", "none", "/run")
    command = [*user_at.enter, sys.executable, "-c", JOURNALD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as journald:
        try:
            assert journald.stdout is not None
            assert journald.stdout.readline() == "ready\n"
            done = user_at.pbkfs(
                "mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff, "--log-sink", "journald"
            )
            assert done.returncode == 0, done.stderr
            user_at.pbkfs("unmount", "-D", user_at.mnt)
            lines = journald.stdout.read()
        finally:
            journald.kill()
    assert "MESSAGE=ready\\n" in lines
    assert "SYSLOG_IDENTIFIER=pbkfs\\n" in lines
    assert "PRIORITY=6\\n" in lines
    assert not (user_at.diff / "log").exists()


def test_busy_mount_is_refused(user_at: UserPlace) -> None:
    user_at.pbkfs("mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff)
    script = 'cd "$1"; echo inside; exec sleep 600'
    with subprocess.Popen(
        [*user_at.enter, *user_at.become, "sh", "-ec", script, "sh", user_at.mnt],
        stdout=subprocess.PIPE,
    ) as sleeper:  # fmt: skip
        assert sleeper.stdout is not None
        assert sleeper.stdout.readline() == b"inside\n"
        done = user_at.pbkfs("unmount", "-D", user_at.mnt)
        sleeper.kill()
    assert done.returncode == errors.BusyError.exit_code
    assert f"pid {sleeper.pid} (sleep)" in done.stderr
    assert user_at.pbkfs("unmount", "-D", user_at.mnt).returncode == 0


@pytest.mark.parametrize("how", ["unmount", "mount"])
def test_dead_mount(user_at: UserPlace, how: str) -> None:
    user_at.pbkfs("mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff)
    user_at.kill()
    assert "not connected" in user_at.sh('ls "$1"').stderr
    assert "dead" in user_at.pbkfs("list").stdout
    if how == "unmount":
        assert user_at.pbkfs("unmount", "-D", user_at.mnt).returncode == 0
    done = user_at.pbkfs("mount", "-D", user_at.mnt, "-d", user_at.diff)
    assert done.returncode == 0, done.stderr
    assert user_at.sh('ls "$1"').returncode == 0


def test_force_and_signals(user_at: UserPlace) -> None:
    user_at.pbkfs("mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff)
    os.kill(user_at.owner().pid, signal.SIGSTOP)
    done = user_at.pbkfs("unmount", "-D", user_at.mnt, "--force", "--timeout", "0.5")
    assert done.returncode == 0, done.stderr
    assert str(user_at.mnt) not in user_at.pbkfs("list").stdout


def test_allow_other_is_not_permitted(user_at: UserPlace) -> None:
    if "\nuser_allow_other" in Path("/etc/fuse.conf").read_text():
        pytest.skip("this machine permits it")
    done = user_at.pbkfs("mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff, "--allow-other")
    assert done.returncode == errors.HostError.exit_code
    assert "allow_other is not permitted" in done.stderr
    assert "user_allow_other" in done.stderr.splitlines()[1]
    assert not user_at.diff.exists()


def test_no_fusermount3(user_at: UserPlace) -> None:
    done = user_at.pbkfs(
        "mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff, PATH="/nonexistent"
    )
    assert done.returncode == errors.HostError.exit_code, done.stderr
    assert "fusermount3 is not installed" in done.stderr
    assert not user_at.diff.exists()


def test_files_of_somebody_else(user_at: UserPlace) -> None:
    done = user_at.pbkfs(
        "mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff, "--owner", "1:1"
    )
    assert done.returncode == errors.HostError.exit_code
    assert f"files of owner 1:1 cannot be made by user {UID}" in done.stderr
    assert not user_at.diff.exists()


def test_mount_point_of_somebody_else(user_at: UserPlace) -> None:
    os.chown(user_at.mnt, 0, 0)
    user_at.mnt.chmod(0o755)
    done = user_at.pbkfs("mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff)
    assert done.returncode == errors.HostError.exit_code
    assert "is not writable for this user" in done.stderr
    user_at.mnt.chmod(0o700)
    done = user_at.pbkfs("mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff)
    assert done.returncode == errors.HostError.exit_code
    assert "permission denied" in done.stderr


def test_diff_where_the_user_may_not_write(user_at: UserPlace) -> None:
    user_at.root.chmod(0o755)
    done = user_at.pbkfs("mount", "--empty", "-D", user_at.mnt, "-d", user_at.diff)
    assert done.returncode == errors.HostError.exit_code
    assert f"cannot write to {user_at.root}: permission denied" in done.stderr


def test_roots_mount_belongs_to_root(user_at: UserPlace) -> None:
    command = [sys.executable, "-m", "pbkfs", "mount", "--empty", "--owner", f"{UID}"]
    done = user_at.as_root(*command, "-D", user_at.mnt, "-d", user_at.diff)
    assert done.returncode == 0, done.stderr
    assert user_at.sh('echo x > "$1/file"').returncode == 0
    for verb in ("stat", "unmount"):
        done = user_at.pbkfs(verb, "-D", user_at.mnt)
        assert done.returncode == errors.HostError.exit_code
        assert "belongs to another user" in done.stderr
    assert str(user_at.mnt) in user_at.pbkfs("list").stdout


def test_branches_of_a_user(user_at: UserPlace, place: Path) -> None:
    """Trunk, branch, branch of a branch, reset and destroy; all of it the user's own."""
    (place / "data").mkdir()
    os.chown(place / "data", UID, UID)
    env = {
        "PBKFS_DATA_DIR": str(place / "data" / "pbkfs"),
        "PBKFS_RUN_DIR": str(place / "data" / "run"),
        "PBKFS_DEFAULT_TRUNK_PORT": "31432",
        "PBKFS_PORT_RANGE_START": "31500",
        "PBKFS_PORT_RANGE_END": "31509",
        "HOME": str(place / "data"),
        "XDG_STATE_HOME": str(place / "data" / "state"),
    }

    def pb(*args: str) -> str:
        done = user_at.pbkfs(*args, **env)
        assert done.returncode == 0, (args, done.stdout, done.stderr)
        return done.stdout

    try:
        pb("branch", "create", "a")  # makes the trunk main
        pb("branch", "create", "b", "--from", "a")
        assert pb("branch", "list", "--tree").count("running") == 3
        pb("branch", "reset", "b", "--yes")
        pb("branch", "stop", "a")
        assert pb("branch", "connect", "b", "--uri").startswith("postgresql://postgres:")
        owners = {path.stat().st_uid for path in (place / "data" / "pbkfs").glob("*/*")}
        assert owners == {UID}
    finally:
        user_at.pbkfs("branch", "destroy", "a", "-r", "--yes", **env)
        user_at.pbkfs("trunk", "stop", "main", **env)
