"""Keep rates by tensor through the strategy and the mod, over full arrays and over versions."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError
from dare_agg.flower import DareStrategy
from dare_agg.flower.secure.strategy import SecureStrategy


def run(memory_grid, toys, rounds=3, downlink="full", **words):
    def edit(partition, tuned, metrics):
        rng = np.random.default_rng(partition)
        for name, array in tuned.items():
            if array.dtype.kind == "f" and "running" not in name:
                size = 1e-1 if array.ndim == 1 else 1e-4
                tuned[name] = array + (size * rng.normal(size=array.shape)).astype(array.dtype)

    told = []
    strategy = DareStrategy(
        seed=1, fraction_evaluate=0.0, round_hook=told.append, weighting="equal",
        downlink=make_downlink(downlink), **words,
    )  # fmt: skip
    result = strategy.start(
        memory_grid(toys.app(edit=edit), 3),
        toys.record(toys.arrays()),
        num_rounds=rounds,
        train_config=ConfigRecord({}),
    )
    return told, {name: array.numpy() for name, array in result.arrays.items()}


@pytest.mark.parametrize("downlink", ["full", "auto"])
@pytest.mark.parametrize("keep", ["own", "last"])
def test_rounds_of_rates_by_tensor(memory_grid, toys, keep, downlink):
    words = {"drop_rate": 0.8, "values": "i8", "downlink": downlink}
    told, arrays = run(memory_grid, toys, keep_rates=keep, **words)
    plain, _ = run(memory_grid, toys, **words)
    for mine, theirs in zip(told, plain, strict=True):
        assert mine.measurements["accepted"] == 3 and not mine.rejections
        for own, uniform in zip(
            mine.measurements["update_bytes"], theirs.measurements["update_bytes"], strict=True
        ):
            assert own <= uniform + 40  # a model of a few hundred parameters
        assert mine.measurements["noise"] < theirs.measurements["noise"]
    tables = [{plan.told for plan in outcome.plans} for outcome in told]
    assert tables[0] == {b""}
    assert (tables[1] != {b""}) == (keep == "last")
    again, same = run(memory_grid, toys, keep_rates=keep, **words)
    assert all(np.array_equal(arrays[name], same[name]) for name in arrays)
    assert again[-1].step_state.levels == told[-1].step_state.levels


def test_words_that_do_not_go_together_are_refused(toys):
    with pytest.raises(ConfigError, match="uniform"):
        DareStrategy(keep_rates="own", method="fisher")
    with pytest.raises(ConfigError, match="no place"):
        SecureStrategy(secure=None, roster=None, keep_rates="last")  # type: ignore[arg-type]
