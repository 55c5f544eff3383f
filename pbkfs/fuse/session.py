"""A mount being served: the fuse descriptor, the native dispatcher and pyfuse3, and their end.

Owned by the worker. ``mount`` comes after the last fork; ``serve`` is a trio task, and starts the
native threads. All methods belong to the trio thread but for ``unmount``, ``invalidate``,
``counters`` and ``reset_counters``, which any thread may call, and ``write_back`` and ``is_known``,
which wait for the mount itself and are for another thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from pbkfs import aside
from pbkfs._native import Dispatcher
from pbkfs.errors import HostError
from pbkfs.fuse import mounting, writeback
from pbkfs.fuse.operations import Operations
from pbkfs.fuse.writeback import Writeback

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pbkfs.overlay.tree import Tree

logger = logging.getLogger(__name__)

# Source: linux/fuse.h, struct fuse_init_in: major, minor, max_readahead, flags, flags2.
_INIT = struct.Struct("=5I")
_INIT_EXT, _HAS_RESEND = 1 << 30, 1 << 39

# Tasks of pyfuse3: as many as there may be requests that wait in a thread (fsync of directories).
_MIN_TASKS = 2
_MAX_TASKS = 64


def init_answer(request: bytes) -> bytes:
    """Return what this program says to what the kernel says at the begin."""
    return Dispatcher.init_answer(request)


class Session:
    """One mount of one tree on ``mountpoint``; ``fsname`` is what the list of mounts shows.

    ``full_wait_s``: how long written-back pages wait for space, -1 for ever, 0 not at all.
    ``is_supervised``: another process is to take over when this one dies.
    """

    def __init__(
        self,
        tree: Tree,
        mountpoint: Path,
        *,
        allow_other: bool,
        fsname: str,
        subtype: str = "pbkfs",
        full_wait_s: int = -1,
        is_supervised: bool = False,
    ) -> None:
        self._tree = tree
        self._is_supervised = is_supervised
        self._mountpoint = mountpoint
        self._allow_other = allow_other
        self._fsname = fsname
        self._subtype = subtype
        self._full_wait_s = full_wait_s
        self._fuse_fd = self._log_fd = self._native_log_fd = -1
        self._device: str | None = None
        self._dispatcher: Dispatcher | None = None
        self.writeback = Writeback(0, is_set=False, reserve_bytes=0)
        self._is_serving = False
        self._has_answered = False
        self._init = b""
        self._fail: Callable[[BaseException], None] | None = None
        self._closed = trio.Event()

    @property
    def mountpoint(self) -> Path:
        """Where it is mounted, as the kernel lists it once it is."""
        return self._mountpoint

    @property
    def fuse_fd(self) -> int:
        """The connection with the kernel, which ends with its last copy. Stays the session's."""
        return self._fuse_fd

    @property
    def init_request(self) -> bytes:
        """What the kernel said at the begin; for ``take_over`` of another process."""
        return b"" if self._dispatcher is None else self._dispatcher.init_request

    def can_resend(self) -> bool:
        """Tell whether the kernel would send again what a dead process has not answered."""
        said = self.init_request
        if len(said) < _INIT.size:
            return False
        _, _, _, flags, flags2 = _INIT.unpack_from(said)
        return bool(flags & _INIT_EXT and flags2 & _HAS_RESEND >> 32)

    def fail_with(self, fail: Callable[[BaseException], None]) -> None:
        """Call ``fail``, which does not return, where serving ends by a bug: nothing is answered,
        for another process takes over."""
        self._fail = fail

    def mount(self) -> None:
        """Mount; whoever touches the mount point waits until ``serve`` runs.

        Raises HostError with nothing mounted.
        """
        self._mountpoint = Path(os.path.realpath(self._mountpoint))  # as the kernel lists it
        self._fuse_fd = mounting.open_and_mount(
            self._mountpoint,
            fsname=self._fsname,
            subtype=self._subtype,
            allow_other=self._allow_other,
        )
        try:
            self._begin()
        except BaseException:
            with contextlib.suppress(Exception):
                mounting.detach(self._mountpoint)
            self._close_descriptors()
            raise

    def take_over(self, fuse_fd: int, init: bytes) -> None:
        """Go on with the mount of a process that is dead; it is as if it had been slow.

        ``fuse_fd`` is the session's from now on, ``init`` what the kernel had said to the first
        process. The path of the mount point is the kernel's: it can't be looked at before
        ``serve``. Raises OSError, HostError.
        """
        self._fuse_fd = fuse_fd
        self._init = init
        try:
            self._begin()
        except BaseException:
            self._close_descriptors()
            raise

    def _begin(self) -> None:
        self._device = mounting.find_device(self._mountpoint)
        writeback.read_ahead(self._device)
        self.bound_dirty()
        logger.debug("write-back of %s: %s", self._mountpoint, self.writeback)
        self._log_fd, self._native_log_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._dispatcher = Dispatcher(
            self._tree.nodes,
            self._fuse_fd,
            log_fd=self._native_log_fd,
            hold_s=self._full_wait_s,
            supervised=self._is_supervised,
            init=self._init,
        )

    def bound_dirty(self) -> None:
        """Bound what the kernel may hold back, and keep as much space. To be repeated: see there.

        Raises OSError where the diff can't be asked for its size.
        """
        found = self._tree.statfs()
        self.writeback = writeback.bound(self._device, found.f_blocks * found.f_frsize)
        self._tree.reserve_bytes = self.writeback.reserve_bytes

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until the mount is gone, ``close`` is called or the task is cancelled.

        Started once the mount point has answered. When it ends otherwise than by an unmount, the
        mount point stays and answers ENOTCONN: an empty directory must not appear in its place.
        """
        dispatcher = self._dispatcher
        assert dispatcher is not None, "mount comes first"
        try:
            # libfuse closes its descriptor at the end, so it gets one of its own.
            python_fd = os.dup(dispatcher.socket_fd)
            try:
                operations = Operations(
                    self._tree, self.invalidate, dispatcher.request, dispatcher.invalidate_entry
                )
                pyfuse3.init(operations, f"/dev/fd/{python_fd}", set())
            except BaseException:
                os.close(python_fd)
                raise
            try:
                dispatcher.start()
                self._is_serving = True
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._wait_gone, dispatcher.event_fd)
                    nursery.start_soon(self._pump_log)
                    nursery.start_soon(self._announce, task_status)
                    await pyfuse3.main(min_tasks=_MIN_TASKS, max_tasks=_MAX_TASKS)
                    nursery.cancel_scope.cancel()
                if not self._has_answered and not self._init:
                    raise HostError(
                        f"{self._mountpoint} was unmounted before it was ready",
                        hint="See who did it, and mount again.",
                    )
            except Exception as error:
                if self._fail is not None:
                    self._fail(error)
                raise
            finally:
                self._is_serving = False
                dispatcher.stop()
                pyfuse3.close(unmount=False)
        finally:
            self._drain_log()
            self._dispatcher = None  # which frees its descriptors and lets go of the nodes
            self._close_descriptors()
            self._closed.set()

    async def _announce(self, task_status: trio.TaskStatus[None]) -> None:
        # An answer of the mount point itself: INIT is through, the threads and pyfuse3 are up. Not
        # after a takeover, when this process must not wait for itself: see pbkfs.aside.
        if not self._init:
            await trio.to_thread.run_sync(os.stat, self._mountpoint, abandon_on_cancel=True)
        self._has_answered = True
        task_status.started()

    async def _wait_gone(self, event_fd: int) -> None:
        await trio.lowlevel.wait_readable(event_fd)
        logger.debug("the kernel has let go of %s", self._mountpoint)
        self.close()

    async def _pump_log(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._log_fd)
            self._drain_log()

    def _drain_log(self) -> None:
        """Log what the dispatcher's threads had to say: one line each, never expected."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._log_fd, 65536):
                for line in data.decode(errors="backslashreplace").splitlines():
                    logger.error("%s", line)

    def close(self) -> None:
        """Stop serving, whether or not the kernel has let go; ``serve`` then ends on its own.

        For the end of a detached mount that is still in use: its users get ENOTCONN.
        """
        if self._is_serving:
            pyfuse3.terminate()

    async def wait_closed(self) -> None:
        """Return when serving has ended: no native thread runs, the descriptor is closed."""
        await self._closed.wait()

    @property
    def is_closed(self) -> bool:
        """Whether serving has ended."""
        return self._closed.is_set()

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount, or with ``lazy`` detach; then ``serve`` ends.

        Waits until the kernel has written its dirty pages back, which needs the trio thread for
        copy-ups: call it in another thread while serving. Raises BusyError (not with ``lazy``),
        NotRunningError, HostError.
        """
        if lazy:
            mounting.detach(self._mountpoint)
        else:
            mounting.unmount(self._mountpoint)

    def write_back(self, paths: Sequence[bytes]) -> None:
        """Have the kernel write back these files: ``pbkfs.aside``. In another thread. OSError."""
        aside.write_back(self._mountpoint, paths)

    def invalidate(self, ino: int, offset: int = 0, length: int = 0) -> None:
        """Have the kernel drop what it cached of a file; dirty pages are written back before.

        Does not wait for it. ``length`` 0 means to the end. Raises OSError when not serving.
        """
        dispatcher = self._dispatcher
        if dispatcher is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        dispatcher.invalidate(ino, offset, length)

    def is_known(self, ino: int) -> bool:
        """Return whether the kernel has this inode. Not for the trio thread: it may have to wait.

        Raises OSError.
        """
        dispatcher = self._dispatcher
        return dispatcher is None or dispatcher.is_known(ino)

    def counters(self) -> dict[str, int]:
        """Return requests by kind, and the state of the queues."""
        dispatcher = self._dispatcher
        return dispatcher.counters() if dispatcher is not None else {}

    def reset_counters(self) -> None:
        """Set the counters of events to zero."""
        dispatcher = self._dispatcher
        if dispatcher is not None:
            dispatcher.reset_counters()

    def _close_descriptors(self) -> None:
        for fd in (self._fuse_fd, self._log_fd, self._native_log_fd):
            if fd >= 0:
                os.close(fd)
        self._fuse_fd = self._log_fd = self._native_log_fd = -1
