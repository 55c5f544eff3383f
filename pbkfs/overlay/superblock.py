"""``DIFF/superblock.json``: which diff this is, and of what.

Owns the JSON (ARCHITECTURE.md, "superblock.json") and its checks. Called by ``diff`` before the
worker's threads exist, and by commands that only look at a diff.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from pbkfs import durable
from pbkfs.errors import DiffError, FormatError

NAME = "superblock.json"
MAGIC = "pbkfs-diff"
FORMAT_VERSION = 1
BLOCK_BYTES = 8192
# A diff that was detached: its objects are the files of a PGDATA, and it is not mounted any more.
DETACHED = "detached"
KNOWN_FEATURES: frozenset[str] = frozenset({DETACHED})

Identity = Mapping[str, str | int | None]


@dataclass(frozen=True, slots=True)
class LayerRef:
    """A sealed layer: ``path`` is its directory, absolute or relative to the diff that names it."""

    uuid: UUID
    path: str


@dataclass(frozen=True, slots=True)
class Superblock:
    """Identity of a diff. ``layers`` are the sealed layers below it, newest first.

    ``live`` is the directory of the layer that is written to, absolute or relative to the diff, and
    ``live_uuid`` what that layer's journal says of itself; None: the same as ``uuid``.
    """

    uuid: UUID
    base: Identity
    system_identifier: int | None
    live: str = "."
    live_uuid: UUID | None = None
    layers: tuple[LayerRef, ...] = ()
    created_at: str = ""
    features: tuple[str, ...] = ()
    detached_to: str | None = None

    @property
    def live_id(self) -> UUID:
        """The uuid of the layer that is written to."""
        return self.live_uuid or self.uuid

    def to_json(self) -> bytes:
        """Return the file's content."""
        features = set(self.features) - {DETACHED}
        content: dict[str, object] = {
            "magic": MAGIC,
            "format_version": FORMAT_VERSION,
            "features": sorted(features if self.detached_to is None else features | {DETACHED}),
            "uuid": str(self.uuid),
            "live": self.live,
            "live_uuid": str(self.live_id),
            "block_size": BLOCK_BYTES,
            "system_identifier": (
                None if self.system_identifier is None else str(self.system_identifier)
            ),
            "base": dict(self.base),
            "layers": [{"uuid": str(layer.uuid), "path": layer.path} for layer in self.layers],
            "created_at": self.created_at,
        }
        if self.detached_to is not None:
            content["detached_to"] = self.detached_to
        return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"

    def write(self, diff: Path, *, label: str = "superblock") -> None:
        """Replace the superblock of ``diff`` atomically; durable on return. Raises OSError."""
        durable.replace_file(diff / NAME, self.to_json(), label=label)


def new_superblock(
    base: Identity, system_identifier: int | None, layers: Sequence[LayerRef] = ()
) -> Superblock:
    """Return the superblock of a diff that is about to be made, with its layer in itself."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    own = uuid4()
    return Superblock(
        uuid=own,
        live_uuid=own,
        base=dict(base),
        system_identifier=system_identifier,
        layers=tuple(layers),
        created_at=now,
    )


def read_superblock(diff: Path) -> Superblock:
    """Return the superblock of ``diff``.

    Raises FileNotFoundError, other OSError, and DiffError if this program can't use the diff:
    unreadable content, other version, unknown feature.
    """
    return parse_superblock((diff / NAME).read_bytes(), diff)


def parse_superblock(data: bytes, diff: Path) -> Superblock:
    """Return the superblock in ``data``; ``diff`` is for messages. Raises DiffError."""
    try:
        content = json.loads(data)
        if not isinstance(content, dict) or content.get("magic") != MAGIC:
            raise FormatError("no pbkfs superblock")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise DiffError(
                f"diff {diff} has format version {version}, this program knows {FORMAT_VERSION}",
                hint="Use the version of pbkfs that made the diff.",
            )
        unknown = sorted(set(_strings(content["features"])) - KNOWN_FEATURES)
        if unknown:
            raise DiffError(
                f"diff {diff} uses features this program does not know: {', '.join(unknown)}",
                hint="Use the version of pbkfs that made the diff.",
            )
        if content["block_size"] != BLOCK_BYTES:
            raise DiffError(
                f"diff {diff} has blocks of {content['block_size']} bytes, "
                f"this program uses {BLOCK_BYTES}",
                hint="Use the version of pbkfs that made the diff.",
            )
        system_identifier = content["system_identifier"]
        base = content["base"]
        if not isinstance(base, dict):
            raise FormatError("base is no object")
        return Superblock(
            uuid=UUID(content["uuid"]),
            live=str(content["live"]),
            live_uuid=UUID(content["live_uuid"]),
            base=base,
            system_identifier=None if system_identifier is None else int(system_identifier),
            layers=tuple(
                LayerRef(UUID(layer["uuid"]), str(layer["path"])) for layer in content["layers"]
            ),
            created_at=str(content["created_at"]),
            features=tuple(_strings(content["features"])),
            detached_to=content.get("detached_to"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, FormatError) as error:
        raise DiffError(
            f"superblock of diff {diff} is damaged: {error}",
            hint="Restore superblock.json from a copy, or begin with a new diff.",
        ) from error


def check_base(
    superblock: Superblock, base: Identity, system_identifier: int | None, diff: Path
) -> None:
    """Raise DiffError unless ``superblock`` was made for exactly this base."""
    if dict(superblock.base) != dict(base):
        raise DiffError(
            f"diff {diff} belongs to {format_identity(superblock.base)}, "
            f"not to {format_identity(base)}",
            hint="Name the base the diff was made for, or use another diff directory.",
        )
    if superblock.system_identifier != system_identifier:
        raise DiffError(
            f"diff {diff} belongs to the cluster with system identifier "
            f"{superblock.system_identifier}, not to {system_identifier}",
            hint="Name the base the diff was made for, or use another diff directory.",
        )


def format_identity(identity: Identity) -> str:
    """Return an identity for a message: kind, then its other keys."""
    rest = ", ".join(f"{key} {value}" for key, value in identity.items() if key != "kind")
    return f"{identity.get('kind')} ({rest})" if rest else str(identity.get("kind"))


def _strings(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"expected a list of strings, found {value!r}")
    return value
