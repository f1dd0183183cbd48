"""Merging updates: memory does not grow with the clients, and no path changes a bit."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from dare_agg.codec import kept_groups as decoded
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import Update, decode_update, encode_update
from dare_agg.merge import ties_listed
from dare_agg.merge.engine import merge_deltas
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.model import ModelRef


def updates_of(clients: int, size: int, drop_rate: str, mask: str = "stratified") -> list[Update]:
    layout = layout_of({"w": (size,)})
    ref = ModelRef("00" * 32, layout.fingerprint, size)
    terms = UpdateTerms(parse_drop_rate(drop_rate), mask=mask)
    delta = np.random.default_rng(0).normal(0, 1e-3, size).astype(np.float32)
    plans = make_plans(bytes(32), 1, [None] * clients, terms, ref)
    return [decode_update(encode_update(p.spec(), delta), p.spec()) for p in plans]


def counted_by_hand(updates: list[Update]) -> tuple[float, float, float]:
    rows = np.empty((len(updates), updates[0].size), np.float32)
    for update, row in zip(updates, rows, strict=True):
        update.read(0, row.size, row)
    present, signs = (rows != 0).sum(axis=0), [(rows > 0).any(axis=0), (rows < 0).any(axis=0)]
    touched, lone = int((present > 0).sum()), int((present == 1).sum())
    conflict = int((signs[0] & signs[1]).sum())
    return touched / rows.shape[1], lone / max(1, touched), conflict / max(1, touched - lone)


@pytest.mark.parametrize("drop_rate", ["0.9", "0.5"])
@pytest.mark.parametrize("mask", ["stratified", "bernoulli"])
@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_what_is_measured_on_the_way_is_what_the_rows_say(drop_rate, mask, method):
    size = 30_000
    layout = layout_of({"a": (100, 100), "b": (size - 10_000,)})
    updates = updates_of(7, size, drop_rate, mask)
    expected = counted_by_hand(updates)
    options = {"trim": 0.0} if method == "ties" else {}
    # Weights of their own for each tensor: tiles are then read in several pieces.
    for weights in (None, np.full((7, 2), 0.25)):
        for tile, threads in ((1 << 16, 1), (999, 3)):
            _, found = merge_deltas(
                layout, updates, method, weights=weights, options=options, tile=tile,
                threads=threads,
            )  # fmt: skip
            assert (found.touched, found.lone, found.sign_conflict) == expected


@pytest.mark.parametrize("normalize", ["agreeing", "expected", "none", "max"])
@pytest.mark.parametrize("tie", ["majority", "majority-or-negative", "positive"])
def test_listed_at_once_or_one_by_one_is_the_same(normalize, tie, monkeypatch):
    size = 20_000
    layout = layout_of({"w": (size,)})
    # A shared mask and opposite weights, so that sums of 0 occur.
    one, other = updates_of(2, size, "0.9")
    for weights in ([0.5, -0.5, 0.25], [0.2, 0.3, 0.4]):
        options = {"trim": 0.0, "normalize": normalize, "sign-tie": tie}
        results = []
        for at_once in (1 << 20, 0):
            monkeypatch.setattr(ties_listed, "_AT_ONCE", at_once)
            results.append(
                merge_deltas(layout, [one, one, other], "ties", weights=weights, options=options)
            )
        assert results[0][0].tobytes() == results[1][0].tobytes()
        assert results[0][1] == results[1][1]


@pytest.mark.parametrize("kept", [0, 1 << 18, 1 << 24])
def test_groups_are_kept_within_the_budget(kept, monkeypatch):
    monkeypatch.setattr(decoded, "KEPT_BYTES", kept)
    size = 300_000
    (update,) = updates_of(1, size, "0.5")
    whole, part = np.empty(size, np.float32), np.empty(1000, np.float32)
    update.read(0, size, whole)
    for lo in (0, 1000, 200_000, 131_000, 299_000):
        update.read(lo, lo + 1000, part)
        assert part.tobytes() == whole[lo : lo + 1000].tobytes()
        assert decoded.DECODED.nbytes <= kept


def test_a_whole_pass_keeps_nothing():
    before = decoded.DECODED.nbytes
    (update,) = updates_of(1, 300_000, "0.5")
    row = np.empty(1000, np.float32)
    for lo in range(0, 300_000, 1000):
        update.read(lo, lo + 1000, row)
    assert decoded.DECODED.nbytes == before


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_memory_does_not_grow_with_the_clients(method):
    size = 200_000
    layout = layout_of({"w": (size,)})
    options = {"trim": 0.0, "normalize": "expected"} if method == "ties" else {}
    out = np.empty(size, np.float32)
    peaks = []
    for clients in (50, 400):
        updates = updates_of(clients, size, "0.9")
        tracemalloc.start()
        merge_deltas(layout, updates, method, options=options, out=out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The decoded groups of 400 clients would take 32 MB; their wrappers take 0.2.
    assert peaks[1] < peaks[0] + 1_000_000, peaks
