"""Branches: made of a trunk or of another branch, taken back, renamed, removed.

Blocking, any thread. What a crash leaves is finished or undone by ``reconcile``.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import stat
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pbkfs.branch.durations import parse_idle_stop, parse_ttl
from pbkfs.branch.engine import Cloned
from pbkfs.branch.errors import (
    HasChildrenError,
    MaxBranchesError,
    MaxDepthError,
    NameConflictError,
    ParentNotFoundError,
    ParentNotReadyError,
    WrongStateError,
)
from pbkfs.branch.lifecycle import Lifecycle, Say, ignore_begin, say_nothing
from pbkfs.branch.limits import parse_limits
from pbkfs.branch.locks import LAYERS
from pbkfs.branch.names import check_name, check_tag, make_name
from pbkfs.branch.ports import assign_port
from pbkfs.branch.settings import MAIN
from pbkfs.branch.store import Head, Kind, Point, Transaction, format_time, now
from pbkfs.branch.views import Connection, HeadView, Log
from pbkfs.errors import PostgresError
from pbkfs.postgres.cgroup import Limits

# A CHECKPOINT of a busy server writes all that is dirty; it only makes the child's start shorter.
_CHECKPOINT_LIMIT_S = 600.0
# What a server writes without WAL, and what is no part of a cluster's state.
_VOLATILE = ("postmaster.pid", "postmaster.opts", "current_logfiles", "recovery.signal")


class Branches:
    """The operations on branches."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._life = lifecycle
        self.make_main: Callable[[Say], None] = say_nothing_at_all

    # --- making ---------------------------------------------------------------------------------

    def create(
        self,
        name: str | None = None,
        *,
        parent: str = MAIN,
        ttl: str | None = None,
        tags: Sequence[str] = (),
        auth: Literal["password", "trust"] = "password",
        idle_stop: str | None = None,
        cpu: str | None = None,
        memory: str | None = None,
        keep_failed: bool = False,
        begun: Callable[[Head], None] = ignore_begin,
        say: Say = say_nothing,
    ) -> HeadView:
        """Make a branch of the present state of ``parent`` and start it.

        Without a name it gets one. A failure leaves nothing behind, or with ``keep_failed`` the
        branch in the state error. ``begun`` is told the new head once it has its place and port:
        from then on it is there for everybody, in the state creating. Raises PbkfsError:
        InvalidNameError, NameConflictError, ParentNotFoundError, ParentNotReadyError,
        MaxBranchesError, MaxDepthError, InsufficientResourcesError and others.
        """
        life = self._life
        name = make_name() if name is None else _check_branch_name(name)
        lifetime = None if ttl is None else parse_ttl(ttl)
        idle_stop_s = None if idle_stop is None else parse_idle_stop(idle_stop)
        limits = parse_limits(cpu, memory)
        life.serving.cgroups.check(limits)
        tags = [check_tag(tag) for tag in tags]
        if life.store.find(parent) is None:
            if parent != MAIN:
                raise ParentNotFoundError(f"trunk or branch {parent!r} does not exist")
            say("making the default trunk")
            self.make_main(say)
        head_id = str(uuid.uuid4())
        with life.locks.hold(head_id, what=f"branch {name!r}"):
            try:
                with life.locked(parent) as source:
                    head = self._insert(
                        head_id, name, source, auth, lifetime, idle_stop_s, limits, tags
                    )
                    begun(head)
                    life.flatten_deep(source, say, n_more=1)
                    say(f"branching from {parent}")
                    with life.locks.hold(LAYERS, what="the layers", shared=True):
                        notes, has_replaced = self._clone(source, head)
                say("starting PostgreSQL")
                head = life.bring_up(life.reload(head), say, is_new=not keep_failed)
            except BaseException as error:
                found = life.store.get(head_id)
                if found is not None and not (keep_failed and found.status == "error"):
                    life.undo_creation(found, error)
                raise
        if has_replaced:
            life.collect(wait_s=0)
        return life.view_one(head, notes)

    def _insert(
        self,
        head_id: str,
        name: str,
        source: Head,
        auth: Literal["password", "trust"],
        lifetime: float | None,
        idle_stop_s: float | None,
        limits: Limits,
        tags: Sequence[str],
    ) -> Head:
        life = self._life
        life.check_is_whole(source)
        status = life.status_of(source)
        if status not in ("running", "stopped"):
            raise ParentNotReadyError(
                f"{source.kind} {source.name!r} is {status}",
                hint=f"Start it first: pbkfs {source.kind} start {source.name}",
            )
        head = Head(
            id=head_id,
            name=name,
            kind="branch",
            parent_id=source.id,
            status="creating",
            operation="create",
            engine=life.engine.name,
            pg_user=source.pg_user,
            pg_database=source.pg_database,
            pg_version=source.pg_version,
            bindir=source.bindir,
            auth=auth,
            # What runs on the source may need it: publications, and whoever dumps them.
            wal_level=source.wal_level,
            created_at=now(),
            expires_at=_moment_after(lifetime),
            idle_stop_s=idle_stop_s,
            cpu_limit=limits.cpus,
            memory_limit_bytes=limits.memory_bytes,
        )
        with life.store.transaction() as tx:
            self._check_limits(tx, head, source)
            tx.insert(head, tags)
            tx.record(head, "created", f"from {source.name}")
            # Now, so that it is refused before it costs anything where no port is left.
            assign_port(tx, head, life.settings, life.serving.is_port_free)
        return life.reload(head)

    def _check_limits(self, tx: Transaction, head: Head, source: Head) -> None:
        settings = self._life.settings
        tx.check_name_is_free(head.name)
        if len(tx.heads("branch")) >= settings.max_branches:
            raise MaxBranchesError(f"there are {settings.max_branches} branches already")
        if tx.depth(source) + 1 > settings.max_depth:
            raise MaxDepthError(
                f"{source.kind} {source.name!r} is {tx.depth(source)} levels deep, "
                f"and {settings.max_depth} is the limit"
            )

    def _clone(self, source: Head, head: Head) -> tuple[list[str], bool]:
        """Make the data of a new branch.

        Returns what the user should know, and whether the source has another newest point now.
        """
        life, has_replaced = self._life, False
        is_running = source.status == "running"
        began_at = time.time()
        if source.started_at is None and source.source != "empty" and source.kind == "trunk":
            cloned = life.engine.clone_point(source.id, head.id, "")
        else:
            with life.store.transaction() as tx:
                point = tx.point(source.id)
            if point is not None and self._is_current(source, point):
                cloned = life.engine.clone_point(source.id, head.id, point.point_id)
            else:
                lsn = self._checkpoint(source) if is_running else ""
                cloned = life.engine.clone(source.id, head.id)
                with life.store.transaction() as tx:
                    tx.set_point(Point(source.id, cloned.point, cloned.live_uuid, lsn, began_at))
                has_replaced = point is not None
        with life.store.transaction() as tx:
            tx.update(head.id, point_id=cloned.point)
            tx.record(source, "branched", _describe(head, cloned))
        return [cloned.note] if cloned.note else [], has_replaced

    def _checkpoint(self, source: Head) -> str:
        """Let the source write its dirty pages, so that the child starts quickly.

        Returns the server's position in WAL before the seal. Not needed for the child to be right,
        so a server that can't is none that can't be branched.
        """
        serving = self._life.serving
        try:
            serving.ask(source, "CHECKPOINT", timeout_s=_CHECKPOINT_LIMIT_S)
            return self._position(source)
        except PostgresError:
            return ""

    def _position(self, source: Head) -> str:
        rows = self._life.serving.ask(source, "SELECT pg_current_wal_insert_lsn()")
        return rows[0][0] or ""

    def _is_current(self, source: Head, point: Point) -> bool:
        """Return whether nothing has changed on the source since its newest point was made."""
        life = self._life
        if life.engine.live_uuid(source.id) != point.live_uuid:
            return False
        if source.status != "running":
            began = format_time(datetime.datetime.fromtimestamp(point.created_at, datetime.UTC))
            return point.lsn == "" and (source.started_at or "") < began
        try:
            if point.lsn == "" or self._position(source) != point.lsn:
                return False
            return _newest_setting(life.layout.mount(source.id)) < point.created_at
        except (PostgresError, OSError):
            return False

    # --- reading --------------------------------------------------------------------------------

    def list_all(
        self, *, status: str | None = None, parent: str | None = None, tag: str | None = None
    ) -> list[HeadView]:
        """Return the branches that fit, oldest first."""
        return [
            view
            for view in self._life.view("branch")
            if (status is None or view.status == status)
            and (parent is None or view.parent == parent)
            and (tag is None or tag in view.tags)
        ]

    def info(self, name: str) -> HeadView:
        """Return one branch. Raises UnknownHeadError."""
        return self._life.view_one(self._life.find(name, "branch"))

    def connection(self, name: str, kind: Kind = "branch") -> Connection:
        """Return how to connect to a running head, with its password.

        Raises UnknownHeadError, WrongStateError.
        """
        head = self._life.find(name, kind)
        status = self._life.status_of(head)
        # One that is asleep takes clients where there is a daemon. The password is there from the
        # first start on, so it is only looked for after that.
        is_asleep = status in ("stopped", "error") and head.is_asleep
        is_there = status == "running" or (
            is_asleep and not self._life.serving.is_port_free(head.port)
        )
        found = self._life.connection(head, with_password=True) if is_there else None
        if found is None:
            raise WrongStateError(
                f"{kind} {name!r} is {status}", hint=f"Start it first: pbkfs {kind} start {name}"
            )
        return found

    def log(self, name: str, kind: Kind = "branch", *, n_lines: int = 100) -> Log:
        """Return what happened to a head, and the end of its server's log."""
        head = self._life.find(name, kind)
        with self._life.store.transaction() as tx:
            events = tx.events(head.id)
        path = self._life.layout.server_log(head.id)
        return Log(events, self._life.read_log(head, n_lines), str(path))

    # --- changing -------------------------------------------------------------------------------

    def start(self, name: str, say: Say = say_nothing) -> HeadView:
        """Start a branch that is stopped or in error; one that runs is left as it is."""
        with self._life.locked(name, "branch") as head:
            head = self._life.start(head, say)
        return self._life.view_one(head)

    def stop(self, name: str) -> HeadView:
        """Stop a branch; its data stays, its port is free for others."""
        with self._life.locked(name, "branch") as head:
            head = self._life.stop(head)
        return self._life.view_one(head)

    def fall_asleep(self, name: str) -> bool:
        """Stop a branch whose time without a client is over; False if it has one after all.

        A client that comes while this looks is cut off, and let in when it comes again.
        """
        life = self._life
        with life.locked(name, "branch") as head:
            is_idle = (
                head.idle_stop_s is not None
                and head.operation == ""
                and head.status == life.status_of(head) == "running"
                and life.serving.activity(head).n_clients == 0
            )
            if is_idle:
                life.fall_asleep(head)
        return is_idle

    def restart(self, name: str, say: Say = say_nothing) -> HeadView:
        """Stop a branch and start it again."""
        with self._life.locked(name, "branch") as head:
            head = self._life.start(self._life.stop(head), say)
        return self._life.view_one(head)

    def reset(self, name: str, say: Say = say_nothing) -> HeadView:
        """Take a branch back to where it began; name, port and password stay.

        What was branched from it keeps what it had. Running before, it runs afterwards.
        """
        life = self._life
        with life.locked(name, "branch") as head:
            if head.status not in ("running", "stopped", "error"):
                raise WrongStateError(f"branch {name!r} is {head.status}")
            life.store.update(head.id, operation="reset")
            self.finish_reset(head)
            head = life.reload(head)
            if head.is_wanted:
                head = life.bring_up(head, say)
        return life.view_one(head)

    def finish_reset(self, head: Head) -> None:
        """Take a head back to its point, from the beginning; it is stopped afterwards."""
        life = self._life
        life.take_down(head, "immediate")
        with life.locks.hold(LAYERS, what="the layers", shared=True):
            life.engine.reset(head.id, head.point_id)
        with life.store.transaction() as tx:
            tx.remove_point(head.id)
            tx.set_stopped(head.id, started_at=None)
            tx.record(head, "reset")
        life.collect()

    def flatten(self, name: str, kind: Kind = "branch", say: Say = say_nothing) -> HeadView:
        """Fold all sealed layers below a head into one.

        What was branched from it keeps the layers that it refers to. Raises UnknownHeadError,
        WrongStateError.
        """
        life = self._life
        with life.locked(name, kind) as head:
            life.check_is_whole(head)
            if head.status not in ("running", "stopped", "error"):
                raise WrongStateError(f"{kind} {name!r} is {head.status}")
            say(f"folding layers of {name}")
            before, after = life.flatten(head)
        return life.view_one(head, [f"{before} layers, now {after}"])

    def rename(self, name: str, new_name: str) -> HeadView:
        """Give a branch another name; nothing else changes, its server runs on."""
        return self.change(name, new_name=new_name)

    def tag(self, name: str, tags: Sequence[str], *, remove: bool = False) -> HeadView:
        """Add tags to a branch, or remove them."""
        return self.change(name, remove_tags=tags) if remove else self.change(name, add_tags=tags)

    def extend(self, name: str, ttl: str) -> HeadView:
        """Let a branch live for ``ttl`` from now, or without an end: ``never``."""
        return self.change(name, ttl=ttl)

    def set_idle_stop(self, name: str, idle_stop: str) -> HeadView:
        """Let a branch be stopped after so long without a client, or ``never``."""
        return self.change(name, idle_stop=idle_stop)

    def change(
        self,
        name: str,
        *,
        new_name: str | None = None,
        ttl: str | None = None,
        idle_stop: str | None = None,
        add_tags: Sequence[str] = (),
        remove_tags: Sequence[str] = (),
    ) -> HeadView:
        """Change what is named of a branch: all of it, or nothing if one part is not possible."""
        if new_name is not None:
            _check_branch_name(new_name)
        expires_at = None if ttl is None else _moment_after(parse_ttl(ttl))
        idle_stop_s = None if idle_stop is None else parse_idle_stop(idle_stop)
        for tag in (*add_tags, *remove_tags):
            check_tag(tag)
        life = self._life
        # Whoever works on a branch may rely on its name, and on nothing else of this.
        holding: contextlib.AbstractContextManager[Head] = (
            contextlib.nullcontext(life.find(name, "branch"))
            if new_name is None
            else life.locked(name, "branch")
        )
        with holding as head, life.store.transaction() as tx:
            found = tx.get(head.id)
            if found is None or found.status == "deleting":
                raise WrongStateError(f"branch {name!r} is deleting")
            tx.add_tags(head.id, add_tags)
            tx.remove_tags(head.id, remove_tags)
            if ttl is not None:
                tx.update(head.id, expires_at=expires_at)
                tx.record(head, "extended", f"until {expires_at}" if expires_at else "for ever")
            if idle_stop is not None:
                tx.update(head.id, idle_stop_s=idle_stop_s)
                tx.record(head, "idle stop", f"{idle_stop_s:g} s" if idle_stop_s else "never")
            if new_name is not None:
                if new_name != head.name:
                    tx.check_name_is_free(new_name)
                tx.update(head.id, name=new_name)
                tx.record(head, "renamed", f"to {new_name}")
        return life.view_one(head)

    def destroy(
        self,
        name: str,
        *,
        recursive: bool = False,
        kind: Kind = "branch",
        say: Say = say_nothing,
    ) -> list[str]:
        """Remove a head, running or not, and with ``recursive`` what was branched from it.

        Returns the names of what is gone, the head's own last. Raises HasChildrenError.
        """
        life = self._life
        with life.locked(name, kind) as head:
            gone = self._destroy(head, recursive=recursive, say=say)
        life.collect()
        return gone

    def expire(self, head_id: str) -> bool:
        """Remove a branch whose time to live is over, and tell whether that was to be done.

        One that has more time by now stays, and one that others were branched from. Raises
        BusyError at once where another operation is at work on it.
        """
        life = self._life
        with life.locks.hold(head_id, what="a branch", wait_s=0):
            with life.store.transaction() as tx:
                head = tx.get(head_id)
                if head is None or not head.is_expired(now()) or tx.children(head_id):
                    return False
                tx.update(head_id, status="deleting", operation="destroy")
            life.erase(head)
        life.collect()
        return True

    def _destroy(self, head: Head, *, recursive: bool, say: Say) -> list[str]:
        life = self._life
        gone: list[str] = []
        while True:
            # Nobody can branch from a head that is deleting.
            with life.store.transaction() as tx:
                children = tx.children(head.id)
                if not children:
                    tx.update(head.id, status="deleting", operation="destroy")
            if not children:
                break
            if not recursive:
                names = ", ".join(child.name for child in children)
                raise HasChildrenError(f"{head.kind} {head.name!r} has branches: {names}")
            for child in children:
                with life.locks.hold(child.id, what=f"branch {child.name!r}"):
                    found = life.store.get(child.id)
                    if found is not None:
                        gone += self._destroy(found, recursive=True, say=say)
        say(f"destroying {head.name}")
        life.erase(head)
        return [*gone, head.name]


