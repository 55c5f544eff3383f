"""The superblock: what it says, and whose diff it refuses."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from pbkfs.errors import DiffError
from pbkfs.overlay.superblock import (
    LayerRef,
    check_base,
    new_superblock,
    parse_superblock,
    read_superblock,
)

BASE = {"kind": "probackup", "backup_id": "SBOL94", "tli": 1, "parent": None}
DIFF = Path("/srv/diff")


def test_comes_back(tmp_path: Path) -> None:
    layers = [LayerRef(uuid.uuid4(), "/layers/2"), LayerRef(uuid.uuid4(), "/layers/1")]
    made = new_superblock(BASE, 2**63 + 5, layers)
    made.write(tmp_path)
    assert read_superblock(tmp_path) == made
    content = json.loads((tmp_path / "superblock.json").read_bytes())
    assert content["magic"] == "pbkfs-diff"
    assert content["format_version"] == 1
    assert content["block_size"] == 8192
    assert content["system_identifier"] == str(2**63 + 5)
    assert [layer["path"] for layer in content["layers"]] == ["/layers/2", "/layers/1"]
    assert content["created_at"].endswith("+00:00")


def _changed(**changes: Any) -> bytes:
    content = json.loads(new_superblock(BASE, None).to_json())
    content.update(changes)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"[]", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b'{"magic": "other"}', "damaged"),
        (_changed(format_version=2), "format version 2"),
        (_changed(features=["cold-pages"]), "cold-pages"),
        (_changed(features="x"), "damaged"),
        (_changed(block_size=4096), "blocks of 4096 bytes"),
        (_changed(uuid="no"), "damaged"),
        (_changed(base=[]), "damaged"),
        (_changed(layers=[{"path": "/x"}]), "damaged"),
        (_changed(system_identifier="x"), "damaged"),
    ],
)
def test_what_this_program_cannot_use_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DiffError, match=message) as raised:
        parse_superblock(data, DIFF)
    assert str(DIFF) in raised.value.message
    assert raised.value.hint


def test_other_base_is_refused() -> None:
    superblock = new_superblock(BASE, 7)
    check_base(superblock, dict(BASE), 7, DIFF)
    with pytest.raises(DiffError, match=r"SBOL94.*not to.*SBOM12"):
        check_base(superblock, {**BASE, "backup_id": "SBOM12"}, 7, DIFF)
    with pytest.raises(DiffError, match="system identifier 7, not to 8"):
        check_base(superblock, BASE, 8, DIFF)
