"""What is said of a column that data do not have."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from dare_agg.errors import did_you_mean

# Columns of questions and answers, as data sets of instructions call them.
_PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
)


def no_column(
    what: str, wanted: str, names: Iterable[str], word: str = "", taken: Iterable[str] = ()
) -> str:
    """Say that a column is missing, which there are, and by which ``word`` another is named.

    That other one is none of those ``taken``, where there are more.
    """
    names = list(names)
    known = [f"{name[:40]}…" if len(name) > 40 else name for name in names[:20]]
    said = f"{what} has no column {wanted!r}{did_you_mean(wanted, known)}"
    if not word or not names:
        return said
    left = [name for name in names if name not in taken]
    near = get_close_matches(wanted, left, n=1)
    said += f"{' Name' if said.endswith('?') else '; name'} it: {word}={(near or left or names)[0]}"
    pair = likely_pair(names)
    if pair and word in ("text-column", "label-column"):
        said += f"; as questions and answers: prompt-column={pair[0]}, answer-column={pair[1]}"
    return said


def likely_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """The columns that by their names hold questions and answers, where two do."""
    known = set(names)
    return next((pair for pair in _PAIRS if known.issuperset(pair)), None)
