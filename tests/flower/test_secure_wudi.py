"""Merging by Gram matrices in secure sums over Flower's messages: rounds, one shot, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file, save_file

from dare_agg.checkpoint import write_checkpoint
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError
from dare_agg.flower import dare_mod, reception
from dare_agg.flower.secure.merge import secure_merge
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.flower.transport import to_numpy
from dare_agg.merge.directions import directions_of
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.secure.roster import read_roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.layout import Layout, layout_of
from dare_agg.vectors.model import global_model
from dare_agg.vectors.sources import array_source

DENSE = [r"^head"]


def secure_app(toys: Any) -> ClientApp:
    app = toys.app(mods=[secure_mod, dare_mod])
    secure_queries(app)
    return app


def strategy_for(folder: Path, rate: str = "0", **words: Any) -> SecureStrategy:
    return SecureStrategy(
        secure=SecureSettings("wudi", drop_rate=rate, clip=0.05, directions=3),
        roster=read_roster(folder / "roster.json"),
        stage_seconds=20,
        fraction_evaluate=0.0,
        seed=3,
        dense=DENSE,
        **words,
    )


def plain(layout: Layout, deltas: list[np.ndarray]) -> np.ndarray:
    """The merge in the clear, by three directions a Linear."""
    sources, linears = [array_source(delta) for delta in deltas], model_linears(layout)
    statistics = [
        {name: rows for name, rows, _ in directions_of(source, linears, 3)} for source in sources
    ]
    return merge_deltas(layout, sources, "wudi", statistics=statistics, measure=False)[0]


def learnt(toys: Any, parties: list[int]) -> tuple[Layout, list[np.ndarray]]:
    """What parties learn in the first round."""
    model = global_model(toys.arrays(), dense=DENSE)
    deltas = []
    for party in parties:
        tuned = {
            n: a + toys.delta(n, a.shape, party, 1) if a.dtype.kind == "f" else a
            for n, a in toys.arrays().items()
        }
        deltas.append(global_model(tuned, dense=DENSE).delta[:] - model.delta[:])
    return model.groups.layout, deltas


def test_a_round_is_the_plain_merge_of_all(memory_grid: Any, toys: Any, keys: Any) -> None:
    folder, seen = keys(4), []
    grid = memory_grid(secure_app(toys), 4, shuffle=1)
    strategy = strategy_for(folder, round_hook=seen.append)
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    before = global_model(toys.arrays(), dense=DENSE)
    after = global_model(to_numpy(result.arrays), dense=DENSE)
    step = after.delta[:] - before.delta[:]
    wanted = plain(*learnt(toys, [0, 1, 2, 3]))
    assert np.linalg.norm(step - wanted) / np.linalg.norm(wanted) < 1e-3
    heads = [toys.delta("head.weight", (25, 3), p, 1).ravel() for p in range(4)]
    assert np.abs((after.dense - before.dense)[:75] - np.mean(heads, 0)).max() < 1e-4
    measured = seen[0].measurements
    assert measured["accepted"] == 4 and measured["rejected"] == []
    assert measured["secure"]["method"] == "wudi"
    assert measured["merged_norm"] == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-3)


def test_who_vanishes_is_in_no_sum(memory_grid: Any, toys: Any, keys: Any) -> None:
    folder = keys(5)

    def vanish(partition: int, reply: Any) -> Any:
        record = reply.content.config_records.get("dare.secure")
        if partition == 2 and record is not None and record.get("stage") == "contribute":
            grid.offline.add(next(n for n, p in grid.partitions.items() if p == 2))
            return None
        return reply

    grid = memory_grid(secure_app(toys), 5, tamper=vanish)
    strategy = strategy_for(folder, deadline=2)
    strategy.stage_seconds = 2
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    assert strategy.outcome.measurements["accepted"] == 4
    before = global_model(toys.arrays(), dense=DENSE)
    step = global_model(to_numpy(result.arrays), dense=DENSE).delta[:] - before.delta[:]
    wanted = plain(*learnt(toys, [0, 1, 3, 4]))
    assert np.linalg.norm(step - wanted) / np.linalg.norm(wanted) < 1e-3


@pytest.mark.parametrize("on_disk", [False, True])
def test_all_hold_the_merged_version(
    memory_grid: Any, toys: Any, keys: Any, tmp_path: Path, monkeypatch: Any, on_disk: bool
) -> None:
    """Merged Linears move everywhere, at a drop rate too: steps are of all elements."""
    monkeypatch.setattr(reception, "_OFFERS", [])
    folder, seen = keys(3), []
    words: dict[str, Any] = {"downlink": make_downlink("auto")}
    first: tuple[Any, ...] = (toys.record(toys.arrays()),)
    node = None
    if on_disk:
        write_checkpoint(tmp_path / "base", toys.arrays())
        words = {"base": tmp_path / "base", "state": tmp_path / "state", "verify_every": 1}
        first = ()

        def node(partition: int) -> dict[str, Any]:
            return {"partition-id": partition, "base": str(tmp_path / "base")}

    grid = memory_grid(secure_app(toys), 3, **({"node_config": node} if node else {}))
    strategy = strategy_for(folder, "0.5", round_hook=seen.append, **words)
    result = strategy.start(grid, *first, num_rounds=3)
    assert [o.measurements["accepted"] for o in seen] == [3] * 3
    assert all(not o.measurements["rejected"] for o in seen)
    before, after = toys.arrays(), to_numpy(result.arrays)
    moved = np.array(after["encoder.weight"]) != before["encoder.weight"]
    assert moved.mean() > 0.95


def test_one_shot_leaves_all_with_the_same_model(
    memory_grid: Any, keys: Any, tmp_path: Path
) -> None:
    folder, rng = keys(4), np.random.default_rng(0)
    shapes = {"body.weight": (30, 70), "body.bias": (30,), "out.weight": (5, 30)}
    base = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    tuned = []
    for i in range(4):
        own = {n: a + rng.normal(0, 0.01, a.shape).astype(np.float32) for n, a in base.items()}
        tuned.append(own)
        save_file({**own, "classifier.w": np.full((i + 2, 3), i, np.float32)},
                  tmp_path / f"tuned{i}.safetensors")  # fmt: skip

    def node(partition: int) -> dict:
        return {
            "partition-id": partition,
            "model-path": str(tmp_path / f"tuned{partition}.safetensors"),
            "merged-path": str(tmp_path / f"merged{partition}.safetensors"),
        }

    app = ClientApp(mods=[secure_mod])
    secure_queries(app, find_base=lambda word: str(tmp_path / "base.safetensors"))
    settings = SecureSettings("wudi", drop_rate="0", clip=0.1, directions=3, scaling=0.5)
    result = secure_merge(
        memory_grid(app, 4, node_config=node),
        tmp_path / "base.safetensors",
        read_roster(folder / "roster.json"),
        settings,
        run="merge",
        model="public",
        out=tmp_path / "merged.safetensors",
        stage_seconds=10,
    )
    found = result.measurements
    assert found["method"] == "secure-wudi" and found["directions"] == 3 and found["sketch"] > 0
    assert found["result_at"] == found["parties"] and found["rejected"] == []
    layout = layout_of(shapes)
    deltas = [layout.flatten(own) - layout.flatten(base) for own in tuned]
    merged = load_file(tmp_path / "merged.safetensors")
    step = layout.flatten(merged) - layout.flatten(base)
    wanted = 0.5 * plain(layout, deltas)
    assert np.linalg.norm(step - wanted) / np.linalg.norm(wanted) < 1e-3
    for i in range(4):
        mine = load_file(tmp_path / f"merged{i}.safetensors")
        assert mine["classifier.w"].shape == (i + 2, 3)
        for name in shapes:
            assert np.array_equal(mine[name], merged[name])


def test_a_model_without_linears_is_named_before_anyone_puts_data_in(
    memory_grid: Any, keys: Any, tmp_path: Path
) -> None:
    folder = keys(3)
    base = {"body.w": np.ones((4, 4), np.float32)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"body.w": base["body.w"] + 1}, tmp_path / "tuned.safetensors")
    app = ClientApp(mods=[secure_mod])
    secure_queries(app, find_base=lambda word: str(tmp_path / "base.safetensors"))
    grid = memory_grid(
        app,
        3,
        node_config=lambda p: {
            "partition-id": p, "model-path": str(tmp_path / "tuned.safetensors"),
        },
    )  # fmt: skip
    with pytest.raises(ConfigError, match="no Linear"):
        secure_merge(
            grid,
            tmp_path / "base.safetensors",
            read_roster(folder / "roster.json"),
            SecureSettings("wudi", drop_rate="0"),
            run="merge",
            stage_seconds=5,
        )
    assert not list((folder).glob("*.ledger"))


def test_a_party_may_refuse_gram_matrices(memory_grid: Any, toys: Any, keys: Any) -> None:
    folder = keys(3)

    def node(partition: int) -> dict[str, Any]:
        return {"partition-id": partition, "secure-methods": "mean,ties"}

    strategy = strategy_for(folder, max_empty_rounds=1)
    grid = memory_grid(secure_app(toys), 3, node_config=node)
    with pytest.raises(Exception, match="wudi, this party takes part in mean, ties"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
