"""Trunks: made from nothing, a backup, a directory or a running server; the roots of all branches.

Blocking, any thread. What a crash leaves is finished or undone by ``reconcile``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import locale
import os
import pwd
import re
import secrets
import shutil
import subprocess
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from pbkfs.branch.branches import Branches
from pbkfs.branch.engine import BaseSource
from pbkfs.branch.errors import ProtectedError, WrongStateError
from pbkfs.branch.lifecycle import Lifecycle, Say, ignore_begin, say_nothing
from pbkfs.branch.names import check_name
from pbkfs.branch.ports import assign_port
from pbkfs.branch.settings import MAIN
from pbkfs.branch.store import Head, now
from pbkfs.branch.views import HeadView
from pbkfs.errors import HostError, PostgresError, UsageError
from pbkfs.mount.binding import read_binding
from pbkfs.postgres.account import Account, account_of, owner_of, write_for
from pbkfs.postgres.binaries import Binaries, find_binaries, read_binaries
from pbkfs.postgres.configuration import read_configuration
from pbkfs.postgres.network import make_run_directory, remove_run_directory
from pbkfs.postgres.query import quote_identifier

_NEWEST_MAJOR, _OLDEST_MAJOR = 18, 14
_LEVELS = ("minimal", "replica", "logical")
# pg_basebackup -P: "  24531/ 98765 kB (24%), 0/1 tablespace".
_PROGRESS = re.compile(rb"(\d+)/\s*(\d+) kB")


@dataclass(frozen=True, slots=True)
class TrunkSource:
    """What a new trunk is to be made from; all empty: a new cluster."""

    store: Path | None = None
    instance: str | None = None
    backup_id: str | None = None
    directory: Path | None = None
    url: str | None = None
    pg_major: int | None = None
    """Of a new cluster; None: the newest that is installed."""

    def describe(self) -> str:
        """Return it in words; without a password."""
        if self.store:
            return f"backup {self.backup_id or 'latest'} of {self.instance or self.store}"
        if self.directory:
            return f"directory {self.directory}"
        if self.url:
            return f"server {mask_url(self.url)}"
        return "empty"


class Trunks:
    """The operations on trunks."""

    def __init__(self, lifecycle: Lifecycle, branches: Branches) -> None:
        self._life = lifecycle
        self._branches = branches
        branches.make_main = self.make_main

    # --- making ---------------------------------------------------------------------------------

    def make_main(self, say: Say = say_nothing) -> None:
        """Make the default trunk, an empty cluster, if there is none."""
        if self._life.store.find(MAIN) is None:
            self.create(MAIN, TrunkSource(), say=say)

    def create(
        self,
        name: str,
        source: TrunkSource,
        *,
        port: int | None = None,
        wal_level: str | None = None,
        auth: Literal["password", "trust"] = "password",
        owner: tuple[int, int] | None = None,
        start: bool | None = None,
        begun: Callable[[Head], None] = ignore_begin,
        say: Say = say_nothing,
    ) -> HeadView:
        """Make a trunk and, unless told otherwise, start it; a failure leaves nothing behind.

        ``begun`` is told the new head once it has its place and, if it is to run, its port.
        ``port`` is kept for its life; None takes the default one or the next that is free.
        ``owner`` (uid, gid) runs the server; only root may choose; the default is the settings'.
        Raises PbkfsError.
        """
        life = self._life
        check_name(name)
        starts = life.settings.trunk_auto_start if start is None else start
        owner = owner or life.settings.owner
        head = Head(
            id=str(uuid.uuid4()),
            name=name,
            kind="trunk",
            parent_id=None,
            status="creating",
            operation="create",
            engine=life.engine.name,
            source=source.describe(),
            pg_user=life.settings.pg_user,
            pg_database=life.settings.pg_database,
            auth=auth,
            wal_level=wal_level or life.settings.wal_level,
            port=port or 0,
            created_at=now(),
        )
        with life.locks.hold(head.id, what=f"trunk {name!r}"):
            with life.store.transaction() as tx:
                tx.check_name_is_free(name)
                tx.insert(head)
                tx.record(head, "created", source.describe())
                if starts:
                    assign_port(tx, head, life.settings, life.serving.is_port_free)
            head = life.reload(head)
            begun(head)
            try:
                self._fill(head, source, owner, say)
                if wal_level is None:
                    self._keep_wal_level(head)
                if starts:
                    say("starting PostgreSQL")
                    # Its source may have taken minutes, in which another program took the port.
                    head = life.bring_up(head, say, is_new=True, may_move=port is None)
                else:
                    life.engine.unmount(head.id)
                    life.store.update(head.id, status="stopped", operation="", is_wanted=0)
            except BaseException as error:
                life.undo_creation(head, error)
                raise
        return life.view_one(life.reload(head))

    def _fill(
        self, head: Head, source: TrunkSource, owner: tuple[int, int] | None, say: Say
    ) -> None:
        """Make the data of a new trunk; mounted afterwards."""
        engine = self._life.engine
        base = BaseSource(owner=owner)
        if source.store is not None:
            base = dataclasses.replace(
                base, store=source.store, instance=source.instance, backup_id=source.backup_id
            )
        elif source.directory is not None:
            base = dataclasses.replace(base, directory=source.directory)
        elif source.url is not None:
            self._copy_server(head, source.url, owner, say)
            base = dataclasses.replace(base, directory=self._life.layout.backup(head.id))
        else:
            self._init(head, source.pg_major, owner, say)
            return
        say("mounting")
        engine.create(head.id, base)
        self._note_version(head)

    def _keep_wal_level(self, head: Head) -> None:
        """Let a trunk that is mounted have no lower wal_level than its data was made with."""
        found = read_configuration(self._life.layout.mount(head.id)).get("wal_level")
        self._life.store.update(head.id, wal_level=_higher_level(head.wal_level, found))

    def _note_version(self, head: Head) -> None:
        cluster = self._life.serving.cluster(head)
        self._life.store.update(head.id, pg_version=str(cluster.major))

    def _init(self, head: Head, major: int | None, owner: tuple[int, int] | None, say: Say) -> None:
        """Make an empty cluster, in a mount like every other."""
        life = self._life
        binaries = self._find_binaries(major)
        life.engine.create(head.id, BaseSource(is_empty=True, owner=owner))
        data_dir = life.layout.mount(head.id)
        account = owner_of(data_dir)
        if account.uid == 0:
            raise HostError(
                "there is no user who could run the server: no postgres on this host",
                hint="Name one with --owner USER, or PBKFS_OWNER.",
            )
        say(f"making a cluster of PostgreSQL {binaries.version}")
        # A password, though nobody knows it: the cluster's own pg_hba.conf is to be a safe one.
        run_dir = make_run_directory(data_dir, account)
        password_file = run_dir / "pg_hba.conf"
        try:
            write_for(account, password_file, secrets.token_urlsafe(24).encode())
            command: list[str | Path] = [
                binaries.bindir / "initdb", "-D", data_dir, "-U", head.pg_user, "-E", "UTF8",
                f"--locale={_choose_locale()}", "--data-checksums", "--no-sync",
                "--auth-local=peer", "--auth-host=scram-sha-256", f"--pwfile={password_file}",
            ]  # fmt: skip
            _run(command, account, "initdb")
            if head.pg_database not in ("postgres", "template1"):
                _make_database(binaries, data_dir, account, head.pg_database)
        finally:
            remove_run_directory(data_dir, account)
        # The second mount takes WAL out of the file system.
        life.engine.unmount(head.id)
        life.engine.mount(head.id)
        life.store.update(head.id, pg_version=binaries.version, bindir=str(binaries.bindir))

    def _find_binaries(self, major: int | None) -> Binaries:
        bindir = self._life.settings.pg_bin_dir
        if major is not None:
            return find_binaries(major, bindir)
        if bindir is not None:
            found = read_binaries(bindir)
            if found is not None:
                return found
        for candidate in range(_NEWEST_MAJOR, _OLDEST_MAJOR - 1, -1):
            with contextlib.suppress(PostgresError):
                return find_binaries(candidate, bindir)
        raise PostgresError(
            f"no PostgreSQL from {_OLDEST_MAJOR} to {_NEWEST_MAJOR} on this host",
            hint="Install one, or name its bin directory with PBKFS_PG_BIN_DIR.",
        )

    def _copy_server(self, head: Head, url: str, owner: tuple[int, int] | None, say: Say) -> None:
        """Take a pg_basebackup of a running server into DATA/backups."""
        binaries = self._find_binaries(None)
        program = binaries.tool("pg_basebackup")
        if program is None:
            raise PostgresError(
                f"no pg_basebackup in {binaries.bindir}", hint="Install PostgreSQL's client tools."
            )
        target = self._life.layout.backup(head.id)
        account = _default_account(owner)
        target.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(target, account.uid, account.gid)
        # Everybody may read the command lines of all processes.
        address, password = split_password(url)
        command: list[str | Path] = [
            program, "-d", address, "-D", target, "-c", "fast", "-X", "stream", "-P",
            "--no-password",
        ]  # fmt: skip
        secret = {} if password is None else {"PGPASSWORD": password}
        try:
            _run_with_progress(command, account, secret, mask_url(url), say)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise

    # --- reading --------------------------------------------------------------------------------

    def list_all(self) -> list[HeadView]:
        """Return all trunks, oldest first."""
        return self._life.view("trunk")

    def info(self, name: str) -> HeadView:
        """Return one trunk. Raises UnknownHeadError."""
        return self._life.view_one(self._life.find(name, "trunk"))

    # --- changing -------------------------------------------------------------------------------

    def start(self, name: str, *, port: int | None = None, say: Say = say_nothing) -> HeadView:
        """Start a trunk; one that runs is left as it is."""
        with self._life.locked(name, "trunk") as head:
            if port is not None and head.status != "running":
                self._life.store.update(head.id, port=port)
                head = self._life.reload(head)
            head = self._life.start(head, say)
        return self._life.view_one(head)

    def stop(self, name: str) -> HeadView:
        """Stop a trunk; its branches go on."""
        with self._life.locked(name, "trunk") as head:
            head = self._life.stop(head)
        return self._life.view_one(head)

    def restart(self, name: str, say: Say = say_nothing) -> HeadView:
        """Stop a trunk and start it again."""
        with self._life.locked(name, "trunk") as head:
            head = self._life.start(self._life.stop(head), say)
        return self._life.view_one(head)

    def flatten(self, name: str, say: Say = say_nothing) -> HeadView:
        """Fold all sealed layers below a trunk into one."""
        return self._branches.flatten(name, "trunk", say=say)

    def destroy(self, name: str, *, recursive: bool = False, say: Say = say_nothing) -> list[str]:
        """Remove a trunk and, if told so, its branches; returns the names of what is gone.

        Raises ProtectedError for the default trunk, HasChildrenError.
        """
        if name == MAIN:
            self._life.find(name, "trunk")
            raise ProtectedError(f"trunk {name!r} is the default one and can't be destroyed")
        return self._branches.destroy(name, recursive=recursive, kind="trunk", say=say)

    def refresh(
        self,
        name: str,
        *,
        backup_id: str | None = None,
        directory: Path | None = None,
        say: Say = say_nothing,
    ) -> HeadView:
        """Put a trunk on a newer backup; its branches stay on what they were made from.

        What was changed on the trunk itself is lost. Raises UsageError for a trunk that was not
        made from a backup or directory, and whatever keeps the new one from being mounted: then
        the trunk is as it was.
        """
        life = self._life
        with life.locked(name, "trunk") as head:
            if head.status not in ("running", "stopped", "error"):
                raise WrongStateError(f"trunk {name!r} is {head.status}")
            base = self._next_base(head, backup_id, directory)
            new_id = str(uuid.uuid4())
            life.store.update(head.id, operation="refresh", pending_id=new_id)
            fresh = dataclasses.replace(head, id=new_id)
            was_wanted = head.is_wanted
            try:
                say("mounting")
                life.engine.create(new_id, base)
                major = life.serving.cluster(fresh).major
                said = read_configuration(life.layout.mount(new_id)).get("wal_level")
                wal_level = _higher_level(head.wal_level, said)
                life.engine.unmount(new_id)
                source = _describe_base(life.layout.head(new_id)) or head.source
                life.take_down(head)
            except BaseException:
                life.engine.destroy(new_id)
                life.store.update(head.id, operation="", pending_id="")
                raise
            with life.store.transaction() as tx:
                tx.remove_point(head.id)
                tx.update(
                    head.id, id=new_id, pending_id=head.id, status="stopped", source=source,
                    pg_version=str(major), bindir="", server_pid=0, server_ticks=0,
                    started_at=None, wal_level=wal_level,
                )  # fmt: skip
                tx.record(fresh, "refreshed", source)
            head = self.finish_refresh(fresh)
            if was_wanted:
                head = life.bring_up(head, say)
        return life.view_one(head)

    def finish_refresh(self, head: Head) -> Head:
        """Remove what a refresh has replaced, or what it had not got to use."""
        life = self._life
        head = life.reload(head)
        if head.pending_id:
            old = life.layout.secret(head.pending_id)
            if old.exists():
                old.replace(life.layout.secret(head.id))
            life.engine.destroy(head.pending_id)
            life.store.update(head.id, operation="", pending_id="")
            life.collect()
        return life.reload(head)

    def _next_base(self, head: Head, backup_id: str | None, directory: Path | None) -> BaseSource:
        bound = read_binding(self._life.layout.head(head.id))
        if bound is None or (bound.base.kind == "empty" and directory is None):
            raise UsageError(
                f"trunk {head.name!r} was not made from a backup, so there is no newer one",
                hint="Make another trunk with pbkfs trunk create --from-backup.",
            )
        if directory is not None:
            return BaseSource(directory=directory, owner=bound.owner)
        if bound.base.kind != "probackup" or bound.base.store is None:
            raise UsageError(
                f"trunk {head.name!r} was made from {bound.base}",
                hint="Name the newer copy with --from-dir.",
            )
        return BaseSource(
            store=Path(bound.base.store),
            instance=bound.base.instance,
            backup_id=backup_id or "latest",
            owner=bound.owner,
        )


def _higher_level(mine: str, other: str) -> str:
    """Return the higher one of two values of wal_level; what is no level is lower than each."""
    return other if other in _LEVELS[_LEVELS.index(mine) :] else mine


def _describe_base(head: Path) -> str:
    bound = read_binding(head)
    return str(bound.base) if bound is not None else ""


def mask_url(url: str) -> str:
    """Return a connection string without its password."""
    url = re.sub(r"(//[^:/@?]*:)[^@/?]*@", r"\1***@", url)
    return re.sub(r"(password\s*=\s*)('(?:[^'\\]|\\.)*'|[^\s&]*)", r"\1***", url)


_PASSWORDS = (
    re.compile(r"(?<=//)(?P<before>[^:/@?]*):(?P<value>[^@/?]*)(?=@)"),
    re.compile(r"(?P<before>[?&])password=(?P<value>[^&]*)&?"),
    re.compile(r"(?P<before>^|\s)password\s*=\s*(?P<word>'(?:[^'\\]|\\.)*'|(?:[^\s\\]|\\.)*)"),
)


def split_password(url: str) -> tuple[str, str | None]:
    """Return a connection string without its password, and that.

    Source: src/interfaces/libpq/fe-connect.c, conninfo_uri_parse and conninfo_parse.
    """
    is_uri = url.startswith(("postgresql://", "postgres://"))
    password = None
    for pattern in _PASSWORDS[:2] if is_uri else _PASSWORDS[2:]:
        found = pattern.search(url)
        if found is None:
            continue
        if is_uri:
            password = unquote(found["value"])
        else:
            password = re.sub(r"\\(.)", r"\1", re.sub(r"^'|'$", "", found["word"]))
        url = url[: found.start()] + found["before"] + url[found.end() :]
    return url, password


def _choose_locale() -> str:
    try:
        current = locale.setlocale(locale.LC_CTYPE)
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        locale.setlocale(locale.LC_CTYPE, current)
    except locale.Error:
        return "C"
    return "C.UTF-8"


def _default_account(owner: tuple[int, int] | None) -> Account:
    """Return who owns what is made here: the user asked for, postgres for root, else the caller."""
    if owner is not None:
        return account_of(*owner)
    if os.geteuid() != 0:
        return account_of(os.geteuid(), os.getegid())
    try:
        entry = pwd.getpwnam("postgres")
    except KeyError:
        raise HostError(
            "there is no user postgres on this host",
            hint="Name another one with --owner USER, or PBKFS_OWNER.",
        ) from None
    return account_of(entry.pw_uid, entry.pw_gid)


def _make_database(binaries: Binaries, data_dir: Path, account: Account, name: str) -> None:
    """Make a database in a cluster that is just made, without a server."""
    # Source: src/bin/initdb/initdb.c, which makes its own databases like this.
    command: list[str | Path] = [
        binaries.bindir / "postgres", "--single", "-D", data_dir, "-F", "-j",
        "-c", "exit_on_error=true", "template1",
    ]  # fmt: skip
    statement = f"CREATE DATABASE {quote_identifier(name)};\n\n"
    _run(command, account, f"making database {name!r}", statement.encode())


def _run(command: list[str | Path], account: Account, what: str, said: bytes = b"") -> None:
    done = subprocess.run(
        command,
        cwd="/",
        env={**account.environment(), "LC_ALL": "C"},
        input=said,
        capture_output=True,
        check=False,
        umask=0o077,
        **account.popen_identity(),
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "nothing"
        why = next((line for line in lines if "error:" in line.lower()), last)
        raise PostgresError(f"{what} failed: {why.strip()}", hint="See what it needs above.")


def _run_with_progress(
    command: list[str | Path], account: Account, secret: dict[str, str], where: str, say: Say
) -> None:
    """Run pg_basebackup; its progress goes to ``say``."""
    with subprocess.Popen(
        command,
        cwd="/",
        env={**account.environment(), "LC_ALL": "C", **secret},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        umask=0o077,
        **account.popen_identity(),
    ) as child:
        assert child.stderr is not None
        said = b""
        try:
            while chunk := os.read(child.stderr.fileno(), 65536):
                said = (said + chunk)[-4096:]
                found = _PROGRESS.findall(chunk)
                if found:
                    done, total = map(int, found[-1])
                    say(f"copying: {done >> 10} of {total >> 10} MiB")
        except BaseException:
            child.terminate()
            raise
    if child.returncode != 0:
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        last = next((line for line in reversed(lines) if "error:" in line), "no message")
        raise PostgresError(
            f"cannot copy the server {where}: {last.strip()}",
            hint="It needs a role with REPLICATION, an entry for it in pg_hba.conf, and the "
            "password in ~/.pgpass or in the URL.",
        )
