"""Runs that go on from an adapter, and nodes whose base is another."""

import json
import shutil

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

from client.app import app as client_app
from dare_agg.errors import ConfigError
from server.app import main as run_server
from server.check import check_here
from server.config import DEFAULTS
from simulations.runs.memory_grid import MemoryGrid, pretend_task


@pytest.fixture
def run(review_files, tmp_path):
    def go(model, into="run", models=None, **changes):
        raw = DEFAULTS | {
            "model": str(model), "data": str(review_files["csv"]), "text-column": "review",
            "label-column": "tone", "partition": "iid", "min-clients": 2, "length": 12,
            "steps": 3, "batch": 4, "learning-rate": 1e-2, "num-rounds": 1, "train": "lora",
            "lora-rank": 2, "methods": "fedavg", "output": str(tmp_path / into),
        }  # fmt: skip
        raw |= {key.replace("_", "-"): value for key, value in changes.items()}
        if raw["train"] != "lora":
            del raw["lora-rank"]
        pretend_task()
        grid = MemoryGrid(client_app, 2, run_config=raw)
        for node, number in grid.partitions.items():  # one path means another model there
            if number in (models or {}):
                grid.contexts[node].run_config["model"] = str(models[number])
        run_server(grid, Context(1, 1, {}, RecordDict(), raw))
        text = (tmp_path / into / "metrics.jsonl").read_text()
        return tmp_path / into / "model-fedavg", [json.loads(line) for line in text.splitlines()]

    return go


@pytest.mark.parametrize("words", [{}, {"lora_dora": True, "lora_whole": "norm"}])
def test_a_run_goes_on_from_its_adapter(run, tiny_language_model, words):
    words = {"task": "causal-lm", **words}
    model, _ = run(tiny_language_model, **words)
    check_here({"initial": str(model / "adapter")})
    again, rows = run(
        tiny_language_model, into="again", initial=str(model / "adapter"),
        learning_rate=1e-12, **words,
    )  # fmt: skip
    assert rows[0]["accepted"] == 2
    before, after = (load_file(m / "adapter" / "adapter_model.safetensors") for m in (model, again))
    assert before.keys() == after.keys()
    assert all(np.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_a_head_goes_on_too(run, tiny_model):
    model, rows = run(tiny_model, steps=20, head_learning_rate=1e-2)
    _, again = run(tiny_model, into="again", initial=str(model / "adapter"),
                   learning_rate=1e-12, head_learning_rate=1e-12)  # fmt: skip
    assert again[0]["accuracy"] == rows[0]["accuracy"] > 0.6


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"lora_alpha": None}, {}, "has no lora_alpha in its adapter_config.json"),
        ({"base_model_name_or_path": "org/other"}, {}, "an adapter of base 'org/other'"),
        ({}, {"lora_rank": 4}, "has r = 2, the run's lora-rank is 4; set lora-rank = 2"),
        ({"use_rslora": True}, {}, "set lora-rslora = true"),
        ({"rank_pattern": {"q": 1}}, {}, "has a rank_pattern; a run's adapters have one rank"),
        ({"peft_type": "IA3"}, {}, "of kind IA3; LORA is trained"),
        ({}, {"train": "full"}, "is an adapter, and train = full; set lora"),
    ],
)
def test_an_adapter_that_is_not_the_runs_is_refused(
    run, tiny_language_model, tmp_path, config, changes, message
):
    model, _ = run(tiny_language_model, task="causal-lm")
    changed = tmp_path / "changed"
    shutil.copytree(model / "adapter", changed)
    file = changed / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(ConfigError, match=message):
        run(tiny_language_model, into="no", task="causal-lm", initial=str(changed), **changes)


def test_an_adapter_of_other_targets_is_told_by_the_clients(run, tiny_language_model):
    from dare_agg.errors import RunError

    model, _ = run(tiny_language_model, task="causal-lm")
    with pytest.raises(RunError, match=r"adapters have no .*k_proj.* which this node"):
        run(tiny_language_model, into="no", task="causal-lm", initial=str(model / "adapter"),
            lora_targets="q_proj,k_proj,v_proj", max_empty_rounds=0)  # fmt: skip


@pytest.mark.parametrize("train", ["lora", "head"])
def test_a_node_of_another_base_is_told_before_it_trains(run, tiny_model, tmp_path, train):
    import torch
    from transformers import AutoModel

    same, other = tmp_path / "same", tmp_path / "other"
    for folder in (same, other):
        shutil.copytree(tiny_model, folder)
    network = AutoModel.from_pretrained(tiny_model)
    with torch.no_grad():
        network.encoder.layer[1].output.dense.weight.mul_(1.02)
    network.save_pretrained(other)
    asked = {"train": train, "dense": "" if train == "head" else DEFAULTS["dense"]}
    _, rows = run(tiny_model, models={1: same}, **asked)
    assert rows[0]["accepted"] == 2
    _, rows = run(tiny_model, into="unlike", models={1: other}, **asked)
    assert rows[0]["accepted"] == 1
    (rejected,) = rows[0]["rejected"]
    assert "of this node has other weights than the first client's" in rejected["detail"]
