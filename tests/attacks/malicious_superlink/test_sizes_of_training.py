"""The server's run config names sizes that would take all memory of whoever trains on it."""

import time

import numpy as np
import pytest

from client.batches import draw_batches
from client.config import configure
from dare_agg.errors import ConfigError


@pytest.mark.parametrize(
    "word",
    [
        "steps",
        "epochs",
        "batch",
        "length",
        "image_size",
        "lora_rank",
        "accumulate",
        "threads",
        "early_stop",
        "early_stop_every",
    ],
)
def test_sizes_out_of_bounds(word):
    for size in (10**9, -1):
        with pytest.raises(ConfigError, match=word.replace("_", "-")):
            configure(**{word: size})


def test_a_round_of_more_rows_than_fit_into_memory():
    with pytest.raises(ConfigError, match="lower steps or batch"):
        draw_batches(np.arange(4), configure(steps=1 << 20, batch=1 << 14), (0,))
    assert len(draw_batches(np.arange(4), configure(steps=9, batch=3), (0,))) == 9


def test_many_steps_over_few_rows():
    """Their batches were drawn in quadratic time."""
    began = time.monotonic()
    drawn = draw_batches(np.arange(2), configure(steps=1 << 15, batch=4), (0,))
    assert len(drawn) == 1 << 15 and time.monotonic() - began < 10
