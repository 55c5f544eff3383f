"""What the overlay engine deletes, and above all what it does not."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from pbkfs.branch.layout import Layout
from pbkfs.branch.overlay import OverlayEngine
from pbkfs.errors import HostError
from pbkfs.overlay.superblock import LayerRef, new_superblock


def add_head(layout: Layout, name: str, *layers: Path) -> Path:
    head = layout.head(name)
    head.mkdir()
    refs = [LayerRef(uuid.uuid4(), str(path)) for path in layers]
    new_superblock({"kind": "empty"}, None, refs).write(head)
    return head


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "data")
    made.prepare()
    for name in ("one", "two", "stray"):
        made.layer(name).mkdir()
    return made


def test_only_what_nobody_refers_to_is_deleted(layout: Layout) -> None:
    add_head(layout, "a", layout.layer("one"))
    add_head(layout, "b", layout.layer("two"), layout.layer("one"), layout.head("a"))
    assert OverlayEngine(layout).collect([]) == ["layers/stray"]
    assert {path.name for path in layout.layers.iterdir()} == {"one", "two"}


def test_nothing_is_deleted_where_a_layer_is_missing(layout: Layout) -> None:
    """A data directory that was moved names its layers by the paths that they had."""
    add_head(layout, "a", layout.root.parent / "elsewhere" / "one")
    with pytest.raises(HostError, match="elsewhere/one is missing"):
        OverlayEngine(layout).collect([])
    assert {path.name for path in layout.layers.iterdir()} == {"one", "two", "stray"}
