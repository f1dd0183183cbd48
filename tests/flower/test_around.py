"""``dare(FedYogi(...))``: Flower's strategies keep their arithmetic, DARE transports."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    FedYogi,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)
from toy import numpy_of, record_of, toy_delta

from dare_agg.codec.budget import UploadBudget
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, LayoutError, RunError
from dare_agg.flower import DareStrategy, dare, dare_mod
from dare_agg.flower.records import ORDER_KEY, REPLY_KEY, UPDATE_KEY
from simulations.runs.memory_grid import MemoryGrid

DENSE = {"drop_rate": 0, "values": "f32", "dense_values": "f32", "seed": 7}
CLIENTS, ROUNDS = 7, 4


def arrays_of(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "encoder.weight": generator.normal(size=(40, 25)).astype(np.float32),
        "encoder.bias": generator.normal(size=25).astype(np.float32),
        "norm.running_var": np.ones(25, np.float32),
        "scale": np.float32(0.5).reshape(()),
    }


def app_of(mods, configs=None, failing=(), wild=()):
    """Adds `toy_delta`, more where the config has a "proximal-mu"; some fail, some run wild."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(msg, context):
        partition, config = int(context.node_config["partition-id"]), msg.content["config"]
        if configs is not None:
            configs.append(dict(config))
        if partition in failing:
            raise RuntimeError("no data")
        number = int(config["server-round"])
        mu = np.float32(config.get("proximal-mu", 0.0))
        tuned = {}
        for name, array in numpy_of(msg.content["arrays"]).items():
            delta = toy_delta(name, array.shape, partition, number)
            array = array + delta * (1 - mu) + np.float32(10.0 if partition in wild else 0.0)
            tuned[name] = array.astype(np.float32)
        loss = 1 / (partition + number)
        metrics = {"num-examples": 10 + partition, "loss": loss, "train_loss": loss}
        content = {"arrays": record_of(tuned), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=msg)

    @app.evaluate()
    def evaluate(msg, context):
        total = sum(float(np.abs(a).sum()) for a in numpy_of(msg.content["arrays"]).values())
        metrics = MetricRecord({"num-examples": 5, "total": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=msg)

    return app


STRATEGIES = {
    "FedAvg": FedAvg,
    "FedProx": lambda: FedProx(proximal_mu=0.3),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAdam": FedAdam,
    "FedAdagrad": FedAdagrad,
    "FedYogi": FedYogi,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.2),
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
    "Bulyan": lambda: Bulyan(num_malicious_nodes=1),
    "QFedAvg": lambda: QFedAvg(client_learning_rate=0.1, q=0.2),
}


class Ordered(MemoryGrid):
    """Gives replies in the order of clients: some of Flower's results depend on it."""

    def send_and_receive(self, messages, *, timeout=None):
        replies = super().send_and_receive(messages, timeout=timeout)
        return sorted(replies, key=lambda reply: self.partitions[reply.metadata.src_node_id])


def run(strategy, mods, start=None, rounds=ROUNDS, clients=CLIENTS, **app):
    tamper = app.pop("tamper", None)
    grid = Ordered(app_of(mods, **app), clients, tamper=tamper)
    begin = start or type(strategy).start
    return begin(strategy, grid, record_of(arrays_of()), num_rounds=rounds), grid


def assert_close(found, expected, atol=1e-5):
    found, expected = numpy_of(found.arrays), numpy_of(expected.arrays)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_of_flowers_strategies_keeps_its_arithmetic(name):
    make = STRATEGIES[name]
    plain_configs, dare_configs = [], []
    plain, _ = run(make(), [], configs=plain_configs, wild=(3,))
    ours, grid = run(dare(make(), **DENSE), [dare_mod], configs=dare_configs, wild=(3,))
    assert_close(ours, plain)
    start = arrays_of()
    assert any(not np.array_equal(a, start[n]) for n, a in numpy_of(ours.arrays).items())
    assert sorted(map(str, dare_configs)) == sorted(map(str, plain_configs))
    for field in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        expected, found = getattr(plain, field), getattr(ours, field)
        assert list(found) == list(expected) == list(range(1, ROUNDS + 1))
        for number, metrics in expected.items():
            assert dict(found[number]) == pytest.approx(dict(metrics), rel=1e-4)
    updates = [message for message in grid.received if UPDATE_KEY in message.content]
    assert len(updates) == CLIENTS * ROUNDS  # what travelled were updates


