"""A chat template comes with a model and is a program: it must not take a client whole."""

import time

import pytest

from client.instructions import rendering
from client.instructions.rendering import render
from client.instructions.template import coded_all, prompt_ids
from dare_agg.errors import ConfigError
from tests.chat import CHATML, make_tokenizer, talk

pytest.importorskip("transformers")
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BURNING = {
    "loops in loops": LOOPS,
    "a power of a power": "{{ (10 ** (10 ** 9)) > 3 }}",
    "only where a talk is long": "{% if messages|length > 1 %}" + LOOPS + "{% endif %}",
    "inside an answer's block": "{% generation %}" + LOOPS + "{% endgeneration %}",
}
GREEDY = {
    "a long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "a text of 100 GB": "{{ 'a' * 10 ** 11 }}",
    "a text that doubles": "{% set n = namespace(s='aaaa') %}{% for i in range(60) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "a macro of itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "megabytes a row": "{{ 'a' * 10 ** 7 }}",
}


@pytest.fixture
def briefly(monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 1)
    monkeypatch.setattr(rendering, "_PATIENCE", 20)


@pytest.mark.parametrize("template", BURNING.values(), ids=BURNING)
def test_a_template_that_computes_for_ever_is_stopped_and_said(briefly, template):
    tokenizer = make_tokenizer(template + CHATML)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"template was stopped: it computes for more than 1 s"):
        list(coded_all(tokenizer, [talk(0), talk(1)]))
    assert time.monotonic() - begun < 60
    # The next one is not held up by it.
    assert prompt_ids(make_tokenizer(), talk(1)[:1])


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_a_template_that_takes_too_much_is_refused_as_one_that_takes_no_such_turns(template):
    with pytest.raises(ConfigError, match=r"chat template (refuses|was stopped)"):
        list(coded_all(make_tokenizer(template + CHATML), [talk(1)]))
    assert prompt_ids(make_tokenizer(), talk(1)[:1])


def test_the_clock_stops_it_where_computing_is_not_counted(briefly, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 1000)
    monkeypatch.setattr(rendering, "_PATIENCE", 3)
    with pytest.raises(ConfigError, match="was stopped"):
        render(LOOPS, {}, [(talk(1), False)])


def test_a_thousand_rows_take_less_than_the_bound():
    asked = [(talk(number), True) for number in range(1000)]
    tokenizer = make_tokenizer()
    found = render(CHATML, tokenizer.special_tokens_map, asked)
    assert [one.refusal for one in found] == [""] * 1000
    assert found[7].text.endswith("<|im_start|>assistant\n")
