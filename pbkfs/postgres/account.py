"""The user who runs a server, and what that user can reach.

PostgreSQL refuses to run as root and insists on owning its PGDATA, so the owner of PGDATA is the
user of the server. Called by the command line before it has threads: ``Account.run`` forks.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pbkfs.errors import HostError, PostgresError


class PopenIdentity(TypedDict, total=False):
    """The arguments of ``subprocess.Popen`` that change the user of the child."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True)
class Account:
    """A user id with its groups. ``name`` is for messages: ``postgres`` or ``uid 1234``."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str
    home: str

    @property
    def is_caller(self) -> bool:
        """Whether the calling process already runs as this user."""
        return os.geteuid() == self.uid

    def popen_identity(self) -> PopenIdentity:
        """Return what makes a child process run as this user; nothing where it does anyway."""
        if self.is_caller:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": list(self.groups)}

    def environment(self) -> dict[str, str]:
        """Return the environment for this user's processes.

        Without ``PG*``: a PGPORT or PGDATA of the caller must not reach the server.
        """
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        if not self.is_caller:
            environment["HOME"] = self.home
            if not self.name.startswith("uid "):
                environment["USER"] = environment["LOGNAME"] = self.name
        return environment

    def become(self) -> None:
        """Turn the calling process into this user, for good. Raises OSError."""
        if not self.is_caller:
            os.setgroups(self.groups)
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)

    def run(self, function: Callable[[], str | None]) -> str | None:
        """Call ``function`` as this user and return its answer.

        In a forked child if the user is another one. Raises HostError if the child dies.
        """
        if self.is_caller:
            return function()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reader)
                self.become()
                answer = function()
                data = b"-" if answer is None else b"+" + os.fsencode(answer)
                while data:
                    data = data[os.write(writer, data) :]
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(child, 0)
        if status != 0 or not data:
            raise HostError(f"cannot act as {self.name} (uid {self.uid})")
        return None if data == b"-" else os.fsdecode(data[1:])


def owner_of(path: Path) -> Account:
    """Return the owner of ``path`` as an account. Raises OSError."""
    status = path.stat()
    return account_of(status.st_uid, status.st_gid)


def account_of(uid: int, gid: int) -> Account:
    """Return the account of ``uid``; ``gid`` counts only for a user that has no passwd entry."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Account(uid, gid, (gid,), f"uid {uid}", "/")
    groups = {entry.pw_gid, *os.getgrouplist(entry.pw_name, entry.pw_gid)}
    return Account(uid, entry.pw_gid, tuple(sorted(groups)), entry.pw_name, entry.pw_dir)


def check_can_serve(account: Account, data_dir: Path) -> None:
    """Raise unless the caller may run a server as ``account``, the owner of ``data_dir``."""
    if account.uid == 0:
        raise PostgresError(
            f"{data_dir} is owned by root, and PostgreSQL does not run as root",
            hint="Mount with --owner USER, or give the directory to an unprivileged user.",
        )
    if os.geteuid() not in (0, account.uid):
        raise PostgresError(
            f"{data_dir} is owned by {account.name}, and you are {_user_name(os.geteuid())}",
            hint=f"Run this as {account.name} or as root.",
        )


def find_obstacle(account: Account, path: Path, need: int = os.R_OK | os.X_OK) -> str | None:
    """Return why ``account`` cannot use ``path`` (absolute), or None if it can.

    ``need`` is what it wants from the path itself; every directory above must be searchable.
    """

    def look() -> str | None:
        for part in [*reversed(path.parents), path]:
            wanted = need if part == path else os.X_OK
            try:
                status = os.stat(part)
            except OSError as error:
                return f"{part}: {error.strerror}"
            if not os.access(part, wanted):
                mode = stat.S_IMODE(status.st_mode)
                owner = _user_name(status.st_uid)
                return f"{part} is closed to {account.name} (mode {mode:04o}, owner {owner})"
        return None

    return account.run(look)


def check_reachable(account: Account, path: Path, what: str, need: int = os.R_OK | os.X_OK) -> None:
    """Raise HostError unless ``account`` can use ``path``; ``what`` names it in the message."""
    obstacle = find_obstacle(account, path, need)
    if obstacle is not None:
        raise HostError(
            f"{account.name} cannot use {what}: {obstacle}",
            hint=f"Every directory down to {path} must let {account.name} pass (chmod o+x), "
            "and a FUSE mount must allow other users.",
        )


def write_for(account: Account, path: Path, data: bytes) -> None:
    """Write ``path`` anew, 0600, owned by ``account``. Raises HostError."""
    try:
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(data)
            if os.geteuid() == 0:
                os.fchown(file.fileno(), account.uid, account.gid)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}") from error


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def group_exists(name: str) -> bool:
    """Return whether this host knows the group ``name`` (or number)."""
    if name.isdigit():
        return True
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True
