"""A step of the model of 300 bytes has a client draw masks until its memory is full."""

import time

import pytest

from dare_agg.codec.mask import DropRate
from dare_agg.downlink import steps
from dare_agg.downlink.step_form import Family, StepHead
from dare_agg.downlink.steps import MAX_MASKS, read_steps, write_step
from dare_agg.errors import ConfigError, UpdateError


def step_of(*ranks):
    families = tuple(
        Family("stratified", DropRate(10, 1), 0, count, bytes([place]) * 16)
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
