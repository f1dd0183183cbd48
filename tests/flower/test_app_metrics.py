"""Metrics of the app's own, and the log of a run, are as under FedAvg."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from habits import DENSE, assert_equal, with_extra
from toy import numpy_of

from dare_agg.errors import RunError
from dare_agg.flower import DareStrategy, dare_mod
from simulations.runs.memory_grid import MemoryGrid


def test_metrics_functions_see_the_whole_content(toys):
    def of_training(contents, key):
        assert all(isinstance(content, RecordDict) for content in contents)
        assert all(list(content["arrays"]) == list(toys.arrays()) for content in contents)
        first = [float(content["arrays"]["encoder.bias"].numpy()[0]) for content in contents]
        cpus = sum(content["info"]["device"] == "cpu" for content in contents)
        total = sum(content["metrics"][key] for content in contents)
        return MetricRecord({"cpus": cpus, "examples": total, "first": sum(sorted(first))})

    def of_evaluation(contents, key):
        cpus = sum(content["info"]["device"] == "cpu" for content in contents)
        return MetricRecord({"cpus": cpus, "examples": sum(c["metrics"][key] for c in contents)})

    results = []
    for base, words, mods in ((FedAvg, {}, []), (DareStrategy, DENSE, [dare_mod])):
        strategy = base(
            train_metrics_aggr_fn=of_training, evaluate_metrics_aggr_fn=of_evaluation, **words
        )
        grid = MemoryGrid(with_extra(mods), 4)
        results.append(strategy.start(grid, toys.record(toys.arrays()), num_rounds=2))
    flowers, ours = results
    assert_equal(flowers, ours)
    assert {n: dict(m) for n, m in ours.evaluate_metrics_clientapp.items()} == {
        n: dict(m) for n, m in flowers.evaluate_metrics_clientapp.items()
    }


def test_the_log_shows_metrics_as_flowers_does(toys, caplog):
    lines = []
    for base, words, mods in ((FedAvg, {}, []), (DareStrategy, DENSE, [dare_mod])):
        caplog.clear()
        with caplog.at_level(logging.INFO, "flwr"):
            base(**words).start(
                MemoryGrid(with_extra(mods), 2),
                toys.record(toys.arrays()),
                num_rounds=2,
                train_config=ConfigRecord({"lr": 0.1}),
                evaluate_fn=lambda number, arrays: MetricRecord({"total": 0.5}),
            )
        lines.append([record.getMessage() for record in caplog.records])
    flowers, ours = lines

    def telling(rows):
        at = rows.index("Final results:")
        words = ("MetricRecord", "Initial global", "Number of rounds", "[ROUND")
        return [row for row in rows[:at] if any(word in row for word in words)], rows[at:]

    assert telling(ours) == telling(flowers)
    assert sum("Aggregated MetricRecord" in row for row in ours) == 4
    assert any("'accuracy': '7.5000e-01'" in row for row in ours)


def test_metrics_are_shown_in_the_clients_order_and_wild_ones_are_named(toys, caplog):
    def edit(partition, tuned, metrics):
        metrics.update({"z": 1.0, "a": 2.0, "curve": [1.0, 2.0]})
        if partition == 1:
            metrics["loss"] = float("nan")

    strategy = DareStrategy(seed=1, fraction_evaluate=0.0)
    grid = MemoryGrid(toys.app(edit=edit), 2)
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    found = result.train_metrics_clientapp[1]
    assert [key for key in found if key in ("z", "a", "curve")] == ["z", "a", "curve"]
    assert found["curve"] == pytest.approx([1.0, 2.0]) and "loss" not in found
    assert "not every client's are finite numbers: loss" in caplog.text


def test_a_single_number_may_come_back_as_a_vector_of_one(toys):
    def edit(partition, tuned, metrics):
        tuned["scale"] = np.ascontiguousarray(np.float32(1 + partition))

    arrays = {**toys.arrays(), "scale": np.asarray(0, np.float32)}
    strategy = DareStrategy(**DENSE, weighting="equal", fraction_evaluate=0.0)
    grid = MemoryGrid(toys.app(edit=edit), 3)
    scale = numpy_of(strategy.start(grid, toys.record(arrays), num_rounds=1).arrays)["scale"]
    assert scale.shape == () and scale == pytest.approx(2.0)


def test_a_mod_in_front_that_changes_the_model_is_told_its_place(toys):
    def halves(message, context, call_next):
        for name, array in message.content["arrays"].items():
            if array.numpy().dtype.kind == "f":
                message.content["arrays"][name] = Array(array.numpy() * np.float32(0.5))
        return call_next(message, context)

    with pytest.raises(RunError, match=r"a mod in front of it .*mods=\[dare_mod, other_mod\]"):
        strategy = DareStrategy(seed=1, fraction_evaluate=0.0)
        grid = MemoryGrid(with_extra([halves, dare_mod]), 2)
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
