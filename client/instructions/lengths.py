"""How long conversations are, and what is cut of those that are too long: told before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from client.instructions.conversations import SYSTEM, Conversation
from client.instructions.template import Coded, Ids, Mask
from dare_agg.errors import ConfigError

_SHOWN = 40  # characters of a conversation that a message names it by


@dataclass(frozen=True)
class Example:
    """A conversation as tokens, cut to a length.

    ``asked`` tokens stand before its last answer; ``lost`` tokens were cut off its end, of which
    ``lost_answer`` were answers.
    """

    conversation: Conversation
    ids: Ids
    answer_mask: Mask
    asked: int
    lost: int = 0
    lost_answer: int = 0

    @property
    def teaches(self) -> bool:
        """Whether any token of an answer is left to learn; the first of all follows nothing."""
        return bool(self.answer_mask[1:].any())


def cut(conversation: Conversation, coded: Coded, length: int) -> Example:
    """The first ``length`` tokens of a conversation."""
    ids, mask, asked = coded
    whole = Example(conversation, ids, mask, asked)
    if ids.size <= length:
        return whole
    lost = int(mask[length:].sum())
    return replace(
        whole, ids=ids[:length].copy(), answer_mask=mask[:length].copy(),
        lost=ids.size - length, lost_answer=lost,
    )  # fmt: skip


@dataclass(frozen=True)
class Lengths:
    """Lengths of conversations in tokens, before anything is cut.

    Attributes
    ----------
    rows: how many conversations.
    median, p95, longest: of their lengths.
    answer_tokens: tokens of answers in all of them.
    limit: the length that they are cut to; ``longer`` rows are longer.
    lost, lost_answer: tokens, and tokens of answers, that are cut off.
    silent: rows of which no token of an answer is left; ``first_silent`` is how the first begins.
    """

    rows: int
    median: int
    p95: int
    longest: int
    answer_tokens: int
    limit: int
    longer: int
    lost: int
    lost_answer: int
    silent: int
    first_silent: str = ""

    def line(self, what: str) -> str:
        """In words, one line: ``what`` names the rows."""
        said = (
            f"{what}: {self.rows} rows, tokens median {self.median}, 95 % at most {self.p95}, "
            f"longest {self.longest}; {self.answer_tokens} of answers"
        )
        if not self.longer:
            return f"{said}; none is longer than length {self.limit}"
        told = (
            f"{said}; {self.longer} rows are longer than length {self.limit} and lose their end: "
            f"{self.lost} tokens, {self.lost_answer} of answers"
        )
        if self.silent:
            told += (
                f"; {self.silent} rows have no answer left and are left out (the first begins "
                f"{self.first_silent!r})"
            )
        return f"{told}; length = {self.longest} keeps all"


def lengths(examples: Sequence[Example], limit: int) -> Lengths:
    """The lengths of at least one conversation that was cut to ``limit`` tokens."""
    sizes = np.sort([e.ids.size + e.lost for e in examples])

    def at(share: float) -> int:  # the smallest length that this share of rows does not pass
        return int(sizes[max(0, int(np.ceil(share * sizes.size)) - 1)])

    return Lengths(
        rows=len(examples),
        median=at(0.5),
        p95=at(0.95),
        longest=int(sizes[-1]),
        answer_tokens=sum(int(e.answer_mask.sum()) + e.lost_answer for e in examples),
        limit=limit,
        longer=sum(e.lost > 0 for e in examples),
        lost=sum(e.lost for e in examples),
        lost_answer=sum(e.lost_answer for e in examples),
        silent=sum(not e.teaches for e in examples),
        first_silent=next((_beginning(e.conversation) for e in examples if not e.teaches), ""),
    )


def _beginning(conversation: Conversation) -> str:
    """How a conversation begins for people: its first turn that is no system prompt."""
    said = next((content for role, content in conversation if role != SYSTEM), "")
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}…"


def check_taught(what: str, examples: Sequence[Example], found: Lengths) -> None:
    """Raise `ConfigError` where no row has a token of an answer to learn, and say why."""
    if found.silent < found.rows:
        return
    which = f"all {found.rows} rows are masked entirely (the first begins {found.first_silent!r})"
    if any(e.lost_answer for e in examples):
        shortest = min(e.asked for e in examples)
        raise ConfigError(
            f"{what}: {which}: the question alone fills length {found.limit} (the shortest takes "
            f"{shortest} tokens); set length = {found.longest}, which keeps all"
        )
    raise ConfigError(
        f"{what}: {which}: the model's chat template marks no token of an answer; its generation "
        "blocks must stand around what the assistant says"
    )
