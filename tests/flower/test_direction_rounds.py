"""WUDI in rounds over Flower's messages: directions travel, are counted, signed and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from dare_agg.codec.budget import UploadBudget
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import BudgetError, ConfigError, RunError
from dare_agg.flower import DareStrategy
from dare_agg.flower.records import STATISTICS_KEY
from dare_agg.flower.transport import pack, unpack
from dare_agg.merge.directions import directions_of
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.rounds.directions import most_bytes
from dare_agg.vectors.model import global_model
from dare_agg.vectors.sources import array_source

HEAD = r"^head\."
CLIENTS = 3


def run(grid: Any, toys: Any, rounds: int = 1, **words: Any) -> tuple[dict, list]:
    outcomes: list[Any] = []
    settings = {
        "values": "f32", "drop_rate": 0, "direction_bits": 32, "directions": 3, **words,
    }  # fmt: skip
    strategy = DareStrategy(
        method="wudi", round_hook=outcomes.append, seed=3, fraction_evaluate=0.0,
        min_evaluate_nodes=0, weighting="equal", dense=(HEAD,), dense_values="f32", **settings,
    )  # fmt: skip
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=rounds, timeout=30)
    return {name: array.numpy() for name, array in result.arrays.items()}, outcomes


def test_the_training_code_stays_as_it_is(memory_grid: Any, toys: Any) -> None:
    merged, outcomes = run(memory_grid(toys.app(), CLIENTS), toys)
    model = global_model(toys.arrays(), dense=[HEAD])
    layout = model.groups.layout
    deltas = []
    for client in range(CLIENTS):
        tuned = {
            n: a + toys.delta(n, a.shape, client, 1) if a.dtype.kind == "f" else a
            for n, a in toys.arrays().items()
        }
        deltas.append(layout.flatten(tuned) - model.delta[:])
    sources, linears = [array_source(delta) for delta in deltas], model_linears(layout)
    statistics = [
        {name: rows for name, rows, _ in directions_of(source, linears, 3)} for source in sources
    ]
    wanted, _ = merge_deltas(layout, sources, "wudi", statistics=statistics, measure=False)
    step = layout.flatten(merged) - model.delta[:]
    assert np.linalg.norm(step - wanted) < 2e-3 * np.linalg.norm(wanted)
    measured = outcomes[0].measurements
    assert measured["accepted"] == CLIENTS and measured["rejected"] == []
    plan = outcomes[0].plans[0]
    assert measured["statistics_bytes"] == [most_bytes(plan.terms, layout)] * CLIENTS
    for total, update, dense, more in zip(
        *(measured[k] for k in ("upload_bytes", "update_bytes", "dense_bytes", "statistics_bytes")),
        strict=True,
    ):
        assert total >= update + dense + more


def test_a_budget_counts_the_directions(memory_grid: Any, toys: Any) -> None:
    layout = global_model(toys.arrays(), dense=[HEAD]).groups.layout
    words = {"directions": 3, "direction_bits": 4, "values": "auto", "drop_rate": "0.5"}
    budget = UploadBudget(1100)
    _, outcomes = run(memory_grid(toys.app(), CLIENTS), toys, upload_budget=budget, **words)
    plan = outcomes[0].plans[0]
    measured = outcomes[0].measurements
    assert measured["accepted"] == CLIENTS
    sent = [
        sum(parts)
        for parts in zip(
            measured["update_bytes"], measured["dense_bytes"], measured["statistics_bytes"],
            strict=True,
        )
    ]  # fmt: skip
    assert max(sent) <= 1100
    assert min(measured["statistics_bytes"]) == most_bytes(plan.terms, layout)
    # What the directions take is not there for the survivors.
    with pytest.raises((BudgetError, RunError)):
        run(
            memory_grid(toys.app(), CLIENTS), toys, upload_budget=UploadBudget(400),
            **{**words, "directions": 20, "direction_bits": 16},
        )  # fmt: skip


def test_steps_of_all_elements_come_down(memory_grid: Any, toys: Any) -> None:
    """Merged Linears move where no client's mask has survivors; all hold the same version."""
    merged, outcomes = run(
        memory_grid(toys.app(), CLIENTS), toys, 3, drop_rate="0.9", values="b1",
        direction_bits=4, downlink=make_downlink("auto"),
    )  # fmt: skip
    assert [o.measurements["accepted"] for o in outcomes] == [CLIENTS] * 3
    assert all(not o.measurements["rejected"] for o in outcomes)
    moved = merged["encoder.weight"] != toys.arrays()["encoder.weight"]
    assert moved.mean() > 0.9


def test_damaged_and_missing_directions_are_that_clients_rejection(
    memory_grid: Any, toys: Any
) -> None:
    def tamper(partition: int, reply: Any) -> Any:
        if reply.has_error() or STATISTICS_KEY not in reply.content:
            return reply
        if partition == 0:
            del reply.content[STATISTICS_KEY]
        elif partition == 1:
            record = reply.content[STATISTICS_KEY]
            assert isinstance(record, ArrayRecord)
            blob = bytearray(unpack(record, 1 << 20))
            blob[-1] ^= 1
            reply.content[STATISTICS_KEY] = pack(bytes(blob))
        return reply

    _, outcomes = run(memory_grid(toys.app(), 4, tamper=tamper), toys)
    measured = outcomes[0].measurements
    assert measured["accepted"] == 2
    assert sorted(r["reason"] for r in measured["rejected"]) == ["checksum", "directions"]


def test_a_model_without_linears_ends_before_anyone_trains(memory_grid: Any, toys: Any) -> None:
    grid = memory_grid(toys.app(), CLIENTS)
    strategy = DareStrategy(method="wudi", fraction_evaluate=0.0, exclude=("weight$",))
    with pytest.raises(ConfigError, match="needs Linears"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1, timeout=30)


def test_directions_of_other_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not merge by them"):
        DareStrategy(method="ties", directions=4)
