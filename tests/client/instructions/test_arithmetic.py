"""Word problems: right answers, splits apart, the same seed the same bits."""

import ast
import operator
import re
from collections import Counter

import pytest

from client.instructions.arithmetic import (
    LARGEST,
    NAMES,
    SPLITS,
    TEMPLATES,
    THINGS,
    draw_problems,
    problems,
)
from dare_agg.errors import ConfigError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
FIRST = [
    ("Grace buys 9 boxes with 7 cards in each. How many cards is that?", "63"),
    ("Tom had 45 coins but lost 33 of them. How many coins are left?", "12"),
    (
        "There were 3 shells in the basket. Ana put 49 in and took 35 out. "
        "How many shells are in the basket?",
        "17",
    ),
]
# What a question tells to do, read without the table that made it.
LESS = r"\b(gives|took|lost|sold|threw|used|uses|carried|missing)\b"
MORE = r"\b(more|afternoon|Friday|another|adds|added|put \d+ in)\b"
TIMES = r"\b(each|a day|in each)\b"


def value(expression: str) -> int:
    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant)
        return node.value

    return walk(ast.parse(expression, mode="eval").body)


def read(question: str) -> int:
    """Solve a question from its words and numbers alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if re.search(TIMES, question, re.I) and not re.search(MORE + "|" + LESS, question):
        return numbers[0] * numbers[1]
    first, *others = numbers
    if len(others) == 2:
        return first + others[0] - others[1]
    return first - others[0] if re.search(LESS, question) else first + others[0]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right(split: str) -> None:
    for problem in draw_problems(600, seed=3, split=split):
        assert value(problem.expression) == int(problem.answer) == read(problem.question)
        assert int(problem.answer) > 0
        if "*" not in problem.expression:
            assert max(map(int, re.findall(r"\d+", problem.expression))) <= LARGEST
        numbers = sorted(re.findall(r"\d+", problem.question))
        assert numbers == sorted(re.findall(r"\d+", problem.expression))


def test_splits_share_no_template_and_no_question() -> None:
    assert set(TEMPLATES) == {"{a} + {b}", "{a} - {b}", "{a} * {b}", "{a} + {b} - {c}"}
    texts = [t for by_split in TEMPLATES.values() for split in SPLITS for t in by_split[split]]
    assert len(set(texts)) == len(texts)
    found = {
        split: {problem.question for problem in draw_problems(2000, seed=0, split=split)}
        for split in SPLITS
    }
    assert not found["train"] & found["test"]
    assert not found["train"] & found["tuning"]
    assert not found["tuning"] & found["test"]
    # Nor a question that differs in its name, thing and numbers alone.
    bare = {
        split: {re.sub(r"\d+", "#", _masked(q)) for q in questions}
        for split, questions in found.items()
    }
    assert not bare["train"] & bare["test"]
    assert not bare["tuning"] & (bare["train"] | bare["test"])


def _masked(question: str) -> str:
    return re.sub("|".join((*NAMES, *THINGS)), "@", question)


def test_the_seed_decides_and_more_begin_with_the_same() -> None:
    few = draw_problems(30, seed=5, split="train")
    assert draw_problems(90, seed=5, split="train")[:30] == few
    assert draw_problems(30, seed=6, split="train") != few
    first = draw_problems(3, seed=0, split="train")
    assert [(p.question, p.answer) for p in first] == FIRST


def test_kinds_have_equal_shares_and_questions_vary() -> None:
    drawn = draw_problems(400, seed=1, split="train")
    kinds = Counter(re.sub(r"\d+", "", p.expression) for p in drawn)
    assert set(kinds.values()) == {100}
    assert len({p.question for p in drawn}) > 390


def test_conversations_hold_question_and_answer() -> None:
    plain = problems(2, seed=0, split="test")
    drawn = draw_problems(2, seed=0, split="test")
    assert plain == [(("user", p.question), ("assistant", p.answer)) for p in drawn]
    assert problems(1, seed=0, split="test", system="")[0][0] == ("system", "")
    worked = problems(90, seed=0, split="train", worked=True)
    assert worked[0][1] == ("assistant", "9*7=63") and worked[2][1] == ("assistant", "3+49-35=17")
    for conversation, problem in zip(worked, draw_problems(90, seed=0, split="train"), strict=True):
        left, right = conversation[-1][1].split("=")
        assert conversation[0][1] == problem.question
        assert value(left) == int(right) == int(problem.answer)


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        problems(1, seed=0, split="trian")
    with pytest.raises(ConfigError, match="0 or more"):
        problems(-1, seed=0, split="train")
