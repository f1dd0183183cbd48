import json
from pathlib import Path

import numpy as np
import pytest

from client.instructions.template import coded, coded_all, open_tokenizer, prompt_ids
from dare_agg.errors import ConfigError
from tests.chat import BLOCKS, CHATML, as_messages, make_model, make_tokenizer, talk

FILE = Path(__file__).parents[2] / "data" / "instructions" / "trl-1.16-masks.jsonl"
TRL = [json.loads(line) for line in FILE.read_text().splitlines()]
HI = (("user", "hi"), ("assistant", "hello"))
# Without the answers' own end token; with what is said before an answer changed by what follows.
NO_END = CHATML.replace("+ '<|im_end|>' + '\n'", "+ '\n'")
FORGETS = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '(thinking) ' }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NEEDS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('say who I am') }}{% endif %}"
    + CHATML
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML.replace("message['role'] != 'system'", "false")
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


def answers(tokenizer, conversation):
    """The stretches of tokens that count, as text."""
    ids, mask = coded(tokenizer, conversation)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return [tokenizer.decode(ids[lo:hi]) for lo, hi in edges.reshape(-1, 2)]


def test_only_what_the_assistant_says_counts_and_the_ids_are_the_templates():
    tokenizer = make_tokenizer()
    talked = talk(3)
    ids, mask = coded(tokenizer, talked)
    assert ids.dtype == np.int32 and mask.dtype == np.bool_
    whole = tokenizer.apply_chat_template(as_messages(talked))["input_ids"]
    assert ids.tolist() == list(whole)
    assert answers(tokenizer, talked) == ["3 left<|im_end|>", "none none none none left<|im_end|>"]


@pytest.mark.parametrize("number", range(12))
def test_prefixes_give_transformers_own_mask_of_blocks(number):
    """The mask that the template's generation blocks give, read off the text without them."""
    blocks, plain = make_tokenizer(BLOCKS), make_tokenizer(_without_blocks())
    own = blocks.apply_chat_template(
        as_messages(talk(number)), return_dict=True, return_assistant_tokens_mask=True
    )
    for tokenizer in (blocks, plain):
        ids, mask = coded(tokenizer, talk(number))
        assert ids.tolist() == own["input_ids"] and mask.tolist() == own["assistant_masks"]


@pytest.mark.parametrize("case", TRL, ids=lambda case: f"{case['template']}-{case['talk']}")
def test_masks_are_those_of_trl(case):
    """What SFTTrainer of TRL 1.16 trains on: `assistant_only_loss` of generation blocks, and
    `completion_only_loss` of a prompt and its completion, which counts the template's line end
    behind the end token too.
    """
    blocks = case["template"] == "blocks"
    tokenizer = make_tokenizer(BLOCKS if blocks else CHATML)
    ids, mask = coded(tokenizer, talk(case["talk"]) if blocks else talk(case["talk"])[:2])
    theirs = [one == "1" for one in case["mask"]]
    assert ids.tolist() == case["ids"]
    if not blocks:
        assert theirs[-2:] == [True, True] and tokenizer.decode(ids[-1:]) == "\n"
        theirs[-1] = False
    assert mask.tolist() == theirs


def _without_blocks():
    return BLOCKS.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize("template", [BLOCKS, CHATML])
def test_many_are_coded_as_one_and_the_last_question_is_what_generation_is_asked(template):
    tokenizer = make_tokenizer(template)
    talks = [talk(n) for n in range(20)]
    for one, each in zip(talks, coded_all(tokenizer, talks), strict=True):
        ids, mask = coded(tokenizer, one)
        assert np.array_equal(each.ids, ids) and np.array_equal(each.answer_mask, mask)
        assert prompt_ids(tokenizer, one[:-1]) == ids[: each.asked].tolist()


def test_without_an_end_token_the_answer_is_all_that_the_template_adds():
    assert answers(make_tokenizer(NO_END), HI) == ["hello\n"]


def test_a_token_across_the_border_belongs_to_the_answer():
    """The prompt's last space and the answer's own become one token when both are there."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    table = {piece: n for n, piece in enumerate([*"hiqa: ", "::", "</s>"])}
    whole = Tokenizer(models.BPE(table, [(":", ":")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    ids, mask = coded(tokenizer, (("q", "hi"), ("assistant", ":h")))
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["q", ":", "h", "i", "a", "::", "h"]
    assert mask.tolist() == [False] * 5 + [True, True]


@pytest.mark.parametrize(
    ("template", "talked", "message"),
    [
        (NEEDS_SYSTEM, HI, r"needs a system prompt \(say who I am\); set system-prompt"),
        (NO_SYSTEM, (("system", "x"), *HI), r"refuses a system prompt \(no system role\); leave"),
        (ALTERNATES, (HI[0], *HI), "a conversation of user, user, assistant: roles must alternate"),
        (
            FORGETS,
            (*HI, *HI),
            r"writes turn 2 differently once others follow \('\(thinking\) hello<\|",
        ),
    ],
)
def test_what_a_template_refuses_is_said_with_a_remedy(template, talked, message):
    with pytest.raises(ConfigError, match=message):
        coded(make_tokenizer(template), talked)


def test_the_remedies_work():
    assert answers(make_tokenizer(NEEDS_SYSTEM), (("system", "x"), *HI)) == ["hello<|im_end|>"]
    assert answers(make_tokenizer(NO_SYSTEM), HI) == ["hello<|im_end|>"]
    assert answers(make_tokenizer(FORGETS), HI) == ["(thinking) hello<|im_end|>"]


def test_a_tokenizer_without_template_is_refused_and_a_file_in_its_folder_mends_it(tmp_path):
    open_tokenizer.cache_clear()
    folder = make_model(tmp_path / "model", template=None)
    with pytest.raises(ConfigError, match=r"has no chat template.* put chat_template.jinja into"):
        open_tokenizer(str(folder))
    (folder / "chat_template.jinja").write_text(CHATML)
    assert answers(open_tokenizer(str(folder)), HI) == ["hello<|im_end|>"]


def test_a_model_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="the tokenizer of model 'nobody/nothing' cannot be load"):
        open_tokenizer("nobody/nothing")
