"""Tied tensors in rounds: one tensor while training keeps them one, two once it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedYogi, Strategy
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import LayoutError
from dare_agg.flower import DareStrategy, dare, dare_mod
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.rounds.state import StateFolder

PLAIN = {"drop_rate": 0, "values": "f32", "dense_values": "f32"}
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))


def tied():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config)


def clones():
    """Layers that begin as copies of one, as torch makes them, and a head that is the embedding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    net = nn.ModuleDict({"embed": nn.Embedding(60, 16), "head": nn.Linear(16, 60, bias=False)})
    net["layers"] = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    net["head"].weight = net["embed"].weight
    return net


def app_of(model, mods=(dare_mod,), returned=lambda state: state, asked=None):
    """An app that steps along a direction of its own; each parameter by its own numbers."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(msg, ctxt):
        partition = int(ctxt.node_config["partition-id"])
        if asked is not None:
            asked.append(msg.content["config"]["server-round"])
        net = model()
        state = msg.content["arrays"].to_torch_state_dict()
        net.load_state_dict(state)
        generator = torch.Generator().manual_seed(partition)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        arrays = ArrayRecord(returned(net.state_dict()))
        metrics = MetricRecord({"num-examples": 10 + partition})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

    return app


def start(grid, model, strategy=DareStrategy, rounds=2, **words):
    if strategy is not FedAvg:
        words = {"seed": 3, "node_timeout": 2.0, **words}
    made = strategy(fraction_evaluate=0.0, min_evaluate_nodes=0, **words)
    result = made.start(grid, ArrayRecord(model().state_dict()), num_rounds=rounds, timeout=60)
    return {name: array.numpy() for name, array in result.arrays.items()}


def fedavg(memory_grid, model, rounds=2):
    return start(memory_grid(app_of(model, mods=()), 3), model, FedAvg, rounds)


def check_close(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


WAYS = [{}, {"downlink": "auto"}, {"server_step": "adam"}, {"method": "ties"}, {"dense": ["wte"]}]


@pytest.mark.parametrize("words", WAYS, ids=str)
def test_the_head_and_the_embedding_stay_one(memory_grid, words):
    if "downlink" in words:
        words = {"downlink": make_downlink("auto")}
    outcomes = []
    grid = memory_grid(app_of(tied), 3)
    found = start(grid, tied, round_hook=outcomes.append, **words)
    one = "dense" not in words  # the other is the delta group's then
    assert (found[HEAD].tobytes() == found[EMBEDDING].tobytes()) == one
    assert not np.array_equal(found[EMBEDDING], tied().state_dict()[EMBEDDING].numpy())
    twice = sum(v.numel() for v in tied().state_dict().values() if v.dtype == torch.float32)
    assert outcomes[0].model.ref.size == twice - 60 * 16


def test_with_nothing_dropped_a_tied_model_is_fedavgs(memory_grid):
    check_close(start(memory_grid(app_of(tied), 3), tied, **PLAIN), fedavg(memory_grid, tied))


@pytest.mark.parametrize("kept", [EMBEDDING, HEAD])
def test_one_of_the_names_is_enough(memory_grid, kept):
    other = HEAD if kept == EMBEDDING else EMBEDDING
    without = app_of(tied, returned=lambda state: {n: v for n, v in state.items() if n != other})
    check_close(start(memory_grid(without, 3), tied, **PLAIN), fedavg(memory_grid, tied))


@pytest.mark.parametrize("words", [{}, {"downlink": "auto"}, {"server_step": "momentum"}], ids=str)
def test_layers_that_begin_as_copies_part_in_the_first_round(memory_grid, words, caplog):
    plain = not words
    words = {"downlink": make_downlink("lossless")} if "downlink" in words else words
    asked, outcomes = [], []
    grid = memory_grid(app_of(clones, asked=asked), 3)
    found = start(grid, clones, rounds=3, round_hook=outcomes.append, **PLAIN, **words)
    assert sorted(asked) == [1] * 6 + [2] * 3 + [3] * 3
    assert caplog.text.count("are kept apart from now on") == 1
    assert found["head.weight"].tobytes() == found["embed.weight"].tobytes()
    assert [o.measurements["accepted"] for o in outcomes] == [3, 3, 3]
    if plain:
        check_close(found, fedavg(memory_grid, clones, 3))


def test_layers_that_were_frozen_part_when_they_are_trained(memory_grid):
    """With vectors of the server step behind them already."""

    def app(mods):
        train_all = app_of(clones, mods)

        def freeze(msg, ctxt, call_next):
            before = msg.content["arrays"]
            reply = call_next(msg, ctxt)
            if msg.content["config"]["server-round"] == 1:
                arrays = reply.content["arrays"]
                reply.content["arrays"] = ArrayRecord(
                    {n: a if "embed" in n or "head" in n else before[n] for n, a in arrays.items()}
                )
            return reply

        return ClientApp(mods=[*mods, freeze]), train_all

    def made(mods):
        outer, inner = app(mods)
        outer.train()(lambda msg, ctxt: inner(msg, ctxt))
        return outer

    words = {"server_step": "momentum(beta=0.5)", **PLAIN}
    found = start(memory_grid(made([dare_mod]), 3), clones, rounds=3, **words)
    assert not np.array_equal(
        found["layers.layers.0.linear1.weight"], found["layers.layers.1.linear1.weight"]
    )
    assert found["head.weight"].tobytes() == found["embed.weight"].tobytes()


@pytest.mark.parametrize("model", [tied, clones])
def test_around_flowers_own_strategy_they_stay_one_or_part_too(memory_grid, model):
    strategy = dare(FedYogi(fraction_evaluate=0.0), seed=3, node_timeout=2.0, **PLAIN)
    first = ArrayRecord(model().state_dict())
    found = strategy.start(memory_grid(app_of(model), 3), first, num_rounds=3, timeout=60).arrays
    alone = FedYogi(fraction_evaluate=0.0)
    expected = alone.start(memory_grid(app_of(model, mods=()), 3), first, num_rounds=3).arrays
    for name, array in expected.items():
        np.testing.assert_allclose(found[name].numpy(), array.numpy(), rtol=1e-3, atol=1e-4)


class FlowersLoop(DareStrategy):
    start = Strategy.start


def test_in_flowers_own_loop_the_round_is_missed_and_the_next_is_not(memory_grid):
    found = start(memory_grid(app_of(clones), 3), clones, FlowersLoop, rounds=3, **PLAIN)
    check_close(found, fedavg(memory_grid, clones, 2))


@pytest.mark.parametrize("form", ["full", "lossless"])
def test_a_run_goes_on_with_what_came_apart(memory_grid, tmp_path, form):
    words = {**PLAIN, "server_step": "momentum"}
    whole = start(
        memory_grid(app_of(clones), 3), clones, rounds=3, downlink=make_downlink(form), **words
    )
    folder = StateFolder(tmp_path / "state")
    keep_base(folder, ArrayRecord(clones().state_dict()))

    class Stopped(DareStrategy):
        def move(self, outcome):
            arrays = super().move(outcome)
            save(self, folder, outcome)
            return arrays

    start(memory_grid(app_of(clones), 3), clones, Stopped, rounds=2,
          downlink=make_downlink(form), **words)  # fmt: skip
    folder.release()
    again = DareStrategy(
        seed=3, fraction_evaluate=0.0, min_evaluate_nodes=0, downlink=make_downlink(form), **words
    )
    resumed = resume(again, folder)
    result = again.start(
        memory_grid(app_of(clones), 3), resumed.arrays, num_rounds=3, timeout=60, start_round=3,
        step_state=resumed.step_state,
    )  # fmt: skip
    for name, array in whole.items():
        assert result.arrays[name].numpy().tobytes() == array.tobytes()


def test_lists_of_arrays_are_tied_too(memory_grid):
    names = list(tied().state_dict())

    def train(msg, ctxt):
        values = msg.content["arrays"].to_numpy_ndarrays()
        tuned = [value + np.float32(0.01 * (1 + n % 3)) for n, value in enumerate(values)]
        tuned[names.index(HEAD)] = tuned[names.index(EMBEDDING)]
        metrics = MetricRecord({"num-examples": 10})
        return Message(RecordDict({"arrays": ArrayRecord(tuned), "metrics": metrics}), reply_to=msg)

    app = ClientApp(mods=[dare_mod])
    app.train()(train)
    first = ArrayRecord([value.numpy() for value in tied().state_dict().values()])
    strategy = DareStrategy(seed=3, fraction_evaluate=0.0, min_evaluate_nodes=0)
    found = strategy.start(memory_grid(app, 2), first, num_rounds=2).arrays.to_numpy_ndarrays()
    assert found[names.index(HEAD)].tobytes() == found[names.index(EMBEDDING)].tobytes()


def test_a_subclass_changes_tied_tensors_alike_or_parts_them(memory_grid):
    class Halves(DareStrategy):
        both = True

        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            for reply in replies:
                arrays = reply.content["arrays"]
                for name in (HEAD, EMBEDDING) if self.both else (HEAD,):
                    arrays[name] = Array(arrays[name].numpy() * np.float32(0.5))
            return super().aggregate_train(server_round, replies)

    found = start(memory_grid(app_of(tied), 3), tied, Halves, rounds=1, **PLAIN)
    expected = fedavg(memory_grid, tied, 1)
    for name in (HEAD, EMBEDDING):
        np.testing.assert_allclose(found[name], expected[name] / 2, rtol=1e-5, atol=1e-6)

    class Noisy(DareStrategy):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            noisy = Array(arrays[HEAD].numpy() + np.float32(0.125))
            return ArrayRecord({**arrays, HEAD: noisy}), metrics

    words = {"server_step": "momentum", **PLAIN}
    found = start(memory_grid(app_of(tied), 3), tied, Noisy, rounds=2, **words)
    assert not np.array_equal(found[HEAD], found[EMBEDDING])
    with pytest.raises(LayoutError, match="away from its copy"):
        start(memory_grid(app_of(tied), 3), tied, Noisy, downlink=make_downlink("auto"))