@pytest.mark.parametrize("name", ["FedProx", "FedAvgM", "FedYogi"])
@pytest.mark.parametrize("loop", ["flower", "pushed"])
def test_the_same_in_other_loops(name, loop):
    def pushed(strategy, grid, arrays, num_rounds):
        config = ConfigRecord()
        for number in range(1, num_rounds + 1):
            messages = list(strategy.configure_train(number, arrays, config, grid))
            ids, replies = list(grid.push_messages(messages)), []
            while len(replies) < len(messages):
                replies += grid.pull_messages(ids)
            arrays, _ = strategy.aggregate_train(number, replies)

        class Found:
            pass

        found = Found()
        found.arrays = arrays
        return found

    start = Strategy.start if loop == "flower" else pushed
    plain, _ = run(STRATEGIES[name](), [], start)
    ours, grid = run(dare(STRATEGIES[name](), **DENSE), [dare_mod], start)
    assert_close(ours, plain)
    assert not {"push_messages", "pull_messages"} & set(vars(grid))


def test_counters_travel_and_heads_stay():
    """Integers are a mean without what is no whole; what never leaves a client is the server's."""

    class Counting(FedAvg):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            for reply in replies:  # under the key that the app returned them under
                assert int(reply.content["out"]["steps"].numpy()) == server_round
            return super().aggregate_train(server_round, replies)

    app = ClientApp(mods=[dare_mod])

    @app.train()
    def train(msg, context):
        arrays = numpy_of(msg.content["arrays"])
        tuned = {n: np.asarray(a + np.ones_like(a)) for n, a in arrays.items()}
        metrics = MetricRecord({"num-examples": 3 + int(context.node_config["partition-id"])})
        return Message(RecordDict({"out": record_of(tuned), "m": metrics}), reply_to=msg)

    start = {"w": np.zeros((3, 2), np.float32), "head": np.zeros(2, np.float32)}
    start["steps"] = np.zeros((), np.int64)
    strategy = dare(Counting(fraction_evaluate=0.0), exclude=["head"], **DENSE)
    result = strategy.start(MemoryGrid(app, 3), record_of(start), num_rounds=3)
    found = numpy_of(result.arrays)
    assert found["steps"].dtype == np.int64 and int(found["steps"]) == 3
    assert (found["w"] == 3).all() and (found["head"] == 0).all()


def test_failures_and_samples_are_the_strategys_own_to_deal_with(caplog):
    results = []
    for strategy, mods in ((FedAvg(), []), (dare(FedAvg(), **DENSE), [dare_mod])):
        with caplog.at_level(logging.INFO, "flwr"):
            results.append(run(strategy, mods, failing=(2,))[0])
        assert "aggregate_train: Received 6 results and 1 failures" in caplog.text
        caplog.clear()
    assert_close(*results)
    asked = []
    strategy = dare(FedAvg(fraction_train=0.5, fraction_evaluate=0.0), **DENSE)
    random.seed(1)
    run(strategy, [dare_mod], configs=asked)
    assert len(asked) == 3 * ROUNDS


def test_updates_are_compact_and_the_model_moves_as_it_should():
    """At 0.9: a tenth of the bits of a bit, and FedAvg goes where it goes."""
    arrays = {"w": np.zeros((300, 400), np.float32)}
    strategy = dare(FedAvg(), seed=1, drop_rate=0.9)
    grid = MemoryGrid(app_of([dare_mod]), CLIENTS)
    result = strategy.start(grid, record_of(arrays), num_rounds=2)
    measured = strategy.outcome.measurements
    assert max(measured["update_bytes"]) < 4 * 300 * 400 / 280
    assert measured["accepted"] == CLIENTS and measured["noise"] is not None
    plain = FedAvg().start(MemoryGrid(app_of([]), CLIENTS), record_of(arrays), num_rounds=2)
    a, b = numpy_of(result.arrays)["w"], numpy_of(plain.arrays)["w"]
    assert np.mean(a) == pytest.approx(np.mean(b), rel=0.1)


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedAdam", "FedMedian"])
@pytest.mark.parametrize("form", ["lossless", "auto"])
def test_kept_versions_bring_what_was_merged(name, form):
    refused = []

    def watch(partition, reply):
        refused.append(reply.content[REPLY_KEY].get("refused"))
        return reply

    strategy = dare(STRATEGIES[name](), **DENSE, downlink=make_downlink(form))
    ours, grid = run(strategy, [dare_mod], tamper=watch)
    assert not any(refused)  # nobody lost a version
    sent = [m for m in grid.sent if "config" in m.content and ORDER_KEY in m.content]
    whole = [m for m in sent if len(m.content.get("arrays", ())) > 0]
    assert not whole  # steps travelled, in training and in evaluation
    plain, _ = run(STRATEGIES[name](), [])
    if form == "lossless":
        assert_close(ours, plain, atol=1e-4)
    else:
        a, b = numpy_of(ours.arrays)["encoder.weight"], numpy_of(plain.arrays)["encoder.weight"]
        start = arrays_of()["encoder.weight"]
        assert np.corrcoef((a - start).ravel(), (b - start).ravel())[0, 1] > 0.6


