"""The strategy and the mod together, through an in-memory grid and real ClientApps."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from strategy_runs import run
from toy import numpy_of

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.flower import strategy as strategy_module
from dare_agg.flower.records import REPLY_KEY
from dare_agg.rounds.step import StepState


def test_dense_mode_equals_flowers_fedavg(memory_grid, toys):
    fedavg = FedAvg(fraction_evaluate=0.0).start(
        memory_grid(toys.app(), 4), toys.record(toys.arrays()), num_rounds=3
    )
    dare, _ = run(
        memory_grid(toys.app(), 4), toys, 3, drop_rate=0, values="f32", dense_values="f32"
    )
    expected, found = numpy_of(fedavg.arrays), numpy_of(dare.arrays)
    assert list(found) == list(expected)
    for name, array in expected.items():
        if array.dtype.kind == "f" and not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6)
    for number in (1, 2, 3):
        assert dare.train_metrics_clientapp[number]["loss"] == pytest.approx(
            fedavg.train_metrics_clientapp[number]["loss"]
        )


def test_the_same_app_serves_fedavg_with_the_mod_in_place(memory_grid, toys):
    """The mod leaves other strategies' messages alone: one app, both strategies."""
    with_mod = FedAvg(fraction_evaluate=0.0).start(
        memory_grid(toys.app([dare_mod]), 3), toys.record(toys.arrays()), num_rounds=1
    )
    without = FedAvg(fraction_evaluate=0.0).start(
        memory_grid(toys.app([]), 3), toys.record(toys.arrays()), num_rounds=1
    )
    for name, array in numpy_of(without.arrays).items():
        np.testing.assert_allclose(numpy_of(with_mod.arrays)[name], array, atol=1e-6)


def test_same_seed_same_bits_whatever_the_order_of_nodes_and_replies(memory_grid, toys):
    results = [
        run(memory_grid(toys.app(), 6, shuffle=shuffle), toys, 3, fraction_train=0.5)
        for shuffle in (1, 2)
    ]
    (first, one), (second, other) = results
    for name, array in numpy_of(first.arrays).items():
        assert array.tobytes() == numpy_of(second.arrays)[name].tobytes()
    assert [o.measurements["clients"] for o in one] == [o.measurements["clients"] for o in other]
    assert len({tuple(o.measurements["clients"]) for o in one}) > 1  # samples differ by round
    third, _ = run(memory_grid(toys.app(), 6), toys, 3, fraction_train=0.5, seed=8)
    assert any(
        array.tobytes() != numpy_of(third.arrays)[name].tobytes()
        for name, array in numpy_of(first.arrays).items()
    )


def test_uploads_shrink_by_the_rate_and_are_measured(memory_grid, toys):
    _, outcomes = run(memory_grid(toys.app(), 3), toys, 1, arrays=large_arrays(), drop_rate=0.9)
    measured = outcomes[0].measurements
    dense_bytes = 4 * 300 * 400
    assert max(measured["update_bytes"]) < dense_bytes / 280
    assert min(measured["download_bytes"]) > dense_bytes
    assert measured["accepted"] == 3 and measured["rejected"] == []
    assert all(norm > 0 for norm in measured["delta_norms"])
    assert measured["survivors_per_element"] == pytest.approx(0.3)


def large_arrays() -> dict[str, np.ndarray]:
    return {"w": np.zeros((300, 400), np.float32)}


def test_excluded_tensors_never_leave_and_stay_each_clients_own(memory_grid, toys):
    seen: dict[int, list[np.ndarray]] = {}

    def edit(partition, tuned, metrics):
        seen.setdefault(partition, []).append(tuned["head.weight"])

    grid = memory_grid(toys.app(edit=edit), 2)
    result, _ = run(grid, toys, 3, exclude=["head"])
    start = toys.arrays()["head.weight"]
    assert np.array_equal(numpy_of(result.arrays)["head.weight"], start)
    for partition, heads in seen.items():
        own = start
        for number, head in enumerate(heads, start=1):
            own = own + toys.delta("head.weight", own.shape, partition, number)
            np.testing.assert_allclose(head, own, atol=1e-6)


def test_dense_tensors_travel_whole(memory_grid, toys):
    result, outcomes = run(
        memory_grid(toys.app(), 2), toys, 1, dense=["head"], dense_values="f32", weighting="equal"
    )
    start = toys.arrays()["head.weight"]
    mean = np.mean([toys.delta("head.weight", start.shape, c, 1) for c in range(2)], axis=0)
    np.testing.assert_allclose(numpy_of(result.arrays)["head.weight"], start + mean, atol=1e-6)
    assert min(outcomes[0].measurements["dense_bytes"]) > 4 * 75


def test_clients_may_have_their_own_rate_and_format(memory_grid, toys):
    def node_config(partition):
        return {"partition-id": partition, "uplink-kbit-s": 20.0 if partition == 0 else 5000.0}

    def terms(hello):
        if hello.uplink_kbit_s < 100:
            return ClientTerms(parse_drop_rate("0.99"), "b1")
        return ClientTerms(parse_drop_rate("0.5"), "f16")

    grid = memory_grid(toys.app(), 3, node_config=node_config)
    _, outcomes = run(grid, toys, 1, client_terms=terms)
    measured = outcomes[0].measurements
    assert measured["drop_rates"] == pytest.approx([0.99, 0.5, 0.5])
    assert measured["update_bytes"][0] < measured["update_bytes"][1]


