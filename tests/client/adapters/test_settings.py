"""Which modules get adapters, and what is refused before anything trains."""

import numpy as np
import pytest

from client.config import configure, task_config
from client.training import build_task
from dare_agg.errors import ConfigError, LayoutError


@pytest.fixture
def task(tiny_language_model, review_files):
    def make(**words):
        settings = {
            "task": "causal-lm", "model": str(tiny_language_model),
            "data": str(review_files["csv"]), "text_column": "review", "label_column": "tone",
            "length": 12, "train": "lora", "lora_rank": 2, "steps": 3, **words,
        }  # fmt: skip
        return build_task(configure(**settings))

    return make


def adapted(task):
    return {
        name.split(".lora_A")[0].removeprefix("base_model.model.model.")
        for name in task.initial
        if ".lora_A" in name
    }


def test_targets_are_names_patterns_or_all_linear(task):
    layers = ("layers.0", "layers.1")
    assert adapted(task(lora_targets="self_attn.k_proj")) == {
        f"{n}.self_attn.k_proj" for n in layers
    }
    pattern = r"model\.layers\.1\..*\.(q|k)_proj"
    assert adapted(task(lora_targets=pattern)) == {
        "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj"
    }  # fmt: skip
    assert adapted(task(lora_targets=f"{pattern},o_proj")) == {
        "layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj",
        *(f"{n}.self_attn.o_proj" for n in layers),
    }  # fmt: skip
    assert len(adapted(task(lora_targets="all-linear"))) == 14  # the tied head is not among them


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"lora_targets": "q_prj"}, "'q_prj' fits no module of .*did you mean 'q_proj'"),
        ({"lora_targets": "zzz"}, "fits no module of .*it has embed_tokens, q_proj"),
        ({"lora_targets": r"q_proj\d"}, "fits no module of"),
        ({"lora_targets": "mlp"}, "a LlamaMLP, which LoRA cannot adapt; it has gate_proj, up_proj"),
        ({"lora_targets": "embed_tokens"}, "shares its weights with 'lm_head.weight'"),
        ({"lora_rank": 0}, "lora-rank = 0; at least 1"),
        (
            {"lora_rank": 17, "lora_targets": "k_proj"},
            "rank = 17 is above .*16 outputs: at most 16",
        ),
        ({"lora_alpha": 0}, "lora-alpha = 0; at least 1"),
        ({"lora_bias": "some"}, "lora-bias 'some' is unknown"),
        ({"lora_whole": "nrm"}, "lora-whole 'nrm' names no module .*did you mean 'norm'"),
        ({"lora_whole": "lm_head"}, "shares its weights with 'model.embed_tokens.weight'"),
        ({"lora_whole": "act_fn"}, "has no weights to train"),
        ({"lora_whole": "mlp", "lora_targets": "up_proj"}, "in lora-targets and in lora-whole"),
    ],
)
def test_what_does_not_fit_the_model_is_said_in_one_line(task, words, message):
    with pytest.raises(ConfigError, match=message):
        _ = task(**words).initial


def test_a_pattern_is_res_and_no_trap(task):
    with pytest.raises(LayoutError, match="RE2 syntax"):
        _ = task(lora_targets=r"(?=q_proj)").initial
    with pytest.raises(ConfigError, match="fits no module"):  # would take days by backtracking
        _ = task(lora_targets=r"(\w+\.?)+!").initial


@pytest.mark.parametrize(
    "words",
    [
        {"lora_dora": True},
        {"lora_rslora": True, "lora_alpha": 4},
        {"lora_targets": "gate_proj,q_proj"},
        {"lora_whole": "norm"},
    ],
)
def test_all_forms_learn_and_only_what_is_theirs_moves(task, words):
    made = task(learning_rate=1e-2, steps=10, **words)
    start = made.initial_state()
    network = made._load()
    frozen = {n: p.detach().clone() for n, p in network.named_parameters() if n not in start}
    trained, _, _ = made.train(start, np.arange(32), seed=[0])
    assert all(not np.array_equal(trained[n], start[n]) for n in start)
    assert made.evaluate(trained)["loss"] < made.evaluate(start)["loss"]
    for name, parameter in network.named_parameters():
        assert name in start or bool((parameter == frozen[name]).all()), name


def test_a_node_says_its_own_rank_and_simulated_ones_take_turns():
    run = {"lora-rank": 32, "lora-ranks": "8,16,32"}
    turns = [
        task_config(run, {"partition-id": n, "num-partitions": 4}).lora_own_rank for n in range(4)
    ]
    assert turns == [8, 16, 32, 8]
    assert task_config(run, {"lora-rank": 4, "partition-id": 0}).lora_own_rank == 4
    assert task_config({"lora-rank": 8}, {}).lora_own_rank == 0
    for word in (0, "x", True, -3, 2.5):
        with pytest.raises(ConfigError, match="of a node; a whole number"):
            task_config(run, {"lora-rank": word})
    with pytest.raises(ConfigError, match="64 of a node is above the run's 32"):
        task_config(run, {"lora-rank": 64})