# --- subclasses with a start of their own, attributes, wrappers -------------------------------


class Custom(FedAdagrad):
    """In the manner of apps: a setter, a decaying rate, a loop with checkpoints, and super."""

    def set_path(self, path):
        self.path = path

    def configure_train(self, server_round, arrays, config, grid):
        config["lr"] = 0.1 / server_round
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.saved = [*getattr(self, "saved", []), numpy_of(arrays)["encoder.bias"]]
        return arrays, metrics


class Looped(Custom):
    def start(self, grid, initial_arrays, num_rounds=3, note=""):
        self.note = note
        result = super().start(grid, initial_arrays, num_rounds)
        assert self.path == "here"
        return result


@pytest.mark.parametrize("kind", [Custom, Looped])
def test_subclasses_of_flowers_strategies(kind):
    results = []
    for wrap, mods in ((lambda s: s, []), (lambda s: dare(s, **DENSE), [dare_mod])):
        strategy = wrap(kind())
        strategy.set_path("here")
        configs = []
        results.append(run(strategy, mods, configs=configs)[0])
        assert {c["lr"] for c in configs} == {0.1 / n for n in range(1, ROUNDS + 1)}
        assert len(strategy.saved) == ROUNDS and strategy.path == "here"
    assert_close(results[1], results[0], atol=1e-4)  # a small change over tau
    if kind is Looped:
        wrapped = dare(Looped(), **DENSE)
        wrapped.set_path("here")
        grid = MemoryGrid(app_of([dare_mod]), CLIENTS)
        wrapped.start(grid, record_of(arrays_of()), num_rounds=1, note="x")
        assert wrapped.note == "x" and "configure_train" not in vars(wrapped.strategy)


def test_a_wrapper_of_flowers_around_it():
    """Clipped on the server and without noise, it is the plain wrapper's result."""
    results = []
    for strategy, mods in ((FedAvg(), []), (dare(FedAvg(), **DENSE), [dare_mod])):
        private = DifferentialPrivacyServerSideFixedClipping(
            strategy, noise_multiplier=0, clipping_norm=0.05, num_sampled_clients=CLIENTS
        )
        results.append(run(private, mods)[0])
    assert_close(*results)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (FedXgbBagging, "cannot carry FedXgbBagging: its clients send trees"),
        (FedXgbCyclic, "trees"),
        (lambda: DareStrategy(), "DARE already"),
        (
            lambda: DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1, 1, 4),
            r"put it outside: DifferentialPrivacyServerSideFixedClipping\(dare\(strategy",
        ),
        (lambda: DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1, 1, 4), "outside"),
        (lambda: FedAvg, r"make one: dare\(FedAvg"),
        (lambda: "FedAvg", "no strategy"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_the_reason(make, says):
    with pytest.raises(ConfigError, match=says):
        dare(make())


@pytest.mark.parametrize("name", ["FedMedian", "FedTrimmedAvg", "Krum", "Bulyan", "QFedAvg"])
def test_strategies_that_compare_updates_want_whole_ones(name):
    with pytest.raises(ConfigError, match='drop_rate=0, values="b4"'):
        dare(STRATEGIES[name](), drop_rate=0.9)
    with pytest.raises(ConfigError, match="upload_budget"):
        dare(STRATEGIES[name](), upload_budget=UploadBudget(10_000))
    plain, _ = run(STRATEGIES[name](), [])
    for words in ({"drop_rate": 0, "values": "b4"}, {}):  # the remedy works, and is the default
        ours, _ = run(dare(STRATEGIES[name](), **words, seed=1), [dare_mod])
        assert_close(ours, plain, atol=0.02)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"method": "ties"}, "method is the wrapped strategy's own"),
        ({"server_step": "adam"}, "server_step is the wrapped"),
        ({"fraction_train": 0.5}, "fraction_train is the wrapped"),
        ({"drop_rat": 0.5}, "did you mean 'drop_rate'"),
        ({"drop_rate": 1.0}, "drop rate"),
    ],
)
def test_words_that_are_not_about_transport(words, says):
    with pytest.raises(ConfigError, match=says):
        dare(FedAvg(), **words)


def test_a_hook_needs_a_loop_that_hears_it():
    with pytest.raises(ConfigError, match="start of its own"):
        dare(Looped(), round_hook=lambda outcome: True)
    seen = []
    strategy = dare(FedYogi(), **DENSE, round_hook=lambda outcome: seen.append(outcome))
    result, _ = run(strategy, [dare_mod])
    assert [o.round for o in seen] == [1, 2, 3, 4] and seen[0].client_metrics["total"] > 0
    assert {n: a.tobytes() for n, a in seen[-1].model.arrays().items()} == {
        n: a.tobytes() for n, a in numpy_of(result.arrays).items()
    }


