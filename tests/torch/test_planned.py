"""The bytes of an update are known before the model has values."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dare_agg.codec.mask import parse_drop_rate  # noqa: E402
from dare_agg.rounds.client import make_client_update  # noqa: E402
from dare_agg.rounds.plan import make_plans  # noqa: E402
from dare_agg.rounds.terms import UpdateTerms  # noqa: E402
from dare_agg.torch.named import named_tensors  # noqa: E402
from dare_agg.torch.planned import plan_update  # noqa: E402
from dare_agg.vectors.model import global_model  # noqa: E402


def resnet_like():
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 4)
    return torch.nn.Sequential(*layers)


def llama(tie=True):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [resnet_like, llama])
@pytest.mark.parametrize("values", ["b1", "f32", "b4"])
def test_a_model_without_values_has_the_plan_of_one_with_them(make, values):
    with torch.device("meta"):
        empty = make()
    planned = plan_update(empty, drop_rate="0.9", values=values)
    arrays = {n: t.detach().numpy().copy() for n, t in named_tensors(make()).items()}
    version = global_model(arrays, by_form=True)
    assert planned.groups.layout == version.groups.layout
    assert planned.groups.dense_layout == version.groups.dense_layout
    terms = UpdateTerms(drop_rate=parse_drop_rate("0.9"), values=values)
    plan = make_plans(bytes(16), 1, [None], terms, version.ref)[0]
    update = make_client_update(plan, arrays, arrays, by_form=True)
    assert planned.update_bytes == len(update.blob)
    assert planned.dense_bytes == len(update.dense_blob or b"")


def test_eight_billion_parameters_are_planned_in_no_memory():
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    planned = plan_update(model, drop_rate="0.99")
    assert planned.parameters == 8_030_261_248
    assert planned.update_bytes <= 10_600_000
    assert np.isclose(planned.update_bytes / planned.parameters, 1 / 800, rtol=0.05)
