"""The rules against byzfl's (scripts/robust_vectors.py), to 1e-6 of the largest element."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dare_agg.robust.aggregate import aggregate
from dare_agg.robust.rule import robust_rule
from dare_agg.vectors.sources import array_source

FOUND = json.loads((Path(__file__).parents[1] / "data" / "robust" / "byzfl.json").read_text())
CASES = {case["name"]: case for case in FOUND["cases"]}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("text", CASES["honest"]["results"])
def test_a_rule_gives_what_byzfl_gives(case, text):
    vectors = np.array(CASES[case]["vectors"], np.float32)
    rule = robust_rule(text, FOUND["f"])
    found = aggregate([array_source(row) for row in vectors], [1] * len(vectors), rule)
    result = np.empty(vectors.shape[1], np.float32)
    found.delta.read(0, result.size, result)
    expected = np.array(CASES[case]["results"][text])
    assert np.abs(result - expected).max() <= 1e-6 * max(1, np.abs(expected).max())
