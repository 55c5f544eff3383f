"""Flattening: the sealed layers below a diff become fewer, and what it shows stays the same.

``flatten`` is the command's: a diff that is not mounted, all of its layers. ``make_fold`` and
``put_fold`` are its two steps for ``branch``, which does with many heads what the command does with
one, mounted or not: a worker goes over to the new stack while it is in use (control op ``restack``,
class ``Restacker``). ``overlay.folding`` and ``overlay.restacking`` have the mechanism.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbkfs import durable
from pbkfs.errors import BusyError, DiffError, HostError, NotRunningError
from pbkfs.mount import control, lock, mounts
from pbkfs.mount.base import open_base
from pbkfs.mount.binding import read_binding
from pbkfs.mount.detaching import check_not_detached
from pbkfs.mount.request import reason
from pbkfs.mount.sealing import end_worker
from pbkfs.mount.wipe import LAYERS
from pbkfs.overlay.diff import live_path
from pbkfs.overlay.folding import Folded, Origins, fold, read_layers, replace_run
from pbkfs.overlay.layer import JOURNAL, OBJECTS, Layer, delete_layer
from pbkfs.overlay.sealing import BrokenSealError
from pbkfs.overlay.superblock import LayerRef, read_superblock
from pbkfs.overlay.tree import Tree

if TYPE_CHECKING:
    from pbkfs.mount.hydrating import Hydrator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FlattenReport:
    """What ``flatten`` did. ``folded`` is None if there was nothing to do.

    ``unused`` are the directories of layers that this diff does not name any more and that were
    left; ``deleted`` are those that were not.
    """

    n_before: int
    n_after: int
    folded: Folded | None = None
    unused: tuple[Path, ...] = ()
    deleted: tuple[Path, ...] = ()


def flatten(diff: Path, *, deletes: bool = False) -> FlattenReport:
    """Fold all sealed layers of a diff, mounted or not, into one.

    What was folded stays, because other diffs may lie upon it; with ``deletes``, for which it must
    not be mounted, what lies inside of the diff's own directory goes. Raises PbkfsError; then the
    diff is as before, or as afterwards.
    """
    diff = mounts.resolve(diff)
    if not diff.is_dir():
        raise DiffError(f"diff {diff} does not exist", hint="Name the directory of a diff.")
    check_not_detached(diff)
    with contextlib.ExitStack() as held, _host_errors(diff):
        if deletes:
            held.enter_context(_locked(diff))
        layers = read_layers(diff)
        place = diff / LAYERS
        if len(layers) > 1 and not place.is_dir():
            os.mkdir(place, 0o700)
            durable.fsync_dir(diff, label="flatten:mkdir")
        if place.is_dir():
            held.enter_context(_one_at_a_time(place))
        folded = None
        if len(layers) > 1:
            folded = make_fold(diff, layers, len(layers), place / str(uuid.uuid4()))
            _put(diff, layers, folded, is_locked=deletes)
        deleted = tuple(_delete_unused(diff)) if deletes else ()
        left = [Path(ref.path) for ref in layers if folded is not None]
        return FlattenReport(
            len(layers),
            len(read_layers(diff)),
            folded,
            tuple(path for path in left if (path / JOURNAL).exists()),
            deleted,
        )


def _put(diff: Path, layers: Sequence[LayerRef], folded: Folded, *, is_locked: bool) -> None:
    """Put the new layer into its place; where that fails, it is deleted again."""
    try:
        is_done = (
            replace_run(diff, layers, folded.layer) if is_locked else put_fold(diff, layers, folded)
        )
        if not is_done:
            raise BusyError(
                f"the layers of diff {diff} were changed meanwhile",
                hint="Run the command again.",
            )
    except BaseException:
        with contextlib.suppress(DiffError, OSError):
            if not _is_named(diff, folded):
                # Unless a worker is still about to name it: it has it open then.
                delete_layer(Path(folded.layer.path))
        raise


def _is_named(diff: Path, folded: Folded) -> bool:
    return folded.layer.uuid in {ref.uuid for ref in read_layers(diff)}


@contextlib.contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for path in place.glob(".*.fold"):
            shutil.rmtree(path)  # of a command that died
        yield
    finally:
        os.close(fd)


def make_fold(diff: Path, layers: Sequence[LayerRef], n_newest: int, target: Path) -> Folded:
    """Fold the first ``n_newest`` of ``layers``, which reach down to the base of ``diff``.

    Nothing names the new layer ``target`` yet. The caller sees to it that nobody deletes the
    layers. Raises PbkfsError; then nothing is left.
    """
    bound = read_binding(diff)
    if bound is None:
        raise DiffError(
            f"diff {diff} was never mounted", hint="Mount it once; then it can be flattened."
        )
    with contextlib.closing(open_base(bound.base, force=True, owner=bound.owner)) as base:
        return fold(base, layers, n_newest, target)


def put_fold(diff: Path, run: Sequence[LayerRef], folded: Folded) -> bool:
    """Let a diff, mounted or not, name the folded layer instead of ``run``, if it names that.

    Its mount goes on in the new stack, with all files that are open. Raises BusyError where that is
    not possible now, other PbkfsError; then it is as before, or as afterwards.
    """
    origins = Path(f"{folded.layer.path}.origins")
    try:
        with _host_errors(diff):
            _write_origins(origins, folded)
        try:
            reply = control.call(
                diff,
                "restack",
                timeout_s=None,
                run=[[str(ref.uuid), ref.path] for ref in run],
                layer=[str(folded.layer.uuid), folded.layer.path],
                origins=os.fspath(origins),
            )
            return bool(reply["is_done"])
        except NotRunningError:
            with _locked(diff), _host_errors(diff):
                # A worker that died on the way may have done it.
                return replace_run(diff, run, folded.layer) or _is_named(diff, folded)
    finally:
        origins.unlink(missing_ok=True)


def _write_origins(path: Path, folded: Folded) -> None:
    """Tell a worker what it was made of; nothing that has to outlive this."""
    content = [[str(key[0]), key[1], *found] for key, found in folded.origins.items()]
    path.write_text(json.dumps(content), encoding="utf-8")


def _read_origins(path: Path) -> Origins:
    content = json.loads(path.read_text(encoding="utf-8"))
    return {
        (uuid.UUID(layer), old_id): (new_id, is_mapped)
        for layer, old_id, new_id, is_mapped in content
    }


class Restacker:
    """The worker's half. No seal and no unmount beside it: the caller sees to that."""

    def __init__(self, tree: Tree, diff: Path, hydrator: Hydrator) -> None:
        self._tree = tree
        self._diff = diff
        self._hydrator = hydrator

    async def restack(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer the control op. Raises PbkfsError; a switch that broke ends the process."""
        import trio

        run = [LayerRef(uuid.UUID(each), path) for each, path in request["run"]]
        layer_id, path = uuid.UUID(request["layer"][0]), Path(request["layer"][1])
        was_hydrating = await self._hydrator.pause()
        try:
            with trio.CancelScope(shield=True), _host_errors(self._diff):
                origins = await trio.to_thread.run_sync(_read_origins, Path(request["origins"]))
                new = await trio.to_thread.run_sync(lambda: Layer.sealed(path, layer_id))
                is_done = False
                began = time.monotonic()
                try:
                    is_done = self._tree.restack(run, new, origins)
                finally:
                    if not is_done:
                        new.close()
        except BrokenSealError as error:
            end_worker(error)
        finally:
            self._hydrator.resume(is_wanted=was_hydrating)
        if is_done:
            logger.info(
                "%d layers are one now, %s; it took %.1f ms",
                len(run),
                path,
                (time.monotonic() - began) * 1e3,
            )
        return {"is_done": is_done}


@contextlib.contextmanager
def _locked(diff: Path) -> Iterator[None]:
    held = lock.acquire(diff)
    try:
        yield
    finally:
        # What is recorded in it is left: a crash is still to be recovered from.
        held.close()


def _delete_unused(diff: Path) -> Iterator[Path]:
    """Delete the layers inside of the diff's directory that it does not name; yields them."""
    named = {Path(ref.path) for ref in read_layers(diff)}
    named.add(live_path(diff, read_superblock(diff)))
    place = diff / LAYERS
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if path not in named:
            durable.on_step("flatten:delete")
            if delete_layer(path):
                yield path
    if diff not in named and (diff / JOURNAL).exists():
        durable.on_step("flatten:delete")
        shutil.rmtree(diff / OBJECTS, ignore_errors=True)
        (diff / JOURNAL).unlink()
        yield diff


@contextlib.contextmanager
def _host_errors(diff: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({os.fsdecode(error.filename)})" if error.filename is not None else ""
        raise HostError(
            f"cannot flatten diff {diff}: {reason(error)}{where}",
            hint="The diff shows what it did; when the cause is gone, try again.",
        ) from error
