"""What models answered to test questions, before a run and after it: a file beside its metrics.

The app writes it (``python -m client.answers``), reports show it. It is one object of
``sections``, one a source of data: ``data``, ``questions``, ``wanted``, ``models`` (each ``name``,
``loss``, ``exact-match``, ``answers``, which are ``right``), ``rows`` that the loss is of and
``answered`` questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare_agg.errors import StateError
from dare_agg.files.json_text import read_json

ANSWERS_FILE = "answers.json"
_MOST_CHARACTERS = 600  # of a text that is shown


@dataclass(frozen=True)
class Answers:
    """The answers of several models to the same questions of one source of data.

    ``models`` are (name, perplexity, exact match) of ``rows`` and ``answered`` rows;
    ``lines`` are (question, wanted answer, each model's answer); ``right`` says line by line which
    models' answers are.
    """

    data: str
    models: tuple[tuple[str, float | None, float | None], ...]
    lines: tuple[tuple[str, ...], ...]
    right: tuple[tuple[bool, ...], ...]
    rows: int = 0
    answered: int = 0


def read_answers(folder: Path) -> list[Answers]:
    """The answers that lie in a run's folder; none where there is no such file.

    Raises `StateError` for a file that holds none.
    """
    path = folder / ANSWERS_FILE
    if not path.is_file():
        return []
    try:
        sections = read_json(path)["sections"]
        return [_answers(section) for section in sections]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise StateError(f"{path} holds no answers of models ({error}); remove it") from error


def _answers(section: Mapping[str, Any]) -> Answers:
    models = section["models"]
    texts = [section["questions"], section["wanted"], *(model["answers"] for model in models)]
    marks = _lists([model["right"] for model in models])
    if len({len(column) for column in [*_lists(texts), *marks]}) != 1:
        raise ValueError("as many answers as questions are needed")
    return Answers(
        data=str(section["data"]),
        models=tuple(
            (str(m["name"]), _perplexity(m.get("loss")), _number(m.get("exact-match")))
            for m in models
        ),
        lines=tuple(tuple(map(_text, line)) for line in zip(*texts, strict=True)),
        right=tuple(tuple(one is True for one in line) for line in zip(*marks, strict=True)),
        rows=int(section.get("rows", 0)),
        answered=int(section.get("answered", 0)),
    )


def _lists(texts: Sequence[Any]) -> Sequence[list[Any]]:
    if not all(isinstance(column, list) for column in texts):
        raise TypeError("questions, wanted and answers are lists")
    return texts


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "…"


def _number(value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if fits else None


def _perplexity(loss: Any) -> float | None:
    found = _number(loss)
    return None if found is None else math.exp(min(found, 700.0))
