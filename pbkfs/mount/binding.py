"""``DIFF/binding.json``: which base a diff is mounted over, where, and by whom.

The superblock holds the base's *identity*, which decides; the binding holds how to find the base
again, so that a second mount of a diff needs no ``-B``, ``-I``, ``-i``. Written by the worker,
read by every command. Replaced atomically.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pbkfs import durable
from pbkfs.errors import DiffError

NAME = "binding.json"


@dataclass(frozen=True, slots=True)
class BaseAddress:
    """Where a base is: a backup of a store, a directory, or nothing at all."""

    kind: Literal["probackup", "directory", "empty"]
    store: str | None = None
    instance: str | None = None
    backup_id: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        if self.kind == "probackup":
            return f"backup {self.backup_id} of instance {self.instance} in {self.store}"
        if self.kind == "directory":
            return f"directory {self.path}"
        return "an empty base"


@dataclass(frozen=True, slots=True)
class Binding:
    """One diff's use. ``owner`` is (uid, gid) of the files shown; times are RFC 3339, UTC."""

    base: BaseAddress
    mountpoint: str
    owner: tuple[int, int]
    created_at: str
    last_used_at: str
    pbkfs_version: str
    pid: int | None
    host: str
    state: Literal["active", "released"]
    made_directory: bool


def read_binding(diff: Path) -> Binding | None:
    """Return the binding of ``diff``, or None if there is none. Raises DiffError, OSError."""
    path = diff / NAME
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
        base = BaseAddress(**fields.pop("base"))
        uid, gid = fields.pop("owner")
        return Binding(base=base, owner=(int(uid), int(gid)), **fields)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DiffError(
            f"binding {path} is unreadable",
            hint="Remove that file and name the base on the command line again.",
        ) from None


def write_binding(diff: Path, binding: Binding) -> None:
    """Replace the binding of ``diff``; durable. Raises OSError."""
    data = json.dumps(dataclasses.asdict(binding), indent=2).encode() + b"\n"
    durable.replace_file(diff / NAME, data, label="binding:replace")
