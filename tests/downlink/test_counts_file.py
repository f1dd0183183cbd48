"""Counts in a file: as an int32 vector, in two bytes; widening; damage is told, not read."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.downlink.disk.counts_file import create_counts, forget_counts, open_counts
from dare_agg.errors import StateError

BASE, NEXT = "ab" * 32, "cd" * 32
SIZE = 200_000
EDGES = (0, 1, -1, 32767, 32768, -32768, -32769, 65535, 65536, 2**31 - 1, -(2**31) + 1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(("run", "positions")))
def test_it_holds_what_an_int32_vector_holds(tmp_path_factory, seed, kind):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("counts") / "counts"
    plain = np.zeros(SIZE, np.int32)
    with create_counts(path, SIZE, BASE) as counts:
        for _ in range(4):
            lo, hi = np.sort(rng.integers(0, SIZE, 2))
            where = slice(int(lo), int(hi))
            if kind == "positions":
                where = np.unique(rng.integers(lo, hi + 1, 300))
            moved = rng.choice(EDGES, plain[where].size).astype(np.int64)
            plain[where] = moved
            counts[where] = moved
            np.testing.assert_array_equal(counts[where], plain[where])
        np.testing.assert_array_equal(counts[:], plain)
        counts.mark(NEXT)
    with open_counts(path, SIZE, BASE) as again:
        assert again.version == NEXT and not again.dirty
        np.testing.assert_array_equal(again[:], plain)
        some = np.unique(rng.integers(0, SIZE, 1000))
        np.testing.assert_array_equal(again[some], plain[some])


def test_high_halves_take_room_only_where_they_are(tmp_path: Path) -> None:
    size = 10_000_000
    with create_counts(tmp_path / "counts", size, BASE) as counts:
        high = tmp_path / "counts.high"
        counts[100:200] = np.full(100, 32767)
        assert not counts.widened and high.stat().st_blocks * 512 < 1 << 14
        counts[np.array([5_000_000])] = np.array([-70_000])
        assert counts.widened and high.stat().st_blocks * 512 < 1 << 19
        counts[np.array([5_000_000])] = np.array([3])
        assert counts[4_999_999:5_000_002].tolist() == [0, 3, 0]


def test_a_file_that_was_being_moved_says_so(tmp_path: Path) -> None:
    counts = create_counts(tmp_path / "counts", 10, BASE)
    assert counts.version == BASE
    counts.mark(BASE, dirty=True)
    counts[0:3] = np.arange(3)
    counts.close()
    with open_counts(tmp_path / "counts", 10, BASE) as again:
        assert again.dirty and again.version == BASE


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]),
        lambda path: path.write_bytes(path.read_bytes()[:50] + b"\1" + path.read_bytes()[51:]),
        lambda path: path.with_name("counts.high").unlink(),
        lambda path: path.with_name("counts.high").write_bytes(b"less"),
        lambda path: path.unlink(),
    ],
)
def test_what_is_not_whole_is_refused_and_left(tmp_path: Path, damage) -> None:
    path = tmp_path / "counts"
    create_counts(path, 1000, BASE).close()
    damage(path)
    there = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(StateError):
        open_counts(path, 1000, BASE)
    assert there == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    forget_counts(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "base"), [(999, BASE), (1000, NEXT)])
def test_counts_of_another_model_are_refused(tmp_path: Path, size: int, base: str) -> None:
    create_counts(tmp_path / "counts", 1000, BASE).close()
    with pytest.raises(StateError, match="are of 1000 parameters"):
        open_counts(tmp_path / "counts", size, base)


def test_a_full_disk_is_met_when_the_file_is_made(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from dare_agg.downlink.disk.counts_file import create_counts\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        f"create_counts(Path({str(tmp_path / 'counts')!r}), 1 << 20, {BASE!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StateError" in done.stderr and os.strerror(errno.EFBIG) in done.stderr
    assert not list(tmp_path.iterdir())
