"""A binding says how to find a diff's base again; options must agree with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pbkfs.errors import DiffError, UsageError
from pbkfs.mount.base import choose_address
from pbkfs.mount.binding import NAME, BaseAddress, Binding, read_binding, write_binding
from pbkfs.mount.request import MountRequest

BOUND = Binding(
    base=BaseAddress("probackup", store="/store", instance="main", backup_id="SBOL94"),
    mountpoint="/mnt/pg",
    owner=(101, 102),
    created_at="2026-01-01T00:00:00Z",
    last_used_at="2026-01-02T00:00:00Z",
    pbkfs_version="0.1.0",
    pid=None,
    host="here",
    state="released",
    made_directory=True,
)


def request(**fields: object) -> MountRequest:
    whole = {"mountpoint": Path("/mnt/pg"), "diff": Path("/diff"), "index_bytes": 1, **fields}
    return MountRequest(**whole)  # type: ignore[arg-type]


def test_binding_comes_back(tmp_path: Path) -> None:
    assert read_binding(tmp_path) is None
    write_binding(tmp_path, BOUND)
    assert read_binding(tmp_path) == BOUND


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"base": 1}', '{"base": {"kind": "x"}}'])
def test_damaged_binding_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(DiffError, match="unreadable"):
        read_binding(tmp_path)


def test_reuse_needs_no_options() -> None:
    assert choose_address(request(), Path("/diff"), BOUND, is_reused=True) == BOUND.base


@pytest.mark.parametrize(
    "fields",
    [
        {"backup_id": "sbol94"},
        {"instance": "main"},
        {"store": Path("/store"), "instance": "main", "backup_id": "SBOL94"},
        {"store": Path("/x/../store")},
    ],
)
def test_agreeing_options_are_accepted(fields: dict[str, object]) -> None:
    found = choose_address(request(**fields), Path("/diff"), BOUND, is_reused=True)
    assert dataclasses.replace(found, backup_id="SBOL94") == BOUND.base


@pytest.mark.parametrize(
    "fields",
    [
        {"backup_id": "SBOL95"},
        {"instance": "other"},
        {"instance": "Main"},
        {"store": Path("/other")},
        {"base_dir": Path("/store")},
        {"is_empty": True},
    ],
)
def test_other_base_is_refused_naming_both(fields: dict[str, object]) -> None:
    with pytest.raises(DiffError, match="belongs to backup SBOL94 of instance main in /store"):
        choose_address(request(**fields), Path("/diff"), BOUND, is_reused=True)


def test_force_accepts_a_store_that_moved_only() -> None:
    moved = request(store=Path("/other"), force=True)
    assert choose_address(moved, Path("/diff"), BOUND, is_reused=True).store == "/other"
    with pytest.raises(DiffError):
        choose_address(
            request(backup_id="SBOL95", force=True), Path("/diff"), BOUND, is_reused=True
        )


def test_new_diff_needs_a_base() -> None:
    with pytest.raises(UsageError, match="new diff /diff"):
        choose_address(request(), Path("/diff"), None, is_reused=False)
    with pytest.raises(UsageError, match="no base is given for diff /diff"):
        choose_address(request(), Path("/diff"), None, is_reused=True)
    with pytest.raises(UsageError, match="store of the backup"):
        choose_address(request(backup_id="X"), Path("/diff"), None, is_reused=False)
