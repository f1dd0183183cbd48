"""Arithmetic word problems drawn from a seed: instruction data that any machine can make.

A problem has one step (add, subtract, multiply below ten) or two (add, then subtract). Each split
has templates of its own, so a question of one split never stands in another; numbers, names and
things are shared. All numbers that are added or taken away, and all sums, are below 60.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dare_agg.errors import ConfigError, did_you_mean

# Turns of (role, content).
Conversation = tuple[tuple[str, str], ...]
SPLITS = ("train", "tuning", "test")
NAMES = ("Ana", "Ben", "Chloe", "Dev", "Emma", "Finn", "Grace", "Hugo", "Iris", "Tom")
THINGS = ("pens", "apples", "shells", "cards", "coins", "books", "stamps", "marbles", "stones")
LARGEST = 59  # of terms and sums

# By the kind of expression, by split. Every template names {thing} and {name}.
TEMPLATES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "{a} + {b}": {
        "train": (
            "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
            "{name} picked {a} {thing} in the morning and {b} in the afternoon. "
            "How many {thing} did {name} pick in all?",
            "There are {a} {thing} on the table. {name} puts {b} more there. "
            "How many {thing} are on the table?",
            "{name} found {a} {thing} on Monday and {b} on Friday. How many {thing} is that?",
        ),
        "tuning": (
            "{name} counted {a} {thing} in one box and {b} in another. How many {thing} in all?",
            "{name} keeps {a} {thing} and gets {b} more. How many {thing} does {name} keep?",
        ),
        "test": (
            "A bag holds {a} {thing}. {name} adds {b}. How many {thing} does the bag hold now?",
            "{name} owns {a} {thing} and is given {b} more. How many {thing} does {name} own now?",
        ),
    },
    "{a} - {b}": {
        "train": (
            "{name} has {a} {thing} and gives {b} away. How many {thing} does {name} have left?",
            "There were {a} {thing} in the basket. {name} took {b} out. "
            "How many {thing} are still in the basket?",
            "{name} had {a} {thing} but lost {b} of them. How many {thing} are left?",
            "{name} needs {a} {thing} and has {b} so far. How many {thing} are missing?",
        ),
        "tuning": (
            "Of {a} {thing} {name} sold {b}. How many {thing} remain?",
            "{name} kept {a} {thing} and threw {b} away. How many {thing} does {name} still have?",
        ),
        "test": (
            "{name} put {a} {thing} in a drawer and used {b} of them. How many {thing} are left?",
            "A shelf had {a} {thing}. {name} carried {b} away. How many {thing} remain there?",
        ),
    },
    "{a} * {b}": {
        "train": (
            "{name} buys {a} boxes with {b} {thing} in each. How many {thing} is that?",
            "Each of {a} friends brings {name} {b} {thing}. How many {thing} does {name} get?",
            "{name} collects {b} {thing} a day for {a} days. How many {thing} in all?",
            "There are {a} rows of {b} {thing} each. How many {thing} does {name} count?",
        ),
        "tuning": (
            "{a} shelves hold {b} {thing} each. How many {thing} does {name} see on them?",
            "{name} packs {b} {thing} into each of {a} crates. How many {thing} is that?",
        ),
        "test": (
            "{name} fills {a} bags with {b} {thing} each. How many {thing} are in the bags?",
            "In each of {a} weeks {name} makes {b} {thing}. How many {thing} does {name} make?",
        ),
    },
    "{a} + {b} - {c}": {
        "train": (
            "{name} has {a} {thing}, buys {b} more and gives {c} away. "
            "How many {thing} does {name} have now?",
            "There were {a} {thing} in the basket. {name} put {b} in and took {c} out. "
            "How many {thing} are in the basket?",
            "{name} picked {a} {thing}, then {b} more, but lost {c} of them. "
            "How many {thing} are left?",
            "{name} found {a} {thing} on Monday and {b} on Friday, and sold {c}. "
            "How many {thing} remain?",
        ),
        "tuning": (
            "{name} kept {a} {thing}, got {b} more and threw {c} away. How many {thing} are left?",
            "A box held {a} {thing}. {name} put {b} in and sold {c}. How many {thing} are there?",
        ),
        "test": (
            "{name} owns {a} {thing}, is given {b} more and uses {c} of them. "
            "How many {thing} are left?",
            "A shelf had {a} {thing}. {name} added {b} and carried {c} away. "
            "How many {thing} remain there?",
        ),
    },
}


@dataclass(frozen=True)
class Problem:
    """A question, the expression it asks for and that expression's value as digits."""

    question: str
    expression: str
    answer: str

    @property
    def equation(self) -> str:
        """The expression and its value, without spaces."""
        return f"{self.expression}={self.answer}".replace(" ", "")


def draw_problems(count: int, *, seed: int, split: str) -> list[Problem]:
    """Draw ``count`` problems of a split; more begin with the same ones.

    Kinds take turns in a drawn order, so that each has its share. Raises `ConfigError` for an
    unknown split and a negative count.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is unknown{did_you_mean(split, SPLITS)}")
    if count < 0:
        raise ConfigError(f"{count} problems cannot be drawn; ask for 0 or more")
    rng = np.random.default_rng(np.random.SeedSequence([seed, 60, SPLITS.index(split)]))
    kinds = tuple(TEMPLATES)
    found: list[Problem] = []
    while len(found) < count:
        for kind in rng.permutation(len(kinds)):
            found.append(_draw(kinds[kind], split, rng))
    return found[:count]


def problems(
    count: int, *, seed: int, split: str, system: str | None = None, worked: bool = False
) -> list[Conversation]:
    """Return drawn problems as conversations: question and answer, ``system`` before them if given.

    An empty system text keeps a chat template from putting in its own. A ``worked`` answer is the
    equation ("12+7-4=15"), so every answer teaches what the numbers are and what is done to them.
    """
    start = () if system is None else (("system", system),)
    return [
        (
            *start,
            ("user", problem.question),
            ("assistant", problem.equation if worked else problem.answer),
        )
        for problem in draw_problems(count, seed=seed, split=split)
    ]


def _draw(kind: str, split: str, rng: np.random.Generator) -> Problem:
    numbers, value = _numbers(kind, rng)
    templates = TEMPLATES[kind][split]
    words = {"name": NAMES[rng.integers(len(NAMES))], "thing": THINGS[rng.integers(len(THINGS))]}
    question = templates[rng.integers(len(templates))].format(**numbers, **words)
    return Problem(question, kind.format(**numbers), str(value))


def _numbers(kind: str, rng: np.random.Generator) -> tuple[dict[str, int], int]:
    """Draw an expression's numbers; return them with its value, which is above 0."""

    def between(lo: int, hi: int) -> int:
        return int(rng.integers(lo, hi + 1))

    if kind == "{a} * {b}":
        a, b = between(2, 9), between(2, 9)
        return {"a": a, "b": b}, a * b
    if kind == "{a} - {b}":
        a = between(4, LARGEST)
        b = between(2, a - 1)
        return {"a": a, "b": b}, a - b
    a = between(2, LARGEST - 2)
    b = between(2, LARGEST - a)
    if kind == "{a} + {b}":
        return {"a": a, "b": b}, a + b
    c = between(2, a + b - 1)
    return {"a": a, "b": b, "c": c}, a + b - c
