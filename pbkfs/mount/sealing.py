"""Sealing a diff: what it holds becomes an immutable layer, and it goes on in a new one.

The half of the caller (``branch``, the command line), synchronous. A mounted diff is sealed by its
worker (control op ``seal``) while it is in use; one that is not mounted by this process, under the
diff's lock. ``overlay.sealing`` has the mechanism.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbkfs.mount import control
from pbkfs.overlay.superblock import LayerRef


@dataclass(frozen=True, slots=True)
class Child:
    """A second head to be made on the sealed layer. Neither path may exist, their parents must.

    ``head`` becomes an ordinary diff directory (mountable, without a binding), ``live`` the layer
    directory that it writes to.
    """

    head: Path
    live: Path


@dataclass(frozen=True, slots=True)
class SealReport:
    """What a seal did. ``layer`` is the sealed layer: its uuid and absolute path.

    ``gate_ms`` is how long writes had to wait, ``held_ms`` how long the server's processes stood
    still (0.0: they did not), ``total_ms`` the whole. ``wal_bytes`` were copied for the child.
    ``note`` says why the server was not held although that was asked for.
    """

    layer: LayerRef
    gate_ms: float
    total_ms: float
    wal_bytes: int
    held_ms: float = 0.0
    note: str | None = None


def seal(
    diff: Path,
    *,
    new_live: Path,
    child: Child | None = None,
    hold: bool = True,
    timeout_s: float | None = None,
) -> SealReport:
    """Seal the diff at ``diff``; it goes on in the new layer directory ``new_live``.

    ``child`` is there, complete and durable, when this returns. ``hold``: the PostgreSQL server on
    the mount stands still for the instant, so that the seal is exact; where that is not allowed
    the seal is what a power cut would leave, and ``note`` says so. Raises PbkfsError; then diff and
    disk are as before (but for a HostError that says that the child could not be finished: the diff
    is sealed then). TimedOutError: the seal goes on.
    """
    reply = control.call(
        diff,
        "seal",
        timeout_s=timeout_s,
        live=os.fspath(new_live),
        child=_child_fields(child),
        hold=hold,
    )
    return _report(reply)


def _child_fields(child: Child | None) -> dict[str, str] | None:
    if child is None:
        return None
    return {"head": os.fspath(child.head), "live": os.fspath(child.live)}


def _report(reply: dict[str, Any]) -> SealReport:
    layer = reply["layer"]
    return SealReport(
        layer=LayerRef(uuid.UUID(layer["uuid"]), layer["path"]),
        gate_ms=reply["gate_ms"],
        total_ms=reply["total_ms"],
        wal_bytes=reply["wal_bytes"],
        held_ms=reply["held_ms"],
        note=reply["note"],
    )
