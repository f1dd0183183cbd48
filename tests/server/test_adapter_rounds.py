"""Nodes of ranks 2, 4 and 8 in the real app: what is merged, what it errs by, what is said."""

import json
import logging

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

from client.app import app as client_app
from client.config import task_config
from client.partition import partition
from client.training import build_task
from dare_agg.downlink.base import write_base
from dare_agg.errors import ConfigError
from server.app import main as run_server
from server.config import DEFAULTS
from server.reading import read_config
from simulations.runs.memory_grid import MemoryGrid, pretend_task

RANKS = (2, 4, 8)


@pytest.fixture
def words(tiny_language_model, review_files):
    return DEFAULTS | {
        "task": "causal-lm", "model": str(tiny_language_model), "data": str(review_files["csv"]),
        "text-column": "review", "label-column": "tone", "partition": "iid", "min-clients": 3,
        "length": 12, "steps": 6, "batch": 4, "learning-rate": 2e-2, "num-rounds": 1,
        "train": "lora", "lora-rank": 8, "lora-targets": "all-linear", "lora-merge": "product",
        "methods": "fedavg",
    }  # fmt: skip


@pytest.fixture
def run(words, tmp_path):
    def go(into="run", node=None, **changes):
        raw = words | {key.replace("_", "-"): value for key, value in changes.items()}
        raw["output"] = str(tmp_path / into)
        pretend_task()

        def own_rank(number):
            return {"partition-id": number, "num-partitions": 3, "lora-rank": RANKS[number]}

        grid = MemoryGrid(client_app, 3, run_config=raw, node_config=node or own_rank)
        run_server(grid, Context(1, 1, {}, RecordDict(), raw))
        folder = tmp_path / into
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return folder, rows

    return go


def adapter(folder, method="fedavg"):
    return load_file(folder / f"model-{method}" / "adapter" / "adapter_model.safetensors")


def product(factors, module):
    b, a = (factors[f"base_model.model.{module}.lora_{which}.weight"] for which in "BA")
    return b.astype(np.float64) @ a.astype(np.float64)


def trained_by_hand(words, start=None):
    """What each of the three nodes makes of the start, and the rows it counts for."""
    found = []
    for number, rank in enumerate(RANKS):
        node = {"partition-id": number, "num-partitions": 3, "lora-rank": rank}
        task = build_task(task_config(words, node))
        data = task.train_rows
        rows = partition("iid", data.labels, data.groups, 3, alpha=0.5, seed=0)[number]
        state, weight, _ = task.train(start or task.initial_state(), rows, seed=(0, 1, number))
        found.append(({n.replace(".default", ""): a for n, a in state.items()}, weight))
    return found


def test_products_of_unlike_ranks_are_merged_exactly_and_the_error_is_the_one_measured(
    run, words, caplog
):
    with caplog.at_level(logging.INFO):
        folder, rows = run()
    merged, clients = adapter(folder), trained_by_hand(words)
    total = sum(weight for _, weight in clients)
    errors = rows[0]["lora_errors"]
    assert len(errors) == 14 and rows[0]["accepted"] == 3
    for module, error in errors.items():
        exact = sum(weight / total * product(state, module) for state, weight in clients)
        # A first round begins with B = 0: the ranks of the nodes add up.
        s = np.linalg.svd(exact, compute_uv=False)
        assert np.count_nonzero(s > 1e-6 * s[0]) == min(2 + 4 + 8, *exact.shape)
        ours = product(merged, module)
        measured = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert measured == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert measured == pytest.approx(
            np.linalg.norm(s[8:]) / np.linalg.norm(s), rel=1e-3, abs=1e-6
        )
    assert rows[0]["lora_error"] == max(errors.values()) > 1e-4
    said = next(text for text in caplog.messages if "merged by their products" in text)
    worst = max(errors, key=errors.get)
    assert "of rank up to 14" in said and f"({worst})" in said