def test_evaluation_on_clients_and_on_the_server(memory_grid, toys):
    calls = []

    def evaluate_fn(number, arrays):
        calls.append(number)
        return MetricRecord({"total": float(sum(a.numpy().sum() for a in arrays.values()))})

    result, outcomes = run(
        memory_grid(toys.app(), 2),
        toys,
        2,
        evaluate_fn=evaluate_fn,
        fraction_evaluate=1.0,
        min_evaluate_nodes=2,
        exclude=["num_batches"],
    )
    assert calls == [0, 1, 2] and set(result.evaluate_metrics_serverapp) == {0, 1, 2}
    assert result.evaluate_metrics_clientapp[2]["sum"] != 0
    assert outcomes[1].client_metrics["sum"] == result.evaluate_metrics_clientapp[2]["sum"]
    assert outcomes[1].server_metrics["total"] == result.evaluate_metrics_serverapp[2]["total"]
    assert outcomes[1].measurements["evaluate_download_bytes"] > 0


@pytest.mark.parametrize("step", ["plain", "momentum", "adam"])
def test_a_resumed_run_ends_with_the_same_bits(memory_grid, toys, step):
    whole, outcomes = run(memory_grid(toys.app(), 3), toys, 4, server_step=step)
    half = outcomes[1]
    # Local buffers live on the clients; a resumed client starts from the server's copy.
    resumed, _ = run(
        memory_grid(toys.app(), 3),
        toys,
        4,
        arrays=half.model.arrays(),
        server_step=step,
        start={"start_round": 3, "step_state": half.step_state},
    )
    for name, array in numpy_of(whole.arrays).items():
        assert array.tobytes() == numpy_of(resumed.arrays)[name].tobytes()
    assert isinstance(half.step_state, StepState) and half.step_state.count == 2


def test_the_hook_can_stop_early(memory_grid, toys):
    result, outcomes = run(
        memory_grid(toys.app(), 2), toys, 9, round_hook=lambda outcome: outcome.round == 2
    )
    assert len(outcomes) == 2 and set(result.train_metrics_clientapp) == {1, 2}
    assert len(result.arrays) == len(toys.arrays())


def test_ties_runs_and_differs_from_the_mean(memory_grid, toys):
    mean, _ = run(memory_grid(toys.app(), 3), toys, 1, drop_rate=0, values="f32")
    ties, _ = run(memory_grid(toys.app(), 3), toys, 1, drop_rate=0, values="f32", method="ties")
    a, b = numpy_of(mean.arrays)["encoder.weight"], numpy_of(ties.arrays)["encoder.weight"]
    assert not np.array_equal(a, b)
    start = toys.arrays()["encoder.weight"]
    assert np.corrcoef((a - start).ravel(), (b - start).ravel())[0, 1] > 0.8


def test_flowers_own_loop_drives_the_strategy_too(memory_grid, toys):
    words = {"seed": 7, "fraction_evaluate": 0.0}
    ours, _ = run(memory_grid(toys.app(), 3), toys, 2)
    flowers = Strategy.start(
        DareStrategy(**words), memory_grid(toys.app(), 3), toys.record(toys.arrays()), 2
    )
    for name, array in numpy_of(ours.arrays).items():
        assert array.tobytes() == numpy_of(flowers.arrays)[name].tobytes()


def test_an_unknown_order_is_refused_and_other_messages_pass(memory_grid, toys):
    from flwr.app import ConfigRecord

    from dare_agg.flower.records import ORDER_KEY

    context = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
    message = Message(RecordDict({ORDER_KEY: ConfigRecord({"ask": "launch"})}), 2, "train")
    reply = dare_mod(message, context, lambda m, c: pytest.fail("must not train"))
    assert reply.content[REPLY_KEY]["refused"] == "version"


def test_an_app_that_returns_no_arrays_is_told_so(memory_grid, toys):
    app = ClientApp(mods=[dare_mod])

    @app.train()
    def train(msg, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=msg)

    with pytest.raises(RunError, match="return the trained arrays"):
        run(memory_grid(app, 2), toys, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"method": "tie"}, "did you mean 'ties'"),
        ({"server_step": "adm"}, "did you mean 'adam'"),
        ({"fraction_train": 1.5}, "fraction_train"),
        ({"min_train_nodes": -1}, "min_train_nodes"),
        ({"deadline": 0}, "deadline"),
        ({"seed": -1}, "seed"),
        ({"drop_rate": "1.0"}, r"drop rate 1\.0 is outside \[0, 1\)"),
    ],
)
def test_settings_fail_before_anything_runs(words, says):
    with pytest.raises(ConfigError, match=says):
        DareStrategy(**words)


def test_the_strategy_takes_fedavgs_words():
    import inspect

    fedavg = list(inspect.signature(FedAvg.__init__).parameters)
    ours = list(inspect.signature(DareStrategy.__init__).parameters)
    assert ours[: len(fedavg)] == fedavg
    assert strategy_module.DareStrategy is DareStrategy
