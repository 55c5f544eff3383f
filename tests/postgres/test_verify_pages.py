"""``mount --verify-pages``: pages of the base are looked at before a server gets them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from catalog_format import page_checksum
from catalog_writer import CatalogWriter
from fix_mounts import Mount, Mounts, run_pbkfs
from fix_postgres import Cluster, wait_until
from machine import postgres_bindir
from servers import MountedServer

N_ROWS = 5000


@pytest.fixture
def prepared(newest_cluster: Cluster) -> Cluster:
    """A cluster with checksums and two tables, stopped."""
    cluster = newest_cluster
    cluster.programs.run("pg_checksums", "--enable", "-D", cluster.pgdata, check=False)
    cluster.start()
    assert cluster.setting("data_checksums") == "on"
    cluster.sql(
        f"create table good as select n, repeat('x', 100) s from generate_series(1, {N_ROWS}) n",
        f"create table bad as select n, repeat('y', 100) s from generate_series(1, {N_ROWS}) n",
        "create index on good (n)",
        "create unlogged table u as select 1 as n",
        "vacuum",
    )
    return cluster


def open_to_all(store: Path) -> None:
    for directory, _, names in os.walk(store):
        os.chmod(directory, 0o755)
        for name in names:
            os.chmod(os.path.join(directory, name), 0o644)


def check(mount: Mount, bindir: Path, relation: str, layer: str) -> None:
    """All but one page is right: everything can be read but that."""
    server = MountedServer(mount, bindir)
    server.start("-c", "autovacuum=off", "-c", "ignore_checksum_failure=on")
    server.run("pg_amcheck", "-d", "postgres", "--install-missing", "--exclude-table=bad")
    assert server.sql("select count(s) from good") == str(N_ROWS)
    assert server.sql("select count(s) from bad where ctid < '(2,1)'") > "0"
    with pytest.raises(AssertionError, match=r"could not read block.*Input/output error"):
        server.sql("select count(s) from bad")
    words = (f"{relation} block=3 layer={layer}", "page has a wrong checksum")
    wait_until(
        lambda: any(all(map(line.__contains__, words)) for line in mount.unexpected_log_lines())
    )
    found = mount.stat()
    assert found["verifies"] == "checksum"
    assert found["overlay"]["verify_errors"] > 0
    assert found["overlay"]["pages_verified"] > 500
    assert "by checksum" in run_pbkfs("stat", "-D", mount.pgdata).stdout
    # Writes go on, and what was written is not of the base.
    server.sql("update good set n = n", "checkpoint")
    server.stop()
    mount.unmount()


def test_pages_of_a_chain(prepared: Cluster, mounts: Mounts, place: Path) -> None:
    relation = prepared.sql("select pg_relation_filepath('bad')")
    prepared.stop()
    # A raw page that differs in one bit of a row: nothing but its checksum tells.
    path = prepared.pgdata / relation
    content = bytearray(path.read_bytes())
    content[3 * 8192 + 8000] ^= 1
    path.write_bytes(content)
    assert page_checksum(content[3 * 8192 : 4 * 8192], 3) != int.from_bytes(
        content[24584:24586], "little"
    )
    store = place / "store"
    backup = CatalogWriter(store).add(prepared.pgdata, compress="none")
    open_to_all(store)
    mount = mounts.prepare("-B", store, "-i", "latest")
    mount.mount("--verify-pages")
    check(mount, postgres_bindir(prepared.programs.major), relation, backup)

    # Off by default: the bit is PostgreSQL's to find.
    mount.mount()
    assert mount.stat()["verifies"] is None
    assert (mount.pgdata / relation).read_bytes() == content
    mount.unmount()


def test_pages_of_a_directory(prepared: Cluster, mounts: Mounts) -> None:
    relation = prepared.sql("select pg_relation_filepath('bad')")
    prepared.stop()
    path = prepared.pgdata / relation
    content = bytearray(path.read_bytes())
    content[3 * 8192 + 8000] ^= 1
    path.write_bytes(content)
    mount = mounts.prepare("--base", prepared.pgdata)
    mount.mount("--verify-pages")
    check(mount, postgres_bindir(prepared.programs.major), relation, "base")
    # A part of a page is looked at as a whole.
    mount.mount("--verify-pages")
    with open(mount.pgdata / relation, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(file.fileno(), 100, 2 * 8192 + 5000) == content[2 * 8192 + 5000 :][:100]
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 100, 3 * 8192 + 100)
    # A bad page can be replaced, and even in halves: it is not read for that.
    with open(mount.pgdata / relation, "r+b") as file:
        file.seek(3 * 8192 + 4096)
        file.write(content[3 * 8192 + 4096 : 4 * 8192])
        file.flush()
        os.fsync(file.fileno())
    mount.unmount()
    mount.mount("--verify-pages")
    assert (mount.pgdata / relation).read_bytes() == content
    mount.unmount()


def test_without_checksums_headers_are_looked_at(newest_cluster: Cluster, mounts: Mounts) -> None:
    cluster = newest_cluster
    cluster.programs.run("pg_checksums", "--disable", "-D", cluster.pgdata, check=False)
    path = next((cluster.pgdata / "base" / "1").glob("1259"))
    content = bytearray(path.read_bytes())
    content[8192 + 14 : 8192 + 16] = b"\xff\xff"  # pd_upper
    path.write_bytes(content)
    mount = mounts.prepare("--base", cluster.pgdata)
    mount.mount("--verify-pages")
    with open(mount.pgdata / "base" / "1" / "1259", "rb") as file:
        assert os.pread(file.fileno(), 8192, 0) == content[:8192]
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), 8192, 8192)
    found = json.loads(run_pbkfs("stat", "-D", mount.pgdata, "-o", "json").stdout)
    assert found["verifies"] == "header"
    assert any("impossible header" in line for line in mount.unexpected_log_lines())
    mount.unmount()
