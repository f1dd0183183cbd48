from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.instructions.lengths import cut
from client.instructions.packing import batch_arrays, check_apart, pack
from client.instructions.template import coded_all
from dare_agg.errors import ConfigError
from tests.chat import make_model, make_tokenizer, talk


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(40, 90))
def test_packing_loses_nothing_and_fits(sizes, room):
    bins = pack(sizes, room)
    assert sorted(place for of in bins for place in of) == list(range(len(sizes)))
    assert all(sum(sizes[place] for place in of) <= room for of in bins)
    # First fit: no bin could have taken the first of a later one.
    for earlier, later in pairwise(bins):
        assert sum(sizes[p] for p in earlier) + sizes[later[0]] > room


def examples(count=7):
    talks = [talk(n) for n in range(count)]
    return [cut(t, c, 96) for t, c in zip(talks, coded_all(make_tokenizer(), talks), strict=True)]


def test_a_packed_batch_holds_the_same_tokens_with_positions_from_nought():
    found = examples()
    plain, packed = batch_arrays(found), batch_arrays(found, 96)
    assert len(packed["input_ids"]) < len(plain["input_ids"]) == len(found)
    assert packed["attention_mask"].sum() == plain["attention_mask"].sum()
    assert packed["answer_mask"].sum() == plain["answer_mask"].sum()
    starts = (packed["position_ids"] == 0) & packed["attention_mask"]
    assert starts.sum() == len(found) and not (packed["answer_mask"] & starts).any()
    assert packed["input_ids"].shape[1] <= 96


def test_none_sees_what_is_packed_before_it(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model")).eval()
    found = examples()
    packed = {k: torch.from_numpy(v) for k, v in batch_arrays(found, 96).items()}
    ids, positions = packed["input_ids"], packed["position_ids"]
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    changed = ids.clone()
    changed[:, 0] = 7  # the first token of each row's first conversation
    other = model(input_ids=changed, position_ids=positions, use_cache=False).logits
    second = (positions == 0).cumsum(1) > 1
    assert second.any() and torch.equal(logits[second], other[second])
    assert not torch.equal(logits[~second], other[~second])
    check_apart(model, "it")


def test_a_model_that_lets_them_see_each_other_is_refused(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, MambaConfig

    folder = make_model(
        tmp_path / "mamba",
        config=lambda **words: MambaConfig(
            hidden_size=16, state_size=4, num_hidden_layers=1, **words
        ),
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.raises(ConfigError, match=r"model 'mamba' .*cannot be packed: leave packing out"):
        check_apart(model, "model 'mamba'")

    class Leaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(20, 20)

        def forward(self, input_ids, position_ids=None, use_cache=False):
            return type("Out", (), {"logits": self.table(input_ids).cumsum(1)})

    with pytest.raises(ConfigError, match="lets a conversation see the one packed before it"):
        check_apart(Leaks(), "it")


def test_first_tokens_are_never_targets():
    """Were the first token an answer's, another conversation would have to predict it."""
    found = [cut(e.conversation, (e.ids, np.ones_like(e.answer_mask), 0), 96) for e in examples(3)]
    packed = batch_arrays(found, 96)
    assert packed["answer_mask"].sum() == sum(e.ids.size - 1 for e in found)
