import pytest

from client.instructions.conversations import (
    exchange,
    flaw,
    from_columns,
    from_messages,
    last_exchange,
    with_system,
)
from dare_agg.errors import ConfigError

HI = (("user", "hi"), ("assistant", "hello"))


def test_messages_are_lists_or_json_text():
    listed = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    text = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'
    assert from_messages(listed, "x") == from_messages(text, "x") == HI
    assert from_messages(text.encode("utf-16-le"), "x", "utf-16-le") == HI
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert from_messages([{"role": "user", "content": parts}], "x") == (("user", "hi"),)
    assert from_messages(None, "x") == from_messages("  ", "x") == from_messages([], "x") == ()
    assert from_messages(float("nan"), "x") == ()
    assert from_messages([{"role": "user", "content": None}], "x") == (("user", ""),)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[1", "row 3 is no JSON list of messages"),
        ({"role": "user"}, "row 3 holds an object; a list of messages is needed"),
        (7, "row 3 holds int"),
        (["hi"], "row 3, message 1 is a text"),
        ([{"from": "human", "value": "hi"}], r"message 1 has no role \(it has from, value\)"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "message 1 calls a tool"),
        ([{"role": "user", "content": [{"type": "image"}]}], "parts that are no text"),
        ([{"role": "user", "content": {"a": 1}}], "content holds an object"),
    ],
)
def test_what_holds_no_messages_is_named(cell, message):
    with pytest.raises(ConfigError, match=message):
        from_messages(cell, "row 3")


def test_flaws():
    assert flaw(HI) == ""
    assert flaw(()) == "without a conversation"
    assert flaw((("user", "hi"),)) == "without an answer"
    assert flaw((("assistant", "hello"),)) == "without a question"
    assert flaw((("system", "be"), ("assistant", "hello"))) == "without a question"
    assert flaw((*HI, ("user", "and?"), ("assistant", " \n"))) == "an empty answer"
    assert flaw(from_columns("q", None, "x")) == "an empty answer"
    assert flaw(from_columns(None, "a", "x")) == "without a question"
    assert flaw(from_columns(3, 4.5, "x")) == ""


def test_a_system_prompt_stands_above_and_never_twice():
    below = (("system", "Be brief."), *HI)
    assert with_system(HI, "Be brief.") == below == exchange("hi", "hello", "Be brief.")
    assert with_system(below, "Other.") == below
    assert with_system(HI, "") == HI
    assert with_system(HI, " ")[0] == ("system", "")


def test_the_last_answer_is_asked_for_by_all_before_it():
    longer = (*HI, ("user", "and?"), ("assistant", "bye"), ("user", "ok"))
    assert last_exchange(longer) == (longer[:3], "bye")
    with pytest.raises(ConfigError, match="without an answer"):
        last_exchange((("user", "hi"),))