def test_factors_are_averaged_by_default_and_err_more(run, words):
    assert DEFAULTS["lora-merge"] == "factors"
    clients = trained_by_hand(words)
    total = sum(weight for _, weight in clients)
    found = {}
    for way in ("factors", "product"):
        folder, rows = run(into=way, lora_merge=way)
        assert ("lora_errors" in rows[0]) == (way == "product")
        found[way] = adapter(folder)
    for name, array in found["factors"].items():
        mean = sum(np.float32(weight / total) * state[name] for state, weight in clients)
        assert np.allclose(array, mean, atol=1e-6), name
    for module in {
        n.split(".lora_")[0].removeprefix("base_model.model.") for n in found["factors"]
    }:
        exact = sum(weight / total * product(state, module) for state, weight in clients)
        by_factors, by_product = (
            np.linalg.norm(product(found[way], module) - exact) for way in ("factors", "product")
        )
        assert by_product < 0.5 * by_factors, module


@pytest.mark.parametrize("downlink", ["full", "auto"])
def test_rounds_go_on_from_merged_products_whatever_travels(
    run, words, tmp_path, downlink, monkeypatch
):
    """Updates up in one bit a value, versions down, three rounds; the same bits again."""
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    asked = {"methods": "dare-task-arithmetic", "drop_rate": "0", "downlink": downlink,
             "num_rounds": 3, "steps": 20, "learning_rate": 1e-2}  # fmt: skip
    _, rows = run(**asked)
    assert [row["accepted"] for row in rows] == [3, 3, 3] and not rows[-1]["rejected"]
    untouched = build_task(task_config(words, {}))
    assert rows[-1]["loss"] < untouched.evaluate(untouched.initial_state())["loss"] - 0.05
    assert all(0 < row["lora_error"] < 1 for row in rows)
    parameters = rows[0]["parameters"]
    assert all(row["update_bytes_per_client"] < parameters / 6 for row in rows)
    _, again = run(into="again", **asked)
    assert [r["lora_errors"] for r in again] == [r["lora_errors"] for r in rows]
    assert [r["loss"] for r in again] == [r["loss"] for r in rows]


def test_what_is_beside_the_factors_is_averaged(run, words):
    folder, _ = run(lora_whole="norm", lora_dora=True)
    merged = adapter(folder)
    clients = trained_by_hand(words | {"lora-whole": "norm", "lora-dora": True})
    total = sum(weight for _, weight in clients)
    beside = [n for n in clients[0][0] if ".lora_A." not in n and ".lora_B." not in n]
    assert any("magnitude" in n for n in beside) and any("modules_to_save" in n for n in beside)
    for name in beside:
        saved = name.replace(".modules_to_save", "")
        saved = saved.removesuffix(".weight") if "magnitude" in name else saved
        mean = sum(weight / total * state[name] for state, weight in clients)
        assert np.allclose(merged[saved], mean, atol=1e-6), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "fedavg,dare-ties"}, "product with dare-ties: the mean of products"),
        ({"scaling": 0.5}, "with scaling 0.5"),
        ({"server-step": "momentum"}, "with server-step 'momentum'"),
        ({"server-learning-rate": 0.5}, "leave it plain, at rate 1"),
        ({"train": "full"}, "train = full trains no adapters; set train = lora"),
        ({"lora-ranks": "2,16"}, "'16' is no rank from 1 to 8"),
        ({"lora-ranks": "x"}, "'x' is no rank"),
        ({"lora-rank": 0}, "lora-rank = 0"),
    ],
)
def test_what_a_merge_of_products_cannot_keep_is_refused_at_once(words, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_config(words | changes)


def test_a_node_of_too_large_a_rank_is_told_and_the_others_go_on(run, words, tmp_path):
    # A file to begin with: whichever node is the first would be asked for the start.
    start = tmp_path / "start.safetensors"
    start.write_bytes(write_base(build_task(task_config(words, {})).initial_state()))

    def node(number):
        own = {"lora-rank": 9} if number == 2 else {}
        return {"partition-id": number, "num-partitions": 3, **own}

    _, rows = run(node=node, labels="a", evaluate=False, initial=str(start))
    assert rows[0]["accepted"] == 2
    (rejected,) = rows[0]["rejected"]
    assert "lora-rank = 9 of a node is above the run's 8" in rejected["detail"]
