"""Checksums, pglz and scans against the plain reference, with good and with mutated input."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import reference
from catalog_format import pglz_compress
from hypothesis import given
from hypothesis import strategies as st
from native_store import BLCKSZ, Layer, page

from pbkfs import _native


def test_crc32c_known_answer() -> None:
    assert _native.crc32c(b"123456789") == 0xE3069283
    assert _native.crc32c(memoryview(b"6789"), _native.crc32c(b"12345")) == 0xE3069283


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_crc32c_is_the_references(data: bytes, cut: int) -> None:
    assert _native.crc32c(data) == reference.crc32c(data)
    assert _native.crc32c(data[cut:], _native.crc32c(data[:cut])) == reference.crc32c(data)


def test_crc32c_of_a_large_buffer() -> None:
    data = os.urandom(100_001)
    assert _native.crc32c(data) == reference.crc32c(data)


def test_crc32c_argument_out_of_range() -> None:
    with pytest.raises(OverflowError):
        _native.crc32c(b"", 1 << 32)


@given(seed=st.integers(0, 1000), size=st.integers(0, BLCKSZ))
def test_pglz_round_trip(seed: int, size: int) -> None:
    content = page(seed)[:size]
    assert _native.pglz_decompress(pglz_compress(content), size) == content


@given(seed=st.integers(0, 40), data=st.data())
def test_pglz_damage_is_judged_as_by_the_reference(seed: int, data: st.DataObject) -> None:
    packed = bytearray(pglz_compress((bytes(range(97, 123)) * 20 + page(seed))[:2000]))
    for _ in range(data.draw(st.integers(0, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    packed = packed[: data.draw(st.just(len(packed)) | st.integers(0, len(packed)))]
    size = data.draw(st.just(2000) | st.integers(0, 3000))
    try:
        expected = reference.pglz_decompress(bytes(packed), size)
    except reference.Damage:
        with pytest.raises(ValueError, match="damaged"):
            _native.pglz_decompress(packed, size)
    else:
        assert _native.pglz_decompress(packed, size) == expected


@pytest.mark.parametrize("size", [-1, 1 << 40])
def test_pglz_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        _native.pglz_decompress(b"", size)


@given(
    blocks=st.sets(st.integers(0, 300), max_size=40),
    compress=st.sampled_from([0, 1, 2]),
    is_padded=st.booleans(),
    marker=st.none() | st.integers(0, 300),
    data=st.data(),
)
def test_scan_is_the_references(
    tmp_path_factory: pytest.TempPathFactory,
    blocks: set[int],
    compress: int,
    is_padded: bool,
    marker: int | None,
    data: st.DataObject,
) -> None:
    root = tmp_path_factory.mktemp("scan")
    layer = Layer(
        {b: page(b) for b in blocks},
        compress,
        is_padded=is_padded,
        has_headers=False,
        marker=marker,
    )
    layer.store(root, "file")
    stored = bytearray((root / "file").read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        if stored:
            # Most damage is to be in the headers, as bytes of pages say nothing here.
            starts = [*layer.positions.values()] or [0]
            at = data.draw(st.sampled_from(starts)) + data.draw(st.integers(0, 7))
            stored[min(at, len(stored) - 1)] = data.draw(st.integers(0, 255))
    (root / "file").write_bytes(
        stored[: data.draw(st.just(len(stored)) | st.integers(0, len(stored)))]
    )
    size = data.draw(st.just(len(stored)) | st.integers(0, len(stored) + 20))
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            expected = reference.scan_pages(fd, b"file", size, is_padded)
        except OSError:
            expected = None
        if expected is not None and expected[1] > 1 << 24:
            expected = None  # more blocks than are believed
        try:
            found = _native.scan_pages(fd, b"file", size, is_padded)
        except OSError:
            found = None
        # Padding that is cut off at the end is damage here and nothing to the reference.
        assert found == expected or (is_padded and found is None)
    finally:
        os.close(fd)


def test_scan_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(struct.pack("<Ii", 0, 9000) + bytes(9000))
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError, match="impossible length"):
            _native.scan_pages(fd, b"file", 9008, False)
        with pytest.raises(FileNotFoundError):
            _native.scan_pages(fd, b"none", 9008, False)
        with pytest.raises(OSError, match="longer than any segment"):
            _native.scan_pages(fd, b"file", 1 << 40, False)
    finally:
        os.close(fd)
