"""What a server gains by trying out who shared: a few chosen elements, as the formula says."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from simulations.bench import mask_grinding
from simulations.bench.mask_grinding import choices, grind, predicted, run, subsets, terms_of


@pytest.mark.parametrize("drop_rate", ["0.5", "0.9"])
def test_chosen_elements_grow_with_the_logarithm_of_the_tries(drop_rate):
    terms = terms_of(drop_rate, 10)
    stride = terms.drop_rate.numerator / terms.drop_rate.denominator
    every = choices(10, terms.threshold)
    found = np.array([grind(terms, seed, (1, every)) for seed in range(40)])
    # One try: elements of the list until the first that is not kept.
    assert found[:, 0].mean() == pytest.approx(1 / (stride - 1), abs=0.6)
    assert abs(found[:, 1].mean() - predicted(every, stride)) < 1


def test_a_session_offers_no_more_masks_than_subsets_from_the_threshold_up():
    terms = terms_of("0.9", 10)
    found = list(subsets(10, terms.threshold))
    assert len(found) == len(set(found)) == choices(10, 7) == 176
    assert all(len(shared) >= terms.threshold for shared in found)
    assert list(islice(subsets(4, 3), 2)) == [(1, 2, 3, 4), (2, 3, 4)]


def test_rows_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_grinding, "SESSIONS", 2)
    monkeypatch.setattr(mask_grinding, "TRIES", (5, 50))
    rows = run(tmp_path / "rows.jsonl")
    assert [(row["drop_rate"], row["tries"]) for row in rows] == [
        ("0.5", 5), ("0.5", 50), ("0.9", 5), ("0.9", 50)
    ]  # fmt: skip
    assert run(tmp_path / "rows.jsonl") == rows
