"""A node of a smaller rank learns its own components, and starts from the same model."""

import numpy as np
import pytest

from client.config import configure
from client.training import build_task
from dare_agg.errors import ConfigError


@pytest.fixture
def task(tiny_language_model, review_files):
    def make(**words):
        settings = {
            "task": "causal-lm", "model": str(tiny_language_model),
            "data": str(review_files["csv"]), "text_column": "review", "label_column": "tone",
            "length": 12, "train": "lora", "lora_rank": 4, "steps": 6, "learning_rate": 1e-2,
            "weight_decay": 0.1, **words,
        }  # fmt: skip
        return build_task(configure(**settings))

    return make


def moved(state, seed=0):
    rng = np.random.default_rng(seed)
    return {
        n: (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32) for n, a in state.items()
    }


@pytest.mark.parametrize("words", [{}, {"lora_dora": True}, {"lora_rslora": True}])
def test_only_the_first_components_move(task, words):
    small, whole = task(lora_own_rank=1, **words), task(**words)
    start = moved(whole.initial_state())
    assert small.initial_state().keys() == start.keys()
    assert small.evaluate(start) == whole.evaluate(start)  # the same model at the start
    trained, _, _ = small.train(start, np.arange(32), seed=[0])
    for name, array in trained.items():
        first, rest = (slice(0, 1), slice(1, None))
        if ".lora_B." in name:
            first, rest = (slice(None), first), (slice(None), rest)
        elif ".lora_A." not in name:
            assert not np.array_equal(array, start[name]), name
            continue
        assert np.array_equal(array[rest], start[name][rest]), name
        assert not np.any(array[first] == start[name][first]), name
    assert small.evaluate(trained)["loss"] < small.evaluate(start)["loss"]
    # What it computed with while it trained is what is evaluated.
    assert small.evaluate(trained) == whole.evaluate(trained)


def test_a_node_of_the_whole_rank_trains_as_if_it_said_nothing(task):
    start = moved(task().initial_state())
    same, own = (
        task(lora_own_rank=rank).train(start, np.arange(32), seed=[0])[0] for rank in (0, 4)
    )
    assert all(np.array_equal(same[name], own[name]) for name in start)


def test_its_optimizer_holds_its_components_alone(task):
    from client.adapters.components import own_components

    small = task(lora_own_rank=1)
    named = small._place(small.initial_state())
    with own_components(small._load(), named, small.config) as parts:
        assert 4 * sum(p.numel() for p in parts.values()) == sum(p.numel() for p in named.values())


def test_what_has_no_components_is_refused(review_files, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from client.adapters.components import own_components
    from client.head import with_adapters

    shape = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    config = configure(
        model="tiny", train="lora", lora_rank=2, lora_own_rank=1, lora_targets="embed_tokens"
    )
    network = with_adapters(model, config)
    named = {n: p for n, p in network.named_parameters() if "lora_" in n}
    assert named and all(isinstance(p, torch.nn.Parameter) for p in named.values())
    with (
        pytest.raises(ConfigError, match=r"embed_tokens' is no linear module"),
        own_components(network, named, config),
    ):
        pass
