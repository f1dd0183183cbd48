"""Budgets: what fits, what is best, and clients of different budgets in one round."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.codec.budget import UploadBudget, parse_bytes, plan_budget
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import DropRate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update import UpdateSpec, encode_update
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.errors import BudgetError, ConfigError
from server.reading import read_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [("300kB", 300_000), ("1.5 MiB", 1_572_864), (2000, 2000), ("7", 7), ("0.5MB", 500_000)],
)
def test_bytes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "many", "-3kB", "3 apples", "1e6", True, "nan"])
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError, match="300kB"):
        parse_bytes(text)


@given(
    st.integers(1, 10_000_000), st.integers(500, 50_000_000),
    st.sampled_from(["stratified", "bernoulli"]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_choice_fits_and_no_simple_choice_is_much_better(parameters, nbytes, mask):
    try:
        found = plan_budget(parameters, nbytes=nbytes, mask=mask)
    except BudgetError as error:
        assert "allow more" in str(error)
        assert payload_bytes("b1", parameters // 12_000) + HEADER_BYTES > nbytes - 200
        return
    assert found.bytes <= nbytes
    for name, row in VALUE_FORMATS.items():
        for stride in (1, 2, 5, 10, 100, 1000):
            survivors = -(-parameters // stride)
            if mask == "bernoulli" and stride > 1:
                survivors += math.ceil(5 * math.sqrt(survivors))
            if HEADER_BYTES + payload_bytes(name, survivors) + 128 <= nbytes:
                assert found.nmse <= (1 + row.nmse) * stride - 1 + 1e-9


@pytest.mark.parametrize("nbytes", [2000, 30_000, 100_000])
def test_the_announced_size_is_the_size(nbytes):
    size = 1_000_000
    found = plan_budget(size, nbytes=nbytes)
    spec = UpdateSpec(
        size, found.drop_rate, "stratified", bytes(16), bytes(16), 0, found.values, "0" * 64,
        "1" * 64,
    )  # fmt: skip
    assert len(encode_update(spec, np.ones(size, np.float32))) == found.bytes > 0.9 * nbytes


def test_few_bits_first_then_dropping():
    size = 22_700_000
    assert plan_budget(size, nbytes=300_000).values == "b1"
    assert plan_budget(size, nbytes=6_000_000).values == "b2"
    assert plan_budget(size, nbytes=12_000_000).values == "b4"
    assert plan_budget(size, nbytes=10**9).values == "f32"
    assert plan_budget(size, nbytes=10**9).drop_rate == DropRate(1, 1)
    timed = plan_budget(size, seconds=60, kbit_s=20, clients=10)
    assert timed == plan_budget(size, nbytes=150_000, clients=10)
    assert timed.mean_nmse == timed.nmse / 10


@pytest.mark.parametrize(
    "words",
    [{}, {"seconds": 3}, {"nbytes": 0}, {"nbytes": math.nan}, {"seconds": 1, "kbit_s": math.inf}],
)
def test_no_budget_is_an_error(words):
    with pytest.raises(ConfigError):
        plan_budget(1000, **words)


def test_slow_nodes_get_less_and_unknown_ones_the_run_s_own_terms():
    budget = UploadBudget(nbytes=300_000, seconds=30)
    fast = budget.terms(22_700_000, 1000, 10_000, mask="stratified")
    slow = budget.terms(22_700_000, 1000, 20, mask="stratified")
    crawling = budget.terms(22_700_000, 1000, 0.001, mask="stratified")
    assert fast.drop_rate.p < slow.drop_rate.p < crawling.drop_rate.p == 0.9999
    assert UploadBudget(seconds=30).terms(1000, 0, 0.0, mask="stratified") is None
    with pytest.raises(BudgetError, match="dense"):
        UploadBudget(nbytes=900).terms(22_700_000, 1000, 0.0, mask="stratified")


def test_run_config_words():
    config = read_config({"upload-budget": "300kB", "upload-seconds": 20.0})
    assert config.budget() == UploadBudget(300_000, 20.0)
    assert read_config({}).budget() is None
    with pytest.raises(ConfigError, match="300kB"):
        read_config({"upload-budget": "much"})
    assert config.drop_rate == "auto"