def test_replies_that_do_not_count_are_not_handed_on():
    def tamper(partition, reply):
        if UPDATE_KEY not in reply.content:
            return reply
        if partition == 1:
            reply.content["metrics"]["num-examples"] = float("nan")
        if partition == 2:
            del reply.content["metrics"]["num-examples"]
        if partition == 3:
            reply.content[UPDATE_KEY]["0"].data = reply.content[UPDATE_KEY]["0"].data[:-4]
        return reply

    strategy = dare(FedAvg(), **DENSE)
    result, _ = run(strategy, [dare_mod], tamper=tamper, rounds=1)
    reasons = {r.client: r.reason for r in strategy.outcome.rejections}
    assert reasons == {1: "weight", 2: "weight", 3: "truncated"}
    assert all(np.isfinite(a).all() for a in numpy_of(result.arrays).values())


def test_one_client_with_records_of_its_own_does_not_end_the_run():
    """Flower's strategies raise where replies are unlike; here the odd one is left out."""

    def tamper(partition, reply):
        metrics = reply.content.get("metrics")
        if partition == 1 and metrics:
            metrics["more"] = 1.0
        if partition == 2 and metrics:
            metrics["loss" if UPDATE_KEY in reply.content else "total"] = [0.5] * 9
        if partition == 3 and UPDATE_KEY in reply.content:
            reply.content[REPLY_KEY]["arrays-key"] = "elsewhere"
        return reply

    strategy = dare(FedAvg(), **DENSE)
    result, _ = run(strategy, [dare_mod], tamper=tamper, rounds=1)
    reasons = {r.client: r.reason for r in strategy.outcome.rejections}
    assert reasons == {1: "malformed", 2: "malformed", 3: "malformed"}
    assert list(result.train_metrics_clientapp[1]) == ["loss", "train_loss"]
    assert list(result.evaluate_metrics_clientapp[1]) == ["total"]


def test_rounds_that_merge_nothing_are_counted():
    with pytest.raises(RunError, match="none of 2 rounds"):
        run(dare(Bulyan(num_malicious_nodes=3), **{**DENSE, "values": "f32"}), [dare_mod], rounds=2)
    with pytest.raises(RunError, match="none of 2 rounds"):
        run(dare(FedAvg(), **DENSE), [dare_mod], rounds=2, failing=range(CLIENTS))


def test_other_tensors_than_the_models_are_refused():
    class Loses(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            del arrays["scale"]
            return arrays, metrics

    with pytest.raises(LayoutError, match="returned 3 tensors, the global model has 4"):
        run(dare(Loses(), **DENSE), [dare_mod])


def test_a_deadline_in_flowers_loop():
    """Who does not answer in time is late, and the others are merged."""

    def tamper(partition, reply):
        return None if partition == 0 and UPDATE_KEY in reply.content else reply

    for strategy in (dare(FedAvg(), **DENSE, deadline=1.5), DareStrategy(**DENSE, deadline=1.5)):
        grid = Silent(app_of([dare_mod]), 3, tamper=tamper)
        Strategy.start(strategy, grid, record_of(arrays_of()), num_rounds=1, timeout=60)
        assert [(r.client, r.reason) for r in strategy.outcome.rejections] == [(0, "late")]
        assert strategy.outcome.measurements["accepted"] == 2


class Silent(MemoryGrid):
    """Waits for replies until the time is over, as Flower's grids do."""

    def send_and_receive(self, messages, *, timeout=None):
        import time

        left, replies, until = set(self.push_messages(messages)), [], time.monotonic() + timeout
        while left and time.monotonic() < until:
            got = self.pull_messages(left)
            replies += got
            left -= {message.metadata.reply_to_message_id for message in got}
            time.sleep(0.02)
        assert time.monotonic() < until
        return replies


def test_counters_that_no_client_changes_stay_whole():
    """Weights of thirds add up to 0.9999…, and a cast would cut off the last one."""
    arrays = {**arrays_of(), "norm.num_batches_tracked": np.asarray(1, np.int64)}

    class JustBelow(FedAvg):
        def aggregate_train(self, server_round, replies):
            merged, metrics = super().aggregate_train(server_round, replies)
            merged["norm.num_batches_tracked"] = Array(np.asarray(np.nextafter(1.0, 0.0)))
            return merged, metrics

    result = dare(JustBelow(), **DENSE).start(
        Ordered(app_of([dare_mod]), 3), record_of(arrays), num_rounds=1
    )
    assert numpy_of(result.arrays)["norm.num_batches_tracked"] == 1
