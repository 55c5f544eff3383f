"""What the overlay engine deletes, and above all what it does not."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from pbkfs.branch.layout import Layout
from pbkfs.branch.overlay import OverlayEngine
from pbkfs.errors import DiffError, HostError
from pbkfs.mount import binding
from pbkfs.mount.binding import BaseAddress, Binding
from pbkfs.overlay.superblock import LayerRef, new_superblock

BINDING = Binding(
    base=BaseAddress("empty"),
    mountpoint="/mnt",
    owner=(0, 0),
    created_at="",
    last_used_at="",
    pbkfs_version="",
    pid=None,
    host="",
    state="released",
    made_directory=True,
)


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
    assert OverlayEngine(layout).collect([], lambda: {"a", "b"}) == ["layers/stray"]
    assert {path.name for path in layout.layers.iterdir()} == {"one", "two"}


def test_nothing_is_deleted_where_a_layer_is_missing(layout: Layout) -> None:
    """A data directory that was moved names its layers by the paths that they had."""
    add_head(layout, "a", layout.root.parent / "elsewhere" / "one")
    with pytest.raises(HostError, match="elsewhere/one is missing"):
        OverlayEngine(layout).collect([], lambda: {"a"})
    assert {path.name for path in layout.layers.iterdir()} == {"one", "two", "stray"}


@pytest.mark.parametrize(("points", "made"), [([], ["a", "b"]), (["p"], ["a"])])
def test_nothing_is_deleted_where_a_head_or_point_is_missing(
    layout: Layout, points: list[str], made: list[str]
) -> None:
    """Its superblock alone says which layers it needs."""
    add_head(layout, "a", layout.layer("one"))
    with pytest.raises(HostError, match=r"(heads/b|points/p) is missing"):
        OverlayEngine(layout).collect(points, lambda: {"a", "b"}, made)
    assert {path.name for path in layout.layers.iterdir()} == {"one", "two", "stray"}


def test_a_head_that_the_store_does_not_know(layout: Layout) -> None:
    used = add_head(layout, "used", layout.layer("one"))
    binding.write_binding(used, BINDING)
    add_head(layout, "never-used", layout.layer("two"))
    layout.head("made-now").mkdir()
    layout.head(".child.seal").mkdir()
    layout.head(".made-now.seal").mkdir()
    for name in ("made-now", "gone"):
        layout.backup(name).mkdir()
    (layout.points / ".x.new").mkdir()
    layout.point("old").mkdir()
    removed = OverlayEngine(layout).collect([], lambda: {"made-now"})
    assert sorted(removed) == [
        "backups/gone",
        "heads/.child.seal",
        "heads/never-used",
        "layers/stray",
        "layers/two",
        "points/.x.new",
        "points/old",
    ]
    assert used.is_dir()


def test_nothing_is_deleted_where_a_head_cannot_be_read(layout: Layout) -> None:
    add_head(layout, "a", layout.layer("one"))
    (layout.head("a") / "superblock.json").write_text("{")
    with pytest.raises(DiffError, match="damaged"):
        OverlayEngine(layout).collect([], lambda: {"a"})
    assert {path.name for path in layout.layers.iterdir()} == {"one", "two", "stray"}
    assert OverlayEngine(layout).sizes({}) == {}
