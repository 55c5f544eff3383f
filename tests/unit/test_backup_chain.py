"""Stores, instances, chains: what can be mounted, and what is said when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from handmade import Store, line

from pbkfs.backup import list_backups, open_probackup
from pbkfs.backup.probackup.base import ProbackupBase
from pbkfs.errors import ChainError, FormatError, NotFoundError, PbkfsError, UnsupportedError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def open_base(store: Store, backup_id: str, *, force: bool = False) -> ProbackupBase:
    return open_probackup(store.root, store.instance, backup_id, force=force)


def refusal(store: Store, backup_id: str, *, force: bool = False) -> PbkfsError:
    with pytest.raises(PbkfsError) as caught:
        open_base(store, backup_id, force=force).close()
    return caught.value


def labels(base: ProbackupBase) -> list[str]:
    chain = base.identity["chain"]
    assert isinstance(chain, str)
    base.close()
    return [part.partition(":")[0] for part in chain.split()]


def test_missing_things_say_what_there_is(store: Store, tmp_path: Path) -> None:
    full = store.add()
    with pytest.raises(NotFoundError, match="does not exist"):
        open_probackup(tmp_path / "nowhere", "main", full)
    (tmp_path / "plain").mkdir()
    with pytest.raises(NotFoundError, match="no directory backups"):
        open_probackup(tmp_path / "plain", "main", full)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotFoundError):
        open_probackup(tmp_path / "file", "main", full)
    with pytest.raises(NotFoundError, match="no instance 'other'") as caught:
        open_probackup(store.root, "other", full)
    assert caught.value.hint == "The store has: main."
    with pytest.raises(NotFoundError, match="no backup 'ABCDEF'") as caught:
        open_probackup(store.root, "main", "ABCDEF")
    assert caught.value.hint == f"The instance has: {full}."


@pytest.mark.parametrize("name", ["", ".", "..", "../main", "a/b", "a\0b"])
def test_names_that_are_paths_are_not_found(store: Store, name: str) -> None:
    store.add()
    with pytest.raises(NotFoundError):
        open_probackup(store.root, name, "X")
    with pytest.raises(NotFoundError):
        open_probackup(store.root, "main", name)


def test_ids_are_found_in_either_case_and_by_start_time(store: Store) -> None:
    full = store.add()
    assert labels(open_base(store, full.lower())) == [full]
    # A directory that was renamed: parents are resolved by the start-time of the control file.
    renamed = store.add(name="COPY")
    last = store.add(mode="DELTA", parent=renamed)
    assert labels(open_base(store, last)) == [last, "COPY"]
    assert labels(open_base(store, renamed)) == ["COPY"]
    assert labels(open_base(store, "copy")) == ["COPY"]


def test_parents_are_links_and_not_the_time(store: Store) -> None:
    first = store.add()
    store.add(mode="DELTA", parent=first, status="CORRUPT")
    second = store.add(mode="PAGE", parent=first)
    third = store.add(mode="ptrack", parent=second.lower())
    assert labels(open_base(store, third)) == [third, second, first]


def test_missing_parent(store: Store) -> None:
    middle = store.add(mode="DELTA", parent="GONE12")
    last = store.add(mode="DELTA", parent=middle)
    for force in (False, True):
        error = refusal(store, last, force=force)
        assert isinstance(error, ChainError)
        assert error.message == (
            f"parent GONE12 of backup {middle} is missing (in the chain of {last})"
        )


def test_increment_without_parent(store: Store) -> None:
    error = refusal(store, store.add(mode="DELTA"))
    assert isinstance(error, ChainError)
    assert "names no parent" in error.message


def test_cycles(store: Store) -> None:
    first = store.add(mode="DELTA", parent="X")
    second = store.add(mode="DELTA", parent=first)
    control = store.path / first / "backup.control"
    control.write_text(control.read_text().replace("'X'", second))
    for backup_id in (first, second):
        error = refusal(store, backup_id)
        assert isinstance(error, ChainError)
        assert "cycle" in error.message
    control.write_text(control.read_text().replace(second, first))
    assert "cycle" in refusal(store, first).message


@pytest.mark.parametrize(
    ("status", "is_forcible"),
    [
        ("CORRUPT", True), ("ORPHAN", True), ("RUNNING", False), ("ERROR", False),
        ("MERGING", False), ("MERGED", False), ("DELETING", False), ("DELETED", False),
        ("HIDDEN_FOR_TEST", False), (None, False),
    ],
)  # fmt: skip
def test_statuses(store: Store, status: str | None, is_forcible: bool) -> None:
    full = store.add(status=status)
    last = store.add(mode="DELTA", parent=full)
    shown = status if status and status != "HIDDEN_FOR_TEST" else "UNKNOWN"
    error = refusal(store, full)
    assert isinstance(error, ChainError)
    assert error.message.startswith(f"backup {full} has status {shown}: ")
    assert error.hint
    error = refusal(store, last)
    assert (
        f"backup {last} cannot be mounted: its ancestor {full} has status {shown}" in error.message
    )
    if is_forcible:
        base = open_base(store, last, force=True)
        assert f"Backup {full} has status {status}" in base.notes[0]
        base.close()
    else:
        for backup_id in (full, last):
            assert f"status {shown}" in refusal(store, backup_id, force=True).message
    row = next(row for row in list_backups(store.root, "main") if row.backup_id == last)
    assert (row.is_mountable, row.status) == (False, "OK")
    assert row.reason == error.message


@pytest.mark.parametrize("status", ["OK", "DONE", "ok"])
def test_good_statuses(store: Store, status: str) -> None:
    open_base(store, store.add(status=status)).close()


def test_an_orphan_names_the_cause(store: Store) -> None:
    full = store.add(status="CORRUPT")
    last = store.add(mode="DELTA", parent=full, status="ORPHAN")
    error = refusal(store, last)
    assert f"backup {last} has status ORPHAN" in error.message
    assert f"its ancestor {full} is CORRUPT" in error.message


def test_force_that_would_not_help_is_not_advised(store: Store) -> None:
    full = store.add(status="MERGING")
    last = store.add(mode="DELTA", parent=full, status="CORRUPT")
    error = refusal(store, last)
    assert f"backup {last} has status CORRUPT" in error.message
    assert error.hint == f"Not even --force helps, as backup {full} is MERGING."
    assert f"ancestor {full} has status MERGING" in refusal(store, last, force=True).message


@pytest.mark.parametrize(
    ("version", "is_good"),
    [
        ("2.0.0", True), ("2.1.5", True), ("2.3.5", True), ("2.5.16", True), ("2.5.99", True),
        ("1.1.17", False), ("2.6.0", False), ("3.0.0", False),
    ],
)  # fmt: skip
def test_versions(store: Store, version: str, is_good: bool) -> None:
    backup_id = store.add(program_version=version)
    if is_good:
        open_base(store, backup_id).close()
    else:
        error = refusal(store, backup_id)
        assert isinstance(error, UnsupportedError)
        assert version in error.message


def test_versions_that_lose_lines_are_refused_for_long_lists(store: Store) -> None:
    many = [line(f"base/5/{'x' * 200}{number}") for number in range(12_000)]
    lossy = store.add(*many, program_version="2.2.1")
    error = refusal(store, lossy)
    assert isinstance(error, UnsupportedError)
    assert "loses lines" in error.message
    open_base(store, lossy, force=True).close()
    open_base(store, store.add(program_version="2.2.1")).close()
    open_base(store, store.add(*many, program_version="2.2.2")).close()


def test_what_the_members_say_has_to_fit(store: Store) -> None:
    full = store.add(server_version=14)
    last = store.add(mode="DELTA", parent=full)
    error = refusal(store, last)
    assert isinstance(error, ChainError)
    assert "PostgreSQL 15" in error.message
    assert "14" in error.message
    for key in ("block_size", "xlog_block_size"):
        error = refusal(store, store.add(**{key: 16384}))  # type: ignore[arg-type]
        assert isinstance(error, UnsupportedError)
        assert "16384" in error.message
    error = refusal(store, store.add(server_version="9.6"))
    assert isinstance(error, UnsupportedError)
    for key in ("server_version", "program_version", "backup_mode"):
        error = refusal(store, store.add(**{key: None}))  # type: ignore[arg-type]
        assert isinstance(error, FormatError)
        assert key.replace("_", "-") in error.message


@pytest.mark.parametrize("data", [None, b"", b"\n", b"backup-mode\n", b"\0"])
def test_control_files_that_cannot_be_read(store: Store, data: bytes | None) -> None:
    full = store.add()
    last = store.add(mode="DELTA", parent=full)
    control = store.path / full / "backup.control"
    control.unlink()
    if data is not None:
        control.write_bytes(data)
    for backup_id in (full, last):
        error = refusal(store, backup_id)
        assert isinstance(error, FormatError)
        assert f"backup {full} cannot be read" in error.message
    # Another chain of the instance does not suffer.
    other = store.add()
    open_base(store, other).close()
    rows = {row.backup_id: row for row in list_backups(store.root, "main")}
    assert [name for name, row in rows.items() if row.is_mountable] == [other]
    assert rows[full].status == "UNKNOWN"


def test_control_files_are_not_followed_or_hung_upon(store: Store, tmp_path: Path) -> None:
    full = store.add()
    control = store.path / full / "backup.control"
    target = tmp_path / "elsewhere"
    control.rename(target)
    control.symlink_to(target)
    with pytest.raises(PbkfsError, match=r"cannot be read"):
        open_base(store, full)
    control.unlink()
    control.mkdir()
    with pytest.raises(PbkfsError, match="is a directory"):
        open_base(store, full)
    control.rmdir()
    with control.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(PbkfsError, match="larger than"):
        open_base(store, full)


def test_backup_that_is_a_link_is_told_and_refused(store: Store, tmp_path: Path) -> None:
    full = store.add()
    (store.path / full).rename(tmp_path / "elsewhere")
    (store.path / full).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PbkfsError, match="is a symbolic link"):
        open_base(store, full)
    [row] = list_backups(store.root, "main")
    assert (row.is_mountable, row.status) == (False, "UNKNOWN")


def test_directories_above_backups_may_be_links(store: Store, tmp_path: Path) -> None:
    """Who owns the store may have it on several disks."""
    full = store.add()
    for path in (store.path, store.path.parent):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    open_base(store, full).close()


def test_listing(store: Store) -> None:
    full = store.add()
    last = store.add(mode="DELTA", parent=full)
    (store.path / ".hidden").mkdir()
    (store.path / "notes.txt").write_text("x")
    (store.path / "EMPTY0").mkdir()
    rows = list_backups(store.root, "main")
    assert {row.backup_id for row in rows} == {full, last, "EMPTY0"}
    newest = next(row for row in rows if row.backup_id == last)
    assert (newest.mode, newest.parent_id, newest.stream) == ("DELTA", full, True)
    assert (newest.pg_version, newest.program_version) == ("15", "2.5.16")
    assert newest.start_lsn == 0x1000028
    assert newest.is_mountable
