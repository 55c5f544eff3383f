"""A process that serves one tree on a mount point, for the tests beside it.

``Served`` starts it and talks to it over its standard input and output, one JSON line each way;
``main`` is that process. It does what ``mount.worker`` does with a session, and nothing else, so
that these tests depend on no more than ``fuse``, ``overlay`` and the native half.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60


def is_mounted(path: Path) -> bool:
    """Whether the kernel's list has it; does not touch the mount."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ")[4] == str(path) for line in lines)


class Served:
    """The process as seen by a test."""

    def __init__(
        self, path: Path, diff: Path, lower: Path | None, *args: str, prefix: tuple[str, ...] = ()
    ) -> None:
        self.path = path
        self.diff = diff
        self._log = diff.parent / f"{diff.name}.log"
        command = [sys.executable, str(Path(__file__)), str(path), str(diff), *args]
        if lower is not None:
            command += ["--lower", str(lower)]
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            )
        self.said = self.hear()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def hear(self) -> dict[str, Any]:
        """Return what the process says next."""
        assert self.process.stdout is not None
        # A test that waits for an answer for ever would hide which one it is.
        timer = threading.Timer(LIMIT_S, self.process.kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self.process.wait(LIMIT_S)
            raise AssertionError(f"no answer, exit {self.process.returncode}\n{self.log}")
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, op: str, **fields: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = self.ask("counters")
        return found

    def reset(self) -> None:
        self.ask("reset")

    def unmount(self) -> dict[str, Any]:
        """Ask for a graceful unmount; on success the process ends."""
        answer: dict[str, Any] = self.ask("unmount")
        if "error" not in answer:
            self.wait()
        return answer

    def wait(self) -> int:
        return self.process.wait(LIMIT_S)

    def end(self) -> None:
        """Whatever the state: no mount and no process stays."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        if self.process.poll() is None and is_mounted(self.path):
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT_S)
        while is_mounted(self.path):
            subprocess.run(["umount", "-l", self.path], check=True)


# --- the process ----------------------------------------------------------------------------


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _resources() -> dict[str, int]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def _make_tree(args: argparse.Namespace) -> Any:
    from conformance.plain_base import PlainBase

    from pbkfs.backup.empty import EmptyBase
    from pbkfs.overlay import contents, hydration, tree
    from pbkfs.overlay.diff import Diff

    if args.max_whole is not None:
        contents.MAX_WHOLE_BYTES = args.max_whole
        hydration.MAX_SMALL_BYTES = args.max_whole
    owner = (os.geteuid(), os.getegid())
    base = EmptyBase(owner) if args.lower is None else PlainBase(args.lower)
    return tree.Tree(base, Diff.open(args.diff, base), owner=owner, log_fd=2)


def _plant_bug(tree: Any) -> None:
    """Looking up ``bug`` fails as only a mistake in the program does."""
    lookup = tree.lookup

    def broken(parent: int, name: bytes) -> Any:
        if name == b"bug":
            raise RuntimeError("planted bug")
        return lookup(parent, name)

    tree.lookup = broken
    tree.nodes.name_added(tree.ROOT, b"bug")  # else it is known to be missing, and nobody looks


def _plant_full_disk(tree: Any) -> None:
    """There is room for no copy-up."""

    def full(_ino: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tree.copy_up = full


def _plant_slow_attach(tree: Any) -> None:
    """An object comes to its file long after the file was registered."""
    attach = tree._contents._attach

    def slow(*args: Any, **fields: Any) -> None:
        time.sleep(0.02)
        attach(*args, **fields)

    tree._contents._attach = slow


async def _serve(args: argparse.Namespace, tree: Any) -> None:
    import trio

    from pbkfs.errors import PbkfsError
    from pbkfs.fuse.session import Session

    session = Session(
        tree,
        args.mountpoint,
        allow_other=args.allow_other,
        fsname=args.fsname or str(args.diff),
        full_wait_s=0,
    )

    async def unmount() -> dict[str, Any]:
        try:
            await trio.to_thread.run_sync(session.unmount)
        except PbkfsError as error:
            return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        return {}

    async def obey_signals(signals: Any) -> None:
        async for _ in signals:
            answer = await unmount()
            if answer:
                _say(**answer)

    async def hydrate(max_bytes: int) -> dict[str, Any]:
        """Do one step of a hydration, which begins anew after its end."""
        hydration = tree.hydration
        step = hydration.next_step(max_bytes)
        if step is None:
            for _ in hydration.survey():
                pass
            step = hydration.next_step(max_bytes)
        if step is not None:
            await trio.to_thread.run_sync(step.run)
            hydration.finish(step)
        return {"bytes_done": hydration.n_bytes_done, "failed": len(hydration.failed)}

    async def answer(fields: dict[str, Any]) -> dict[str, Any]:
        match fields.pop("op"):
            case "counters":
                return session.counters()
            case "reset":
                session.reset_counters()
                return {}
            case "unmount":
                return await unmount()
            case "detach":
                await trio.to_thread.run_sync(lambda: session.unmount(lazy=True))
                return {}
            case "close":
                session.close()
                return {}
            case "invalidate":
                session.invalidate(fields["ino"])
                return {}
            case "resources":
                return _resources()
            case "hydrate":
                return await hydrate(fields["max_bytes"])
            case op:
                raise AssertionError(op)

    async def converse() -> None:
        stream = trio.lowlevel.FdStream(os.dup(0))
        rest = b""
        async for data in stream:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                _say(**await answer(json.loads(line)))

    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            session.mount()
            await nursery.start(session.serve)
            nursery.start_soon(obey_signals, signals)
            nursery.start_soon(converse)
            _say(ready=True)
            await session.wait_closed()
            nursery.cancel_scope.cancel()


def _serve_often(args: argparse.Namespace, tree: Any) -> None:
    """Mount, use and unmount many times over in this one process; says what it holds each time."""
    import trio

    from pbkfs.fuse.session import Session

    def use() -> None:
        file = args.mountpoint / "file"
        file.write_bytes(b"x" * 10000)
        assert file.read_bytes() == b"x" * 10000
        file.unlink()

    async def once() -> None:
        session = Session(
            tree, args.mountpoint, allow_other=False, fsname=str(args.diff), full_wait_s=0
        )
        async with trio.open_nursery() as nursery:
            session.mount()
            await nursery.start(session.serve)
            await trio.to_thread.run_sync(use)
            await trio.to_thread.run_sync(session.unmount)
            await session.wait_closed()
            nursery.cancel_scope.cancel()

    held = []
    for _ in range(args.cycles):
        trio.run(once)
        held.append(_resources())
    _say(held=held)


def main() -> int:
    """Serve until unmounted."""
    from pbkfs.errors import PbkfsError

    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("diff", type=Path)
    parser.add_argument("--lower", type=Path)
    parser.add_argument("--fsname")
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--bug", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--slow-attach", action="store_true")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--max-whole", type=int)
    parser.add_argument("--cycles", type=int)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")

    import trio

    tree = _make_tree(args)
    before = _resources()
    if args.bug:
        _plant_bug(tree)
    if args.full:
        _plant_full_disk(tree)
    if args.slow_attach:
        _plant_slow_attach(tree)
    if args.missing:
        args.mountpoint /= "missing"
    try:
        if args.cycles is not None:
            _serve_often(args, tree)
        else:
            trio.run(_serve, args, tree)
    except (PbkfsError, BaseExceptionGroup) as caught:
        error: Any = caught
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if not isinstance(error, PbkfsError):
            raise
        said = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        _say(**said, before=before, after=_resources())
        return 1
    finally:
        tree.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
