"""A folder's tokens by id, as its tokenizer files have them, and files with tokens added.

Only files that hold tokens as text are read: ``tokenizer.json``, ``vocab.json``, ``vocab.txt``,
``added_tokens.json``, ``tokenizer_config.json``. No code of a tokenizer is run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_agg.checkpoint.tokenizer import CONFIG
from dare_agg.errors import CheckpointError, FormatError
from dare_agg.files.json_text import parse_json, read_bounded

TOKENIZER, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
# The largest published ones have 33 MB and half a million merges.
_MOST_BYTES, _MOST_COST = 96 << 20, 1 << 23
_MOST_ID = 1 << 24
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Token:
    """One token; ``flags`` where it is an added one (as in ``tokenizer.json``)."""

    text: str
    flags: Mapping[str, bool] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens: ``ids`` by text, and the flags of those that were added."""

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    def tokens(self) -> Iterable[Token]:
        """All tokens, the vocabulary's before added ones, each by id."""
        for added in (False, True):
            for text in sorted(self.ids, key=lambda t: (self.ids[t], t)):
                if (text in self.added) == added:
                    yield Token(text, self.added.get(text))

    def with_tokens(self, tokens: Iterable[Token]) -> Vocabulary:
        """Return this with the given tokens behind it."""
        ids, added = dict(self.ids), dict(self.added)
        at = self.size
        for token in tokens:
            ids[token.text], added[token.text] = at, token.flags or {}
            at += 1
        return Vocabulary(ids, added)


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Return a folder's tokens; None where none of its files has them as text.

    Raises `CheckpointError` for a file that cannot be read.
    """
    try:
        return _read(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read: {error.strerror or error}; fix its files"
        ) from error
    except FormatError as error:
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be read: {str(error)[:200]}; save it again with "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…)"
        ) from error


def has_vocabulary(folder: Path | None) -> bool:
    """Whether a folder has a file that `read_vocabulary` takes tokens from."""
    files = (TOKENIZER, "vocab.json", "vocab.txt")
    return folder is not None and any((folder / file).is_file() for file in files)


def _read(folder: Path) -> Vocabulary | None:
    ids: dict[str, int] = {}
    added: dict[str, dict[str, bool]] = {}
    if (folder / TOKENIZER).is_file():
        whole = _json(folder / TOKENIZER)
        ids |= _of_model(_part(whole, "model").get("vocab"))
        for token in whole.get("added_tokens") or []:
            if isinstance(token, dict):
                _put(ids, token.get("content"), token.get("id"))
                added[token["content"]] = _flags(token)
    elif (folder / "vocab.json").is_file():
        ids |= _of_model(_json(folder / "vocab.json"))
    elif (folder / "vocab.txt").is_file():
        text = _decoded(read_bounded(folder / "vocab.txt", _MOST_BYTES))
        for number, line in enumerate(text.removesuffix("\n").split("\n")):
            _put(ids, line.removesuffix("\r"), number)
    else:
        return None
    if (folder / ADDED).is_file():
        for text, number in _json(folder / ADDED).items():
            if text not in ids:
                _put(ids, text, number)
                added.setdefault(text, {})
    if (folder / SETTINGS).is_file():
        decoder = _part(_json(folder / SETTINGS), "added_tokens_decoder")
        for key, token in decoder.items():
            if isinstance(token, dict) and key.isdecimal() and token.get("content") not in ids:
                _put(ids, token.get("content"), int(key[:12]))
                added[token["content"]] = _flags(token)
    return Vocabulary(ids, added)


def _of_model(vocab: Any) -> dict[str, int]:
    """Tokens of BPE, WordPiece and word-level models, or of Unigram ones: [[token, score], …]."""
    ids: dict[str, int] = {}
    if isinstance(vocab, dict):
        for token, number in vocab.items():
            _put(ids, token, number)
    elif isinstance(vocab, list):
        for number, pair in enumerate(vocab):
            _put(ids, pair[0] if isinstance(pair, list) and pair else None, number)
    else:
        raise FormatError("it has no vocabulary")
    return ids


def _put(ids: dict[str, int], token: Any, number: Any) -> None:
    if not isinstance(token, str) or type(number) is not int or not 0 <= number < _MOST_ID:
        raise FormatError(f"token {token!r:.40} has id {number!r:.40}; a number from 0 is needed")
    ids[token] = number


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: token[flag] for flag in _FLAGS if isinstance(token.get(flag), bool)}


def add_tokens(folder: Path, tokens: Mapping[int, Token]) -> None:
    """Add tokens, under new ids, to the tokenizer files that a folder has.

    They become added tokens, as transformers' ``add_tokens`` makes them.
    """
    entries = {number: _entry(token) for number, token in sorted(tokens.items())}
    file = folder / TOKENIZER
    if file.is_file():
        whole = _json(file)
        known = whole.get("added_tokens")
        whole["added_tokens"] = [
            *(known if isinstance(known, list) else []),
            *({"id": number, **entry} for number, entry in entries.items()),
        ]
        _write(file, whole)
    file = folder / SETTINGS
    settings = _json(file) if file.is_file() else {}
    if isinstance(settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] |= {str(n): e for n, e in entries.items()}
        _write(file, settings)
    file = folder / ADDED
    if file.is_file() or not (folder / TOKENIZER).is_file():
        known = _json(file) if file.is_file() else {}
        _write(file, known | {entry["content"]: number for number, entry in entries.items()})


def _entry(token: Token) -> dict[str, Any]:
    return {
        "content": token.text, **dict.fromkeys(_FLAGS, False), "normalized": True,
        **(token.flags or {}),
    }  # fmt: skip


def state_vocabulary(folder: Path, before: int, rows: int) -> None:
    """Make ``config.json`` say ``rows`` where it says that the vocabulary has ``before``."""
    file = folder / CONFIG
    with contextlib.suppress(OSError, FormatError):
        config = _json(file)
        if not _state(config, before, rows):
            config["vocab_size"] = rows
        _write(file, config)


def _state(config: dict[str, Any], before: int, rows: int) -> bool:
    found = False
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _state(value, before, rows)
        elif key == "vocab_size" and value in (before, rows):
            config[key], found = rows, True
    return found


def _json(file: Path) -> dict[str, Any]:
    value = parse_json(read_bounded(file, _MOST_BYTES), most=_MOST_BYTES, cost=_MOST_COST)
    if not isinstance(value, dict):
        raise FormatError(f"{file.name} holds no object")
    return value


def _part(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    part = values.get(key)
    return part if isinstance(part, dict) else {}


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("vocab.txt is no UTF-8") from error


def _write(file: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
