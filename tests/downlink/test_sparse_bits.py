"""Rows of bits: numbers take the bits they need where they need them; nothing stale is read."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.downlink.disk import sparse_bits
from dare_agg.downlink.disk.mapped import PAGE_BYTES
from dare_agg.downlink.disk.sparse_bits import SparseBits, create_sparse
from dare_agg.errors import StateError

BASE = "ab" * 32
SIZE = 1_000_000
END = sparse_bits._file_bytes(SIZE)


def made(folder: Path, size: int = SIZE) -> SparseBits:
    create_sparse(folder / "bits", "high", size, BASE)
    return SparseBits(folder / "bits", "high", size, BASE)


def put(bits: SparseBits, where, numbers) -> None:
    bits.write(where, bits.read(where), None if numbers is None else np.array(numbers, np.uint16))


def room(folder: Path) -> int:
    return (folder / "bits").stat().st_blocks * 512


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 16))
def test_what_was_written_is_read(tmp_path_factory, seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    folder, size = tmp_path_factory.mktemp("bits"), int(rng.integers(1, 30_000))
    bits, plain = made(folder, size), np.zeros(size, np.uint16)
    for _ in range(6):
        lo, hi = np.sort(rng.integers(0, size + 1, 2))
        where = slice(int(lo), int(hi))
        if rng.random() < 0.5:
            where = np.unique(rng.integers(0, size, 200))
        numbers = rng.integers(0, 1 << width, plain[where].size).astype(np.uint16)
        plain[where] = 0 if rng.random() < 0.2 else numbers
        put(bits, where, plain[where] if plain[where].any() else None)
    found = bits.read(slice(0, size))
    np.testing.assert_array_equal(np.zeros(size) if found is None else found, plain)
    bits.close()
    again = SparseBits(folder / "bits", "high", size, BASE)
    some = np.unique(rng.integers(0, size, 500))
    found = again.read(some)
    np.testing.assert_array_equal(np.zeros(some.size) if found is None else found, plain[some])


def test_numbers_take_the_bits_they_need(tmp_path: Path) -> None:
    for width, taken in ((3, 4), (6, 6), (7, 7), (8, 8)):
        folder = tmp_path / str(width)
        folder.mkdir()
        bits = made(folder)
        put(bits, np.arange(0, SIZE, 9), np.full(-(-SIZE // 9), (1 << width) - 1))
        assert room(folder) <= SIZE * taken / 8 + 0.03 * SIZE + (1 << 18)
        # A large one among them costs a block of its rows.
        put(bits, np.array([SIZE // 2]), [40_000])
        assert room(folder) <= SIZE * taken / 8 + 0.03 * SIZE + (1 << 18) + (1 << 15)


@pytest.mark.parametrize("knows_holes", [True, False])
def test_what_a_lost_round_wrote_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows_holes: bool
) -> None:
    """A power cut after which the units are on the disk, and what names them is not."""
    if not knows_holes:  # all of a file is data
        monkeypatch.setattr(os, "lseek", lambda handle, at, how: at if how == os.SEEK_DATA else END)
    bits = made(tmp_path)
    put(bits, np.arange(5000), np.full(5000, 0xFFFF))
    bits.close()
    with (tmp_path / "bits").open("r+b") as file:
        file.seek(PAGE_BYTES)
        file.write(bytes(4 * len(sparse_bits.WIDTHS) * 977))
    again = SparseBits(tmp_path / "bits", "high", SIZE, BASE)
    assert again.empty
    put(again, np.array([7, 900_000]), [0x8FFF, 0x7FFF])
    expected = np.zeros(SIZE, np.uint16)
    expected[[7, 900_000]] = 0x8FFF, 0x7FFF
    np.testing.assert_array_equal(again.read(slice(0, SIZE)), expected)
    assert room(tmp_path) < SIZE // 2


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = made(tmp_path)
    put(bits, np.arange(3000), np.arange(3000) % 16)
    before = bits.read(slice(0, SIZE))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    everywhere = np.arange(0, SIZE, 7)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StateError, match="No space left on device; free space"):
            put(bits, everywhere, np.full(everywhere.size, 0xFFFF))
    np.testing.assert_array_equal(bits.read(slice(0, SIZE)), before)
    put(bits, everywhere, np.full(everywhere.size, 0xFFFF))
    np.testing.assert_array_equal(bits.read(everywhere), np.full(everywhere.size, 0xFFFF))


def test_files_of_the_first_form_are_refused(tmp_path: Path) -> None:
    """Two rows of bytes without a page that says what they are, as they were once."""
    (tmp_path / "bits").write_bytes(bytes(2 * (1 << 16)))
    with pytest.raises(StateError, match="is no file of high"):
        SparseBits(tmp_path / "bits", "high", 60_000, BASE)
    create_sparse(tmp_path / "bits", "high", 60_000, BASE)
    with pytest.raises(StateError, match="are of 60000 parameters"):
        SparseBits(tmp_path / "bits", "high", 60_001, BASE)
