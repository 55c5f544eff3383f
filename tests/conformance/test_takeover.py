"""A tree whose process dies at any step of a change, and the next one that takes over.

The kernel is played by this process: it knows numbers and cookies from answers alone, keeps files
open, sends again what was not answered, and must never see that somebody died.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conformance.file_machine import PAGE, make_lower
from conformance.plain_base import PlainBase

from pbkfs import durable
from pbkfs.overlay.diff import Diff, open_layers
from pbkfs.overlay.ledger import Ledger, read_ledger
from pbkfs.overlay.revival import decide
from pbkfs.overlay.tree import RENAME_EXCHANGE, Tree

OWNER = (os.geteuid(), os.getegid())
SESSION = b"one of many ones"
RESENT = 1 << 63
_MAX_MESSAGE = 1 << 20


class _Worker:
    """What runs in the child: a tree, and the requests that are carried out on it."""

    def __init__(self, lower: Path, diff_path: Path, ledger_fd: int) -> None:
        base = PlainBase(lower)
        is_new = os.fstat(ledger_fd).st_size == 0
        numbers = None if is_new else read_ledger(ledger_fd)
        diff = Diff.open(diff_path, base, session=SESSION)
        if numbers is None:
            made = Ledger.make()
            os.pwrite(ledger_fd, os.pread(made.fd, 64, 0), 0)
            self.ledger = Ledger(ledger_fd, 64)
        else:
            self.ledger = Ledger.resume(ledger_fd, numbers)
            decide(self.ledger, numbers, diff.live)
        self.tree = Tree(base, diff, open_layers(diff), owner=OWNER, log_fd=2, numbers=numbers)
        known = () if numbers is None else numbers.names.keys()
        self.tree.keep_ledger(self.ledger, known)
        self._place = diff_path.parent
        self._n_left = 0

    def answer(self, request: dict[str, Any]) -> Any:
        """Carry out a request; dies at its step number ``die``."""
        if request["die"]:
            self._n_left = request["die"]
            durable.on_step = self._step
        try:
            answer = getattr(self, "do_" + request["op"])(request["number"], *request["args"])
            self._step("answer")
            return answer
        except OSError as error:
            return error
        finally:
            durable.on_step = lambda _label: None
            self._n_left = 0

    def _step(self, _label: str) -> None:
        if self._n_left:
            self._n_left -= 1
            if self._n_left == 0:
                os._exit(77)

    def _made(self, number: int, make: Callable[[], Any]) -> int:
        made = self.tree.was_done(number)
        return made if made is not None else int(make().ino)

    def do_lookup(self, _number: int, parent: int, name: bytes) -> int:
        return self.tree.lookup(parent, name).ino

    def do_readdir(self, _number: int, parent: int, start: int) -> list[tuple[bytes, int, int]]:
        found = [
            (name, attr.ino, cookie) for name, attr, cookie in self.tree.readdir(parent, start)
        ]
        for _, ino, _ in found:
            self.tree.remember(ino)
        return found

    def do_create(self, number: int, parent: int, name: bytes) -> int:
        return self._made(number, lambda: self.tree.create(parent, name, 0o600, *OWNER))

    def do_mkdir(self, number: int, parent: int, name: bytes) -> int:
        return self._made(number, lambda: self.tree.mkdir(parent, name, 0o700, *OWNER))

    def do_symlink(self, number: int, parent: int, name: bytes) -> int:
        return self._made(number, lambda: self.tree.symlink(parent, name, b"to", *OWNER))

    def do_link(self, number: int, ino: int, parent: int, name: bytes) -> int:
        return self._made(number, lambda: self.tree.link(ino, parent, name))

    def do_unlink(self, number: int, parent: int, name: bytes) -> None:
        if self.tree.was_done(number) is None:
            self.tree.unlink(parent, name)

    def do_rmdir(self, number: int, parent: int, name: bytes) -> None:
        if self.tree.was_done(number) is None:
            self.tree.rmdir(parent, name)

    def do_rename(self, number: int, *args: Any) -> None:
        if self.tree.was_done(number) is None:
            self.tree.rename(*args)

    def do_write(self, _number: int, ino: int, offset: int, data: bytes) -> None:
        self.tree.copy_up(ino)
        self.tree.nodes.write(ino, offset, data)

    def do_read(self, _number: int, ino: int) -> bytes:
        self.tree.open(ino)
        return self.tree.nodes.read(ino, 0, 1 << 16)

    def do_truncate(self, _number: int, ino: int, size: int) -> None:
        self.tree.setattr(ino, size=size)

    def do_stat(self, _number: int, ino: int) -> tuple[int, int, int]:
        attr = self.tree.getattr(ino)
        return attr.mode, attr.nlink, attr.size

    def do_forget(self, _number: int, ino: int, n: int) -> None:
        self.tree.forget(ino, n)

    def do_seal(self, _number: int) -> None:
        self.tree.seal(self._place / f"live{os.getpid()}-{len(os.listdir(self._place))}")

    def do_rewrite(self, _number: int) -> None:
        self.ledger.rewrite(self.tree._snapshot())

    def do_reap(self, _number: int, known: set[int]) -> int:
        self.tree.sync()
        for ino in self.tree.take_doubtful():
            if ino not in known:
                self.tree.abandon(ino)
        return self.tree.reap()

    def do_close(self, _number: int) -> int:
        self.tree.close()
        return self.tree._contents.n_doomed


def _serve(worker: _Worker, sock: socket.socket) -> None:
    import pickle

    while data := sock.recv(_MAX_MESSAGE):
        sock.send(pickle.dumps(worker.answer(pickle.loads(data))))


class _Kernel:
    """Requests, resent where the worker dies of them, and what their answers have told."""

    def __init__(self, lower: Path, diff: Path, seed: int) -> None:
        self.lower, self.diff = lower, diff
        self.ledger_fd = os.memfd_create("ledger", os.MFD_CLOEXEC)
        self.random = random.Random(seed)
        self.names: dict[int, dict[bytes, int]] = {}
        self.cookies: dict[int, dict[bytes, int]] = {}
        self.lookups: dict[int, int] = {}
        self.contents: dict[int, bytearray] = {}
        self.kinds: dict[int, str] = {1: "dir"}
        self.n_deaths = 0
        self.last_number = 0
        self._pid = 0
        self._sock: socket.socket | None = None
        self.start()

    def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                ours.close()
                _serve(_Worker(self.lower, self.diff, self.ledger_fd), theirs)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        theirs.close()
        self._sock = ours

    def stop(self) -> int:
        assert self._sock is not None
        self._sock.close()
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status)

    def ask(self, op: str, *args: Any, die: int = 0) -> Any:
        import pickle

        assert self._sock is not None
        self.last_number += 1
        request = {"op": op, "args": args, "number": self.last_number, "die": die}
        self._sock.send(pickle.dumps(request))
        data = self._sock.recv(_MAX_MESSAGE)
        if not data:
            assert self.stop() == 77
            self.n_deaths += 1
            self.start()
            if op == "forget":
                return None
            request["number"] |= RESENT
            # And again, if it dies once more before it has answered.
            request["die"] = self.random.choice((0, 0, 1, 2, 3))
            while not data:
                self._sock.send(pickle.dumps(request))
                data = self._sock.recv(_MAX_MESSAGE)
                if not data:
                    assert self.stop() == 77
                    self.n_deaths += 1
                    self.start()
                    request["die"] = 0
        answer = pickle.loads(data)
        if isinstance(answer, OSError):
            raise answer
        return answer

    # --- what the kernel knows ------------------------------------------------------------------

    def learn(self, parent: int, name: bytes, ino: int, kind: str | None = None) -> None:
        known = self.names.setdefault(parent, {}).setdefault(name, ino)
        assert known == ino, (parent, name)
        self.lookups[ino] = self.lookups.get(ino, 0) + 1
        if ino not in self.kinds:
            if kind is None:
                mode = self.ask("stat", ino)[0]
                kind = "dir" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "file"
            self.kinds[ino] = kind
        assert kind is None or self.kinds[ino] == kind
        if self.kinds[ino] == "file" and ino not in self.contents:
            self.contents[ino] = bytearray(self.ask("read", ino))

    def named(self) -> set[int]:
        """All inodes that a known name leads to from the root."""
        found, todo = {1}, [1]
        while todo:
            for ino in self.names.get(todo.pop(), {}).values():
                if ino not in found:
                    found.add(ino)
                    todo.append(ino)
        return found

    def check(self) -> None:
        """Everything that was ever told is still so."""
        for parent in self.named():
            if self.kinds[parent] != "dir":
                continue
            for name, ino in self.names.get(parent, {}).items():
                assert self.ask("lookup", parent, name) == ino, (parent, name)
                self.lookups[ino] += 1
            entries = self.ask("readdir", parent, 0)
            for name, ino, _ in entries:
                self.learn(parent, name, ino)
            assert {name for name, _, _ in entries} == set(self.names.get(parent, {}))
            now = {name: cookie for name, _, cookie in entries}
            for name, cookie in self.cookies.get(parent, {}).items():
                assert now.get(name, cookie) == cookie
            assert sorted(now.values()) == list(now.values())
            self.cookies[parent] = now
        for ino, content in self.contents.items():
            assert self.ask("read", ino) == bytes(content), ino
            assert self.ask("stat", ino)[2] == len(content)


_REFUSALS = (errno.ENOTEMPTY, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ENOENT)
_OPERATIONS = (
    "create", "mkdir", "symlink", "link", "remove", "rename", "rename", "exchange", "write",
    "write", "truncate", "forget", "seal", "rewrite", "reap",
)  # fmt: skip
_NAMES = [b"a", b"b", b"c", b"16384", b"PG_VERSION", b"global", b"base", b"big"]


def _change(kernel: _Kernel, step: int) -> None:
    """One random request that changes something, and perhaps kills."""
    pick = kernel.random
    die = pick.choice((0, 0, 1, 2, 3, 4, 5, 6, 8, 11))
    named = kernel.named()
    directories = [ino for ino in named if kernel.kinds[ino] == "dir"]
    parent, name = pick.choice(directories), pick.choice(_NAMES)
    files = list(kernel.contents)
    kernel_names = kernel.names.setdefault(parent, {})
    if name not in kernel_names:
        with contextlib.suppress(FileNotFoundError):
            kernel.learn(parent, name, kernel.ask("lookup", parent, name))
    present = kernel_names.get(name)
    op = pick.choice(_OPERATIONS)
    if op in ("create", "mkdir", "symlink"):
        kind = {"create": "file", "mkdir": "dir", "symlink": "link"}[op]
        try:
            kernel.learn(parent, name, kernel.ask(op, parent, name, die=die), kind)
        except FileExistsError:
            assert present is not None
    elif op == "link" and present is not None and kernel.kinds[present] == "file":
        other, new_name = pick.choice(directories), pick.choice(_NAMES)
        with contextlib.suppress(FileExistsError):
            kernel.learn(other, new_name, kernel.ask("link", present, other, new_name, die=die))
    elif op == "remove" and present is not None:
        is_directory = kernel.kinds[present] == "dir"
        try:
            kernel.ask("rmdir" if is_directory else "unlink", parent, name, die=die)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            return
        del kernel_names[name]
        kernel.cookies.get(parent, {}).pop(name, None)
    elif op in ("rename", "exchange") and present is not None:
        other, new_name = pick.choice(directories), pick.choice(_NAMES)
        flags = RENAME_EXCHANGE if op == "exchange" else 0
        if new_name not in kernel.names.setdefault(other, {}):
            with contextlib.suppress(FileNotFoundError):
                kernel.learn(other, new_name, kernel.ask("lookup", other, new_name))
        try:
            kernel.ask("rename", parent, name, other, new_name, flags, die=die)
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            return
        there = kernel.names[other].get(new_name)
        if there == present:
            return
        for directory, gone in ((parent, name), (other, new_name)):
            kernel.names[directory].pop(gone, None)
            kernel.cookies.get(directory, {}).pop(gone, None)
        kernel.names[other][new_name] = present
        if flags:
            assert there is not None
            kernel.names[parent][name] = there
    elif op == "write" and files:
        ino = pick.choice(files)
        offset, n = pick.randrange(3 * PAGE), pick.randrange(1, PAGE + 1)
        data = bytes([step % 251 + 1]) * n
        kernel.ask("write", ino, offset, data, die=die)
        content = kernel.contents[ino]
        content.extend(bytes(max(0, offset + n - len(content))))
        content[offset : offset + n] = data
    elif op == "truncate" and files:
        ino, size = pick.choice(files), pick.randrange(3 * PAGE)
        kernel.ask("truncate", ino, size, die=die)
        content = kernel.contents[ino]
        del content[size:]
        content.extend(bytes(size - len(content)))
    elif op == "forget":
        gone = [ino for ino in kernel.lookups if ino not in kernel.named()]
        if gone:
            ino = pick.choice(gone)
            # A FORGET that is read and not carried out never comes again.
            kernel.ask("forget", ino, kernel.lookups.pop(ino), die=die)
            kernel.contents.pop(ino, None)
    elif op == "seal" and pick.random() < 0.3:
        kernel.ask("seal", die=pick.choice((0, die, 3 * die)))
    elif op == "rewrite":
        kernel.ask("rewrite", die=die)
    elif op == "reap":
        kernel.ask("reap", set(kernel.lookups), die=die)


@pytest.mark.parametrize("seed", range(int(os.environ.get("PBKFS_TAKEOVER_SEEDS", "12"))))
def test_nobody_sees_a_death(memory: Path, seed: int) -> None:
    lower = memory / "lower"
    lower.mkdir()
    make_lower(lower)
    kernel = _Kernel(lower, memory / "diff", seed)
    try:
        for step in range(60):
            _change(kernel, step)
            if step % 15 == 14:
                kernel.check()
        kernel.check()
        assert kernel.n_deaths > 5
        # What nobody uses any more gives its space back, whoever had made it, but for what a dead
        # worker was told of; the end gives back that, too.
        n_before = kernel.ask("reap", set(kernel.lookups))
        gone = [ino for ino in kernel.lookups if ino not in kernel.named()]
        for ino in gone:
            kernel.ask("forget", ino, kernel.lookups.pop(ino))
            kernel.contents.pop(ino, None)
        n_after = kernel.ask("reap", set(kernel.lookups))
        assert n_after <= n_before
        kernel.check()
        assert kernel.ask("close") == 0
    finally:
        kernel.stop()
        os.close(kernel.ledger_fd)


@pytest.mark.parametrize("distance", [1 << 31, 1 << 32, 1 << 62])
def test_request_is_told_apart_from_all_others(memory: Path, distance: int) -> None:
    """What the ledger says of an old one must not keep a new one from being carried out."""
    lower = memory / "lower"
    lower.mkdir()
    make_lower(lower)
    kernel = _Kernel(lower, memory / "diff", 1)
    try:
        old, new = (kernel.ask("create", 1, name) for name in (b"old", b"new"))
        kernel.ask("rename", 1, b"old", 1, b"final", 0)
        kernel.last_number += distance - 1
        kernel.ask("rename", 1, b"new", 1, b"final", 0, die=1)
        assert kernel.n_deaths > 0
        assert kernel.ask("lookup", 1, b"final") == new != old
    finally:
        kernel.stop()
        os.close(kernel.ledger_fd)


def test_removed_file_of_a_sealed_layer_gives_its_space_back(memory: Path) -> None:
    """In use over a seal and a death: then nobody writes the journal of its layer any more."""
    lower = memory / "lower"
    lower.mkdir()
    make_lower(lower)
    kernel = _Kernel(lower, memory / "diff", 1)
    try:
        ino = kernel.ask("create", 1, b"new")
        kernel.ask("write", ino, 0, b"x" * PAGE)
        kernel.ask("unlink", 1, b"new")
        kernel.ask("seal")
        kernel.ask("create", 1, b"other", die=1)
        assert kernel.n_deaths > 0
        assert kernel.ask("read", ino) == b"x" * PAGE
        assert kernel.ask("reap", {ino}) == 1
        kernel.ask("forget", ino, 1)
        assert kernel.ask("reap", set()) == 0
    finally:
        kernel.stop()
        os.close(kernel.ledger_fd)


def test_truncation_that_a_death_left_unrecorded_holds_without_a_name(memory: Path) -> None:
    """The next worker records it: the one after that sees the file only as it has grown again."""
    lower = memory / "lower"
    lower.mkdir()
    make_lower(lower)
    kernel = _Kernel(lower, memory / "diff", 1)
    try:
        directory = kernel.ask("lookup", kernel.ask("lookup", 1, b"base"), b"5")
        ino = kernel.ask("lookup", directory, b"16384")
        before = kernel.ask("read", ino)
        kernel.ask("write", ino, 0, before[:1])
        kernel.ask("unlink", directory, b"16384")
        [path] = [path for path in (memory / "diff/objects").rglob("*") if path.is_file()]
        os.truncate(path, 2 * PAGE)
        kernel.ask("create", 1, b"one", die=1)
        assert kernel.ask("read", ino) == before[: 2 * PAGE]
        kernel.ask("truncate", ino, len(before))
        kernel.ask("create", 1, b"two", die=1)
        assert kernel.n_deaths >= 2
        assert kernel.ask("read", ino) == before[: 2 * PAGE].ljust(len(before), b"\0")
    finally:
        kernel.stop()
        os.close(kernel.ledger_fd)
