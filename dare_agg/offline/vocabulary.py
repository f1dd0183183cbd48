"""``--vocabulary``: which tokens OUT has where models have added some, and their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dare_agg.checkpoint import Checkpoint
from dare_agg.checkpoint.vocabulary import (
    Token,
    Vocabulary,
    add_tokens,
    read_vocabulary,
    state_vocabulary,
)
from dare_agg.checkpoint.writer import folder_beside
from dare_agg.errors import ConfigError
from dare_agg.offline.rows import BASE, Member, Rows, aligned, vocabulary_rows

UPDATE = ".dare"
_SHOWN = 3


@dataclass(frozen=True)
class Alignment:
    """OUT's vocabulary: that of one folder, with ``union`` the models' further tokens behind it.

    ``origin`` is the folder's number among the models, `BASE` or another; ``place`` is a folder
    for aligned tensors.
    """

    word: str
    origin: int
    place: Path

    def align(
        self, base: Checkpoint, models: Mapping[int, Checkpoint]
    ) -> tuple[Checkpoint, dict[int, Checkpoint], Target]:
        """Return base and models with a row for each of OUT's tokens, and what OUT's tokens are.

        Raises `ConfigError` for a model whose tokens nobody knows.
        """
        members = {BASE: base, **models}
        if self.origin not in members:
            raise ConfigError(
                "--vocabulary takes the tokens of a model with weights; with it, give --tokenizer "
                "base or such a MODEL"
            )
        known = {number: _vocabulary(one, base) for number, one in members.items()}
        origin, warnings = known[self.origin], []
        rows = {number: vocabulary_rows(one) for number, one in members.items()}
        more: dict[str, Token] = {}
        for number, one in members.items():
            new = [
                token
                for token in known[number].tokens()
                if token.text not in origin.ids and known[number].ids[token.text] < rows[number]
            ]
            if self.word == "union":
                more |= {token.text: token for token in new if token.text not in more}
            elif new:
                shown = ", ".join(repr(token.text) for token in new[:_SHOWN])
                warnings.append(
                    f"{one.path} has {len(new)} tokens that OUT does not get ({shown}"
                    f"{', …' if len(new) > _SHOWN else ''}); --vocabulary union keeps them"
                )
        whole = origin.with_tokens(more.values())
        size = max(rows[self.origin], whole.size)
        if more and len(set(origin.ids.values())) != origin.size:
            raise ConfigError(
                f"{members[self.origin].path}: its tokenizer has no token at some ids, where "
                "others would be put; give --vocabulary base"
            )
        target = Target(whole, {whole.ids[text]: token for text, token in more.items()}, size,
                        rows[BASE], tuple(warnings))  # fmt: skip
        aligning = {
            number: Member(
                one, _rows_of(whole, size, known[number], rows[number], number == self.origin)
            )
            for number, one in members.items()
        }
        if all(member.same for member in aligning.values()):
            return base, dict(models), target
        first = aligning.pop(BASE)
        return *aligned(first, aligning, self.place), target

    def check_others(self, models: Sequence[Path]) -> None:
        """Refuse models that are made for BASE's own rows, where OUT's are others."""
        for model in models:
            if model.suffix == UPDATE:
                raise ConfigError(
                    f"{model} was made for the rows that BASE has, OUT has others; make a model of "
                    f"it first: dare-agg apply BASE {model} -o MODEL"
                )
            if self.origin != BASE:
                raise ConfigError(
                    f"{model} was trained on BASE's tokens, OUT has those of a MODEL; make a model "
                    f"of it first: dare-agg merge BASE {model} -o MODEL, or give --tokenizer base"
                )


@dataclass(frozen=True)
class Target:
    """OUT's tokens, those that were added to its folder's tokenizer by id, its number of rows."""

    vocabulary: Vocabulary
    added: Mapping[int, Token]
    rows: int
    before: int
    warnings: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Complete OUT's tokenizer files and ``config.json``."""
        if self.added:
            add_tokens(folder, self.added)
        if self.rows != self.before:
            state_vocabulary(folder, self.before, self.rows)


@contextmanager
def alignment(
    word: str | None, tokenizer: str | None, models: Mapping[Path, int], out: Path
) -> Iterator[Alignment | None]:
    """Give what ``--vocabulary`` asks for, with a folder beside ``out`` that goes at the end.

    ``models`` are the models' numbers by their paths as given. Raises `ConfigError` where ``out``
    is a file, `CheckpointError` where nothing can be written beside it.
    """
    if word is None:
        yield None
        return
    if out.suffix == ".safetensors":
        raise ConfigError(
            f"--vocabulary {word}: {out} is a file without a tokenizer; name a folder"
        )
    origin = BASE
    if tokenizer not in (None, "base"):
        origin = models.get(Path(str(tokenizer)), len(models))
    with folder_beside(out, "rows") as folder:
        yield Alignment(word, origin, folder)


def _vocabulary(model: Checkpoint, base: Checkpoint) -> Vocabulary:
    """A model's tokens; BASE's where it has no tokenizer and as many rows."""
    folder = model.folder
    found = read_vocabulary(folder) if folder is not None else None
    if found is None and model is not base and vocabulary_rows(model) == vocabulary_rows(base):
        return _vocabulary(base, base)
    if found is None:
        raise ConfigError(
            f"{model.path} has no tokenizer.json, vocab.json or vocab.txt, so that its rows' "
            "tokens are not known; save its tokenizer there: "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        )
    return found


def _rows_of(whole: Vocabulary, size: int, own: Vocabulary, rows: int, origin: bool) -> Rows:
    """Which row each of OUT's tokens has in a model; rows of no token are the origin's own."""
    found = np.full(size, -1, np.int64)
    for text, number in whole.ids.items():
        here = own.ids.get(text, -1)
        if here < rows:
            found[number] = here
    if origin:
        nobody = np.ones(size, bool)
        nobody[list(whole.ids.values())] = False
        nobody[rows:] = False
        found[nobody] = np.flatnonzero(nobody)
    return found
