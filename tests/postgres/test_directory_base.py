"""Data directories of real servers of every major as bases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fix_postgres import Programs, copy_tree, kill_servers
from machine import MAJORS
from reference import crc32c, read_sources

from pbkfs.backup import Base, BaseEntry, Kind, open_directory
from pbkfs.errors import BusyError
from pbkfs.pgdata import format_lsn, is_page_new, is_page_sane, is_relation_file, read_control_file


def walk(base: Base, path: bytes = b"") -> Iterator[tuple[bytes, BaseEntry]]:
    for entry in base.scandir(path):
        below = path + b"/" + entry.name if path else entry.name
        yield below, entry
        if entry.kind is Kind.DIR:
            yield from walk(base, below)


@pytest.mark.parametrize("major", MAJORS)
def test_cluster_of_each_major(
    major: int, all_programs: Callable[[int], Programs], templates: Callable[[Programs], Path]
) -> None:
    programs = all_programs(major)
    pgdata = templates(programs)
    said = dict(
        re.split(r":\s+", line, maxsplit=1)
        for line in programs.run("pg_controldata", "-D", pgdata).splitlines()
        if re.search(r":\s+", line)
    )
    raw = (pgdata / "global/pg_control").read_bytes()
    control = read_control_file(raw, crc32c)
    assert str(control.system_identifier) == said["Database system identifier"]
    assert str(control.pg_control_version) == said["pg_control version number"]
    assert str(control.catalog_version) == said["Catalog version number"]
    assert format_lsn(control.checkpoint_lsn) == said["Latest checkpoint location"]
    assert format_lsn(control.redo_lsn) == said["Latest checkpoint's REDO location"]
    assert str(control.tli) == said["Latest checkpoint's TimeLineID"]
    assert str(control.block_size) == said["Database block size"]
    assert str(control.relation_segment_blocks) == said["Blocks per segment of large relation"]
    assert str(control.wal_segment_size) == said["Bytes per WAL segment"]
    assert str(control.data_checksum_version) == said["Data page checksum version"]

    base = open_directory(pgdata)
    try:
        assert base.pg_major == major
        assert base.owner == (programs.user.uid, programs.user.gid)
        seen = dict(walk(base))
        hidden = {b"postmaster.opts"}
        assert seen.keys() | hidden == hidden | {
            bytes(path.relative_to(pgdata)) for path in pgdata.rglob("*")
        }
        n_pages = 0
        for path, entry in seen.items():
            if is_relation_file(path) and entry.size and n_pages < 200:
                page = read_sources(base.sources(path), entry.size)[:8192]
                assert is_page_new(page) or is_page_sane(page), path
                n_pages += 1
        assert n_pages == 200
    finally:
        base.close()


def test_directory_of_a_running_server_is_refused(
    newest_programs: Programs, templates: Callable[[Programs], Path], place: Path
) -> None:
    programs = newest_programs
    pgdata = copy_tree(templates(programs), place / "data")
    programs.user.give(place)
    with (pgdata / "postgresql.conf").open("a") as conf:
        conf.write(f"listen_addresses = ''\nunix_socket_directories = '{place}'\n")
    programs.run("pg_ctl", "-w", "-D", pgdata, "-l", place / "log", "start")
    try:
        with pytest.raises(BusyError, match="runs on"):
            open_directory(pgdata)
        pid_file = (pgdata / "postmaster.pid").read_bytes()
    finally:
        kill_servers(place, patience_s=0)
    # Its pid file is still there, as after a power cut.
    assert (pgdata / "postmaster.pid").read_bytes().splitlines()[0] == pid_file.splitlines()[0]
    base = open_directory(pgdata)
    assert b"postmaster.pid" not in {entry.name for entry in base.scandir(b"")}
    base.close()
