"""Statistics and counters in rounds, beside Flower's FedAvg: lists of arrays, and integers."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import RunError
from dare_agg.flower import DareStrategy, dare_mod

PLAIN = {"drop_rate": 0, "values": "f32", "dense_values": "f32"}


def app_of(train, mods=(dare_mod,)):
    app = ClientApp(mods=list(mods))
    app.train()(train)
    return app


def answer(msg, arrays, examples=10):
    metrics = MetricRecord({"num-examples": examples})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


def start(grid, arrays, strategy=DareStrategy, rounds=2, **words):
    if strategy is DareStrategy:
        words = {"seed": 3, "node_timeout": 2.0, **words}
    strategy = strategy(fraction_evaluate=0.0, min_evaluate_nodes=0, **words)
    return strategy.start(grid, arrays, num_rounds=rounds, timeout=60).arrays


# --- lists of arrays -----------------------------------------------------------------------


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))


def data(partition):
    generator = torch.Generator().manual_seed(partition)
    rows = torch.randn(256, 20, generator=generator) * 3 + 1
    return rows, (rows[:, :2] > 1).long() @ torch.tensor([2, 1])


def load(arrays):
    model = net()
    values = [torch.tensor(np.array(array)) for array in arrays]
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model


def train_list(msg, ctxt):
    model = load(msg.content["arrays"].to_numpy_ndarrays())
    rows, labels = data(ctxt.node_config["partition-id"])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for lo in range(0, 256, 32):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(rows[lo : lo + 32]), labels[lo : lo + 32])
        loss.backward()
        optimiser.step()
    return answer(msg, ArrayRecord([v.numpy() for v in model.state_dict().values()]), 256)


def right(arrays):
    model = load(arrays).eval()
    rows, labels = data(99)
    return float((model(rows).argmax(1) == labels).float().mean())


def test_a_list_of_arrays_keeps_its_batch_norm(memory_grid, caplog):
    caplog.set_level(logging.CRITICAL, "flwr")
    first = ArrayRecord([value.numpy() for value in net().state_dict().values()])
    found = start(memory_grid(app_of(train_list), 4), first, rounds=6).to_numpy_ndarrays()
    grid = memory_grid(app_of(train_list, mods=()), 4)
    expected = start(grid, first, FedAvg, rounds=6).to_numpy_ndarrays()
    # Of a layer with other weights, but nearly so: noise would have put some below zero.
    np.testing.assert_allclose(found[5], expected[5], rtol=0.6)
    assert found[6] == expected[6] == 48
    assert right(found) > right(expected) - 0.05 and right(expected) > 0.8


# --- integers ------------------------------------------------------------------------------


def counting(msg, ctxt):
    """Floats plus 0.01; integers plus 3, 5, 7, … by client."""
    partition = int(ctxt.node_config["partition-id"])
    tuned = {}
    for name, array in msg.content["arrays"].items():
        # As torch does: what arrives for an integer tensor is cast.
        value = array.numpy() if name.startswith("w") else array.numpy().astype(np.int64)
        step = 0.01 if value.dtype.kind == "f" else 3 + 2 * partition
        tuned[name] = Array(np.asarray(value + value.dtype.type(step)))
    return answer(msg, ArrayRecord(tuned), 10 * (partition + 1))


def counters():
    return ArrayRecord(
        {
            "w": Array(np.linspace(-1, 1, 200).astype(np.float32).reshape(10, 20)),
            "batches": Array(np.array(5, np.int64)),
            "seen": Array(np.array([0, -3, 1 << 20], np.int64)),
        }
    )


@pytest.mark.parametrize("clients", [2, 3, 5])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_integers_are_fedavgs_cast_as_torch_casts(memory_grid, clients, rounds):
    grid = memory_grid(app_of(counting, mods=()), clients)
    expected = start(grid, counters(), FedAvg, rounds)
    found = start(memory_grid(app_of(counting), clients), counters(), rounds=rounds, **PLAIN)
    np.testing.assert_allclose(found["w"].numpy(), expected["w"].numpy(), rtol=1e-6)
    for name in ("batches", "seen"):
        assert found[name].numpy().dtype == np.int64
        assert (found[name].numpy() == np.trunc(expected[name].numpy() + 1e-6)).all(), name


@pytest.mark.parametrize(
    "words",
    [{}, {"dense_values": "i8"}, {"values": "i8"}, {"downlink": "auto"}, {"exclude": ["^w2"]}],
)
def test_integers_follow_at_the_defaults_and_over_versions(
    memory_grid, words, tmp_path, monkeypatch
):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))
    if "downlink" in words:
        words = {"downlink": make_downlink(words["downlink"])}
    grid = memory_grid(app_of(counting), 4)
    found = start(grid, counters(), rounds=4, **words)
    expected = start(memory_grid(app_of(counting, mods=()), 4), counters(), FedAvg, 4)
    for name in ("batches", "seen"):
        far = found[name].numpy() - expected[name].numpy()
        assert np.abs(far).max() <= (2 if "dense_values" in words else 1.001), (name, far)


def test_integers_beside_running_statistics_do_not_coarsen_them(memory_grid):
    def train(msg, ctxt):
        tuned = {n: array.numpy() for n, array in msg.content["arrays"].items()}
        tuned = {
            n: a + (a.dtype.type(200) if a.dtype.kind == "i" else a.dtype.type(0.01))
            for n, a in tuned.items()
        }
        return answer(msg, ArrayRecord({n: Array(np.asarray(a)) for n, a in tuned.items()}))

    arrays = ArrayRecord({**counters(), "bn.running_var": Array(np.ones(512, np.float32))})
    found = start(memory_grid(app_of(train), 2), arrays, rounds=1, dense_values="i8")
    np.testing.assert_allclose(found["bn.running_var"].numpy(), 1.01, atol=1e-3)


def test_a_table_of_integers_stays_and_its_change_is_said(memory_grid, caplog):
    arrays = ArrayRecord({**counters(), "table": Array(np.zeros(100, np.int64))})
    caplog.set_level(logging.WARNING, "flwr")
    found = start(memory_grid(app_of(counting), 2), arrays)
    assert not found["table"].numpy().any()
    told = [r.getMessage() for r in caplog.records if "integer" in r.getMessage()]
    assert len(told) == 1 and "'table'" in told[0] and "dense" in told[0]
    caplog.clear()
    found = start(memory_grid(app_of(counting), 2), arrays, dense=["^table$"], **PLAIN)
    assert (found["table"].numpy() == 8).all()
    start(memory_grid(app_of(counting), 2), arrays, exclude=["^table$"])
    assert not [r for r in caplog.records if "integer" in r.getMessage()]


def test_small_integers_stay_in_their_range_over_versions(memory_grid, tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))

    def train(msg, ctxt):
        tuned = {**msg.content["arrays"], "n": Array(np.array([255, 0, 9], np.uint8))}
        return answer(msg, ArrayRecord(tuned))

    arrays = ArrayRecord({"w": counters()["w"], "n": Array(np.array([250, 5, 9], np.uint8))})
    words = {"downlink": make_downlink("auto"), "dense_values": "b1"}
    found = start(memory_grid(app_of(train), 3), arrays, rounds=5, **words)["n"].numpy()
    assert found.dtype == np.uint8 and found[0] >= 250 and found[1] <= 5


def test_an_integer_that_grew_beyond_what_is_exact_is_refused(memory_grid):
    def train(msg, ctxt):
        tuned = {**msg.content["arrays"], "batches": Array(np.array(1 << 24, np.int64))}
        return answer(msg, ArrayRecord(tuned))

    with pytest.raises(RunError, match=r"'batches' holds 1.67772e\+07; numbers below 16777216"):
        start(memory_grid(app_of(train), 2), counters())


def test_a_subclass_that_averages_as_flower_does_keeps_integers(memory_grid):
    class Own(DareStrategy):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            means = {name: Array(np.asarray(a.numpy() * 1.0)) for name, a in arrays.items()}
            return ArrayRecord({**arrays, "batches": means["batches"]}), metrics

    words = {"seed": 3, "fraction_evaluate": 0.0, **PLAIN}
    found = Own(**words).start(memory_grid(app_of(counting), 2), counters(), num_rounds=3)
    expected = start(memory_grid(app_of(counting), 2), counters(), rounds=3, **PLAIN)
    for name, array in expected.items():
        assert found.arrays[name].numpy().dtype == array.numpy().dtype
        assert np.array_equal(found.arrays[name].numpy(), array.numpy())
