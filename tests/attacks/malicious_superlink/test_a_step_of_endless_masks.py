"""A step of the model of 300 bytes has a client draw masks until its memory is full."""

import time

import pytest

from dare_agg.codec.mask import DropRate
from dare_agg.codec.rates import RateTable
from dare_agg.downlink import steps
from dare_agg.downlink.step_form import Family, StepHead
from dare_agg.downlink.steps import MAX_MASKS, MAX_STRATA, read_steps, write_step
from dare_agg.errors import ConfigError, UpdateError


def step_of(*ranks, table=None):
    families = tuple(
        Family("stratified", DropRate(10, 1), 0, count, bytes([place]) * 16, table)
        for place, count in enumerate(ranks)
    )
    head = StepHead("union", "b4", "f32", 1, "a" * 64, "b" * 64, bytes(16), families, 0)
    return write_step(head, b"", b"")


def test_more_masks_than_any_round_has(monkeypatch):
    began = time.monotonic()
    for ranks in ((1 << 20,), (MAX_MASKS, 1), (1 << 16,) * 3):
        with pytest.raises(ConfigError, match=f"at most {MAX_MASKS}"):
            step_of(*ranks)
        with monkeypatch.context() as patch:
            patch.setattr(steps, "MAX_MASKS", 1 << 30)
            endless = step_of(*ranks).body
        with pytest.raises(UpdateError, match=f"at most {MAX_MASKS}"):
            read_steps(endless, b"")
    assert time.monotonic() - began < 1
    assert len(read_steps(step_of(1000, 2000).body, b"")) == 1


def test_masks_of_many_tensors_each(monkeypatch):
    """A table of 1,000 tensors for 16,384 ranks: a kilobyte, and 4.5 GB of the client."""
    table = RateTable(bytes([100]) * 1000, 40 << 15)
    with pytest.raises(ConfigError, match=f"at most {MAX_STRATA}"):
        step_of(MAX_MASKS, table=table)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "MAX_STRATA", 1 << 40)
        endless = step_of(MAX_MASKS, table=table).body
    assert len(endless) < 2000
    with pytest.raises(UpdateError, match=f"at most {MAX_STRATA}"):
        read_steps(endless, b"")
    assert len(read_steps(step_of(1000, table=table).body, b"")) == 1