def _check_branch_name(name: str) -> str:
    """Return ``name`` if a branch can have it. Raises InvalidNameError, NameConflictError."""
    if check_name(name) == MAIN:
        # Wherever nothing else is named the default trunk is meant, which may not be there yet.
        raise NameConflictError(
            f"{name!r} is the default trunk's name", hint="Choose another name for the branch."
        )
    return name


def say_nothing_at_all(say: Say) -> None:
    """Make no default trunk: nobody has said how."""
    del say


def _moment_after(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return format_time(moment)


def _describe(head: Head, cloned: Cloned) -> str:
    if not cloned.gate_ms:
        return head.name
    return (
        f"{head.name}: writes waited {cloned.gate_ms:.1f} ms, stood still {cloned.held_ms:.1f} ms"
    )


def _newest_setting(data_dir: Path) -> float:
    """Return when a file was changed last that PostgreSQL writes without WAL: its settings.

    They are beside PostgreSQL's own directories. Raises OSError.
    """
    newest = 0.0
    for entry in os.scandir(data_dir):
        if entry.name in _VOLATILE:
            continue
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(status.st_mode):
            newest = max(newest, status.st_mtime, status.st_ctime)
        elif (
            stat.S_ISDIR(status.st_mode)
            and entry.name not in ("base", "global")
            and (not entry.name.startswith(("pg_", ".")))
        ):
            newest = max(newest, _newest_setting(Path(entry.path)))
    return newest
