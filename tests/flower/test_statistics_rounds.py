"""Fisher and RegMean in a round: clients send statistics along, the server merges by them."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from dare_agg.errors import RunError
from dare_agg.flower import STATISTICS_KEY, DareStrategy, dare_mod
from dare_agg.merge.engine import merge_deltas
from dare_agg.vectors.model import global_model
from dare_agg.vectors.sources import array_source

CLIENTS = 3
HEAD = r"^head\."


def fisher_of(partition: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fisher values that bfloat16 holds exactly; none for the bias, as if it were unused."""
    rng = np.random.default_rng(partition)
    return {
        name: np.exp2(rng.integers(-20, -4, array.shape)).astype(np.float32)
        for name, array in arrays.items()
        if name == "encoder.weight"
    }


def grams_of(partition: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(partition)
    x = rng.integers(-2, 3, (30, 25)).astype(np.float32)
    gram = x.T @ x  # whole numbers below 256: bfloat16 holds them exactly
    assert np.abs(gram).max() < 256
    return {"encoder.weight": gram}


def collecting_app(toys, collect, edit=None) -> ClientApp:
    inner = toys.app(mods=[])
    app = ClientApp(mods=[dare_mod])

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        kind = msg.content["config"]["statistics"]
        assert kind in ("fisher", "gram")
        reply = inner(msg, context)
        partition = int(context.node_config["partition-id"])
        tuned = {name: array.numpy() for name, array in reply.content["arrays"].items()}
        found = collect(partition, tuned)
        if edit is not None:
            found = edit(partition, found)
        if found is not None:
            record = {name: Array(array) for name, array in found.items()}
            reply.content[STATISTICS_KEY] = ArrayRecord(record)
        return reply

    return app


def run(grid, toys, **words):
    outcomes = []
    strategy = DareStrategy(
        round_hook=lambda outcome: outcomes.append(outcome),
        seed=3, fraction_evaluate=0.0, min_evaluate_nodes=0, weighting="equal",
        values="f32", dense=(HEAD,), dense_values="f32", **words,
    )  # fmt: skip
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1, timeout=30)
    merged = {name: array.numpy() for name, array in result.arrays.items()}
    return merged, outcomes


def expected(toys, method, statistics, options=None):
    """The merge of the full deltas, by the library."""
    model = global_model(toys.arrays(), dense=(HEAD,))
    deltas = [
        model.groups.layout.flatten(
            {e.name: toys.delta(e.name, e.shape, p, 1) for e in model.groups.layout.entries}
        )
        for p in range(CLIENTS)
    ]
    merged, _ = merge_deltas(
        model.groups.layout, [array_source(d) for d in deltas], method,
        statistics=statistics, options=options or {},
    )  # fmt: skip
    return model, merged


def test_fisher_of_full_deltas(memory_grid, toys):
    app = collecting_app(toys, fisher_of)
    merged, outcomes = run(memory_grid(app, CLIENTS), toys, method="fisher", drop_rate=0)
    model, delta = expected(toys, "fisher", [fisher_of(p, toys.arrays()) for p in range(CLIENTS)])
    found = model.groups.layout.flatten(merged) - model.delta
    np.testing.assert_allclose(found, delta, rtol=0, atol=1e-6)
    average = expected(toys, "average", [])[1]
    assert np.abs(delta - average).max() > 1e-3
    # The unused parameter is averaged, the dense group always is.
    bias = model.groups.layout["encoder.bias"]
    np.testing.assert_allclose(
        found[bias.offset : bias.stop], average[bias.offset : bias.stop], atol=1e-6
    )
    sent = outcomes[0].measurements["statistics_bytes"]
    assert all(2 * model.groups.layout.size < size for size in sent)


def test_fisher_values_come_for_the_survivors_only(memory_grid, toys):
    app = collecting_app(toys, fisher_of)
    merged, outcomes = run(memory_grid(app, CLIENTS), toys, method="fisher", drop_rate="0.8")
    model, delta = expected(toys, "fisher", [fisher_of(p, toys.arrays()) for p in range(CLIENTS)])
    found = model.groups.layout.flatten(merged) - model.delta
    plans = outcomes[0].plans
    masks = [plan.spec().draw_mask().indices(0, model.delta.size) for plan in plans]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    kept = masks[0]
    # Where all clients speak, the merge is that of the full deltas, rescaled.
    np.testing.assert_allclose(found[kept], 5 * delta[kept], rtol=1e-3, atol=2e-6)
    found[kept] = 0
    assert not found.any()
    size = model.groups.layout.size
    assert max(outcomes[0].measurements["statistics_bytes"]) < 2 * size / 5 + 300


def test_regmean(memory_grid, toys):
    app = collecting_app(toys, grams_of)
    options = {"off-diagonal": 1.0}
    merged, outcomes = run(
        memory_grid(app, CLIENTS), toys, method="regmean", drop_rate=0, options=options
    )
    grams = [grams_of(p, toys.arrays()) for p in range(CLIENTS)]
    model, delta = expected(toys, "regmean", grams, options)
    found = model.groups.layout.flatten(merged) - model.delta
    np.testing.assert_allclose(found, delta, rtol=0, atol=2e-6)
    assert np.abs(delta - expected(toys, "average", [])[1]).max() > 1e-3
    triangle = 25 * 26 // 2
    assert all(
        2 * triangle < size < 2 * triangle + 300
        for size in outcomes[0].measurements["statistics_bytes"]
    )


def negative(partition, found):
    return {n: -a for n, a in found.items()} if partition == 1 else found


def other_shape(partition, found):
    return {n: a[:3] for n, a in found.items()} if partition == 1 else found


def stranger(partition, found):
    return {"head.weight": found["encoder.weight"]} if partition == 1 else found


def missing(partition, found):
    return None if partition == 1 else found


def infinite(partition, found):
    return {n: a * np.float32(np.inf) for n, a in found.items()} if partition == 1 else found


@pytest.mark.parametrize(
    ("method", "edit", "reason"),
    [
        ("fisher", negative, "statistics"),
        ("fisher", other_shape, "layout"),
        ("fisher", missing, "statistics"),
        ("fisher", infinite, "non-finite"),
        ("regmean", other_shape, "layout"),
        ("regmean", stranger, "layout"),
        ("regmean", missing, "statistics"),
    ],
)
def test_bad_statistics_reject_their_client_alone(memory_grid, toys, method, edit, reason):
    collect = fisher_of if method == "fisher" else grams_of
    app = collecting_app(toys, collect, edit)
    _, outcomes = run(memory_grid(app, CLIENTS), toys, method=method, drop_rate="0.5")
    (rejection,) = outcomes[0].rejections
    assert rejection.reason == reason and rejection.client == 1
    assert outcomes[0].measurements["accepted"] == CLIENTS - 1


def test_an_app_without_statistics_is_told_what_to_return(memory_grid, toys):
    with pytest.raises(RunError, match=r"dare\.statistics"):
        run(memory_grid(toys.app(), CLIENTS), toys, method="fisher")
