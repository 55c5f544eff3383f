"""The offline check of a diff: silent on what is sound, and every kind of damage is found."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conformance.file_machine import PAGE, pattern
from conformance.tree_place import TreePlace, open_place

from pbkfs import durable
from pbkfs.errors import DiffError
from pbkfs.overlay.check import Report, check_diff
from pbkfs.overlay.journal import (
    HEADER_BYTES,
    Synced,
    encode_frame,
    encode_limit,
    encode_pages,
    encode_session,
    find_frames,
    is_damaged,
)

RELATION = "base/5/16384"


@pytest.fixture
def used(tmp_path: Path) -> Iterator[TreePlace]:
    """A diff with a whole and a mapped copy and a new file, pg_wal moved out, all durable."""
    with open_place(tmp_path) as place:
        (place.lower / "base/5").mkdir(parents=True)
        (place.lower / "pg_wal").mkdir()
        (place.lower / RELATION).write_bytes(pattern(1, 4 * PAGE))
        (place.lower / "conf").write_bytes(b"as it was\n")
        place.open()
        (place.diff_path / "pg_wal").mkdir()
        place.tree.wal_out()
        write(place, "conf", b"changed\n")
        write(place, RELATION, pattern(2, PAGE), PAGE)
        write(place, "new", b"new content", flags=os.O_CREAT)
        place.close()
        yield place


def write(place: TreePlace, path: str, data: bytes, offset: int = 0, flags: int = 0) -> None:
    handle = place.driver.open(path.encode(), os.O_RDWR | flags)
    place.driver.pwrite(handle, data, offset)
    place.driver.close(handle)


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def check(place: TreePlace) -> Report:
    before = contents(place.diff_path)
    report = check_diff(place.diff_path, place.base)
    assert contents(place.diff_path) == before, "a check has to leave all as it is"
    return report


def object_of(place: TreePlace, path: str) -> Path:
    tree = place.open()
    object_id = tree._namespace.resolve(path.encode()).pieces[0].object_id  # type: ignore[attr-defined]
    place.close()
    return place.diff_path / f"objects/{object_id & 255:02x}/{object_id:x}"


def append(place: TreePlace, *payloads: bytes) -> None:
    with (place.diff_path / "journal").open("ab") as journal:
        journal.write(b"".join(map(encode_frame, payloads)))


def test_sound_diff_gives_nothing(used: TreePlace) -> None:
    report = check(used)
    assert report.findings == []
    assert report.is_clean
    assert report.counts["objects"] == 3
    assert report.counts["mapped"] == 1
    assert report.counts["names"] == 4


def test_new_diff_is_sound(tmp_path: Path) -> None:
    with open_place(tmp_path) as place:
        place.open()
        place.close()
        assert check(place).findings == []


def test_diff_of_a_dead_worker_is_sound(used: TreePlace) -> None:
    used.open()
    write(used, RELATION, pattern(3, PAGE), 3 * PAGE)
    used.driver.unlink(b"conf")
    used.drop()
    report = check(used)
    assert report.is_clean, report.findings
    assert {finding.kind for finding in report.findings} <= {"orphans"}


def test_sealed_layers_are_looked_at(used: TreePlace) -> None:
    below = object_of(used, RELATION)
    used.open()
    used.seal()
    (used.diff_path / "pg_wal").mkdir()
    write(used, RELATION, pattern(4, PAGE), 2 * PAGE)
    used.close()
    assert check(used).findings == []
    below.unlink()
    assert "object_missing" in kinds(used)


def kinds(place: TreePlace) -> set[str]:
    """The kinds of the errors found."""
    report = check(place)
    assert not report.is_clean
    return {finding.kind for finding in report.findings if finding.severity == "error"}


def damage_superblock(place: TreePlace) -> None:
    (place.diff_path / "superblock.json").write_text("{}")


def other_base(place: TreePlace) -> None:
    place.base.identity = {"kind": "directory", "path": "/elsewhere"}


def damage_header(place: TreePlace) -> None:
    with (place.diff_path / "journal").open("r+b") as journal:
        journal.write(b"XXXX")


def lose_journal(place: TreePlace) -> None:
    (place.diff_path / "journal").unlink()


def damage_record_before_a_mount(place: TreePlace) -> None:
    place.open()
    place.close()
    with (place.diff_path / "journal").open("r+b") as journal:
        journal.seek(HEADER_BYTES + 30)
        journal.write(b"\xff\xff")


def add_unknown_record(place: TreePlace) -> None:
    append(place, b"\x63")


def add_unknown_page_record(place: TreePlace) -> None:
    append(place, b"\x0b")


def add_record_that_does_not_fit(place: TreePlace) -> None:
    append(place, b"\x14\4\0gone")


def lose_object(place: TreePlace) -> None:
    object_of(place, RELATION).unlink()


def make_object_a_directory(place: TreePlace) -> None:
    path = object_of(place, "conf")
    path.unlink()
    path.mkdir()


def map_more_than_there_is(place: TreePlace) -> None:
    number = int(object_of(place, RELATION).name, 16)
    append(place, *encode_pages(number, b"\0\1"))


def map_a_whole_object(place: TreePlace) -> None:
    append(place, encode_limit(int(object_of(place, "conf").name, 16), 1))


def lose_wal(place: TreePlace) -> None:
    shutil.rmtree(place.diff_path / "pg_wal")


def wal_is_a_link(place: TreePlace) -> None:
    lose_wal(place)
    (place.diff_path / "pg_wal").symlink_to("/")


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (damage_superblock, "superblock"),
        (other_base, "base"),
        (damage_header, "journal"),
        (lose_journal, "journal"),
        (damage_record_before_a_mount, "journal"),
        (add_unknown_record, "names"),
        (add_unknown_page_record, "journal"),
        (add_record_that_does_not_fit, "names"),
        (lose_object, "object_missing"),
        (make_object_a_directory, "object_type"),
        (map_more_than_there_is, "page_map"),
        (map_a_whole_object, "page_map"),
        (lose_wal, "pg_wal"),
        (wal_is_a_link, "pg_wal"),
    ],
)
def test_damage_is_found(used: TreePlace, damage: Callable[[TreePlace], None], kind: str) -> None:
    damage(used)
    assert kind in kinds(used)


def test_what_a_crash_leaves_is_noted(used: TreePlace) -> None:
    relation = object_of(used, RELATION)
    tree = used.open()
    used.driver.close(used.driver.open(b"fresh", os.O_WRONLY | os.O_CREAT))
    tree.sync()
    object_id = tree._namespace.resolve(b"fresh").pieces[0].object_id  # type: ignore[attr-defined]
    new = used.diff_path / f"objects/{object_id & 255:02x}/{object_id:x}"
    used.drop()
    os.truncate(relation, 2 * PAGE)
    new.unlink()
    (new.parent / "ff.tmp").touch()
    (used.diff_path / "objects/fe/fe").parent.mkdir(exist_ok=True)
    (used.diff_path / "objects/fe/fe").touch()
    (used.diff_path / ".superblock.json.1.tmp").touch()
    (used.diff_path / "photo.jpg").touch()
    with (used.diff_path / "journal").open("ab") as journal:
        journal.write(b"\0" * 100)
    report = check(used)
    assert report.is_clean
    found = [finding.kind for finding in report.findings]
    assert sorted(found) == sorted(
        ["journal_tail", "object_lost", "orphans", "orphans", "truncation", "leftover", "stranger"]
    )


def test_without_a_base_the_rest_is_checked(used: TreePlace) -> None:
    assert check_diff(used.diff_path, None).findings == []
    damage_header(used)
    assert not check_diff(used.diff_path, None).is_clean


def test_journal_damaged_before_a_mount_is_refused(used: TreePlace) -> None:
    """Cutting off what follows would quietly lose what was durable once."""
    damage_record_before_a_mount(used)
    before = contents(used.diff_path)
    with pytest.raises(DiffError, match="what follows was durable once"):
        used.open()
    assert contents(used.diff_path) == before


@pytest.mark.parametrize("at", [HEADER_BYTES + 30, -80, -30])
def test_journal_damaged_after_its_last_mount_is_refused(used: TreePlace, at: int) -> None:
    """A clean end leaves no torn tail, so what does not check is damage and not to be cut off."""
    with (used.diff_path / "journal").open("r+b") as journal:
        journal.seek(at, os.SEEK_SET if at > 0 else os.SEEK_END)
        byte = journal.read(1)[0]
        journal.seek(-1, os.SEEK_CUR)
        journal.write(bytes([byte ^ 1]))
    before = contents(used.diff_path)
    with pytest.raises(DiffError, match="damaged"):
        used.open()
    assert contents(used.diff_path) == before


@pytest.mark.expect_log("the end of the journal is not marked")
def test_clean_end_that_cannot_be_marked_is_an_end(
    used: TreePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(label: str) -> None:
        if label == "journal:end:append":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    used.open()
    monkeypatch.setattr(durable, "on_step", fill_disk)
    used.close()
    monkeypatch.undo()
    used.open()
    assert used.driver.read_file(b"new") == b"new content"


def test_record_that_native_code_does_not_know_is_refused(used: TreePlace) -> None:
    add_unknown_page_record(used)
    with pytest.raises(DiffError, match="not of its format"):
        used.open()


def test_what_a_mark_in_a_tail_says() -> None:
    """That of a session speaks of all before it, another one of what it names."""
    session = encode_frame(encode_session(bytes(range(16))))
    assert list(find_frames(session + session + b"torn")) == [encode_session(bytes(range(16)))] * 2
    for mark in (session, encode_frame(Synced(1001, 7).encode())):
        assert is_damaged(b"x" * 100 + mark, 1000)
        assert is_damaged(mark[:10] + mark, 1000)
        assert not is_damaged(b"x" * 100 + mark[:-1], 1000)
        assert not is_damaged(b"x" * 100 + mark[:-1] + b"!", 1000)
        assert not is_damaged(mark[4:], 1000)
    # The bad frame came after what was synced: the mark reached the disk before it.
    assert not is_damaged(b"x" * 100 + encode_frame(Synced(1000, 7).encode()), 1000)
