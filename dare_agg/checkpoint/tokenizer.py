"""A model's tokenizer: its files, chat template, end tokens and added tokens.

Tuning on conversations changes them as it changes weights: who writes a template into the prompt
and waits for ``<|im_end|>`` needs both from the same model. So OUT's come from one folder,
BASE's or a model's, and where a model's are others than BASE's that is said.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_agg.checkpoint.carried import Carried, carry_files, is_tokenizer_file
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import parse_json, read_bounded, read_settings

CONFIG, GENERATION = "config.json", "generation_config.json"
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_MOST_TEMPLATE_BYTES = 4 << 20
# Ids of tokens that configurations repeat; they go with the tokenizer.
_TOKEN_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
# Where a language model's configuration stands in that of a larger one.
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
# Added tokens stand before the vocabulary in tokenizer.json.
_HEAD_BYTES = 4 << 20
_ADDED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]]', re.DOTALL)


@dataclass(frozen=True)
class Tokenizer:
    """What is compared of a folder's tokenizer.

    ``templates`` are its chat templates by name, ``added`` the ids of its added and special tokens,
    ``end`` the text of its end token, ``end_ids`` the ids that end what a model generates.
    """

    templates: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    end: str | None = None
    end_ids: tuple[int, ...] = ()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any file of a tokenizer."""
    return folder.is_dir() and any(is_tokenizer_file(path.name) for path in folder.iterdir())


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read what is compared of a folder's tokenizer; files that cannot be read say nothing."""
    settings = read_settings(folder / "tokenizer_config.json")
    special = read_settings(folder / "special_tokens_map.json")
    return Tokenizer(
        {name: text.strip() for name, text in _templates(folder, settings)},
        _added(folder, settings),
        _content(settings.get("eos_token")) or _content(special.get("eos_token")),
        _end_ids(folder),
    )


def differences(base: Tokenizer, model: Tokenizer) -> list[str]:
    """Say in which of chat template, end token and added tokens a model differs from BASE."""
    found = []
    if model.templates and model.templates != base.templates:
        found.append("chat template" if base.templates else "chat template (BASE has none)")
    if model.end and base.end and model.end != base.end:
        found.append(f"end token ({model.end!r}, BASE {base.end!r})")
    elif model.end_ids and base.end_ids and model.end_ids != base.end_ids:
        found.append(f"end token's ids ({_list(model.end_ids)}, BASE {_list(base.end_ids)})")
    # What a folder lacks altogether (an older tokenizer's list) is no difference.
    others = model.added.keys() - base.added.keys() if base.added else ()
    if others:
        shown = ", ".join(repr(token) for token in sorted(others)[:3])
        found.append(f"{len(others)} added tokens ({shown}{', …' if len(others) > 3 else ''})")
    moved = sorted(t for t, i in model.added.items() if base.added.get(t, i) != i)
    if moved:
        found.append(f"the id of {moved[0]!r}")
    return found


def carry_with_tokenizer(
    base: Path, tokenizer: Path | None, target: Path, *, code: bool = False, skip: tuple[str, ...]
) -> Carried:
    """Carry BASE's files as `carry_files` does, those of the tokenizer from another folder.

    The ids of end, begin and padding tokens in ``config.json`` and ``generation_config.json``
    follow the tokenizer's. Raises `ConfigError` where ``tokenizer`` has none.
    """
    if tokenizer is None or tokenizer == base:
        return carry_files(base, target, code=code, skip=skip)
    if not has_tokenizer(tokenizer):
        raise ConfigError(
            f"{tokenizer} has no tokenizer; give --tokenizer a model's folder that has one, or base"
        )
    own = carry_files(tokenizer, target, code=code, only=is_tokenizer_file)
    rest = carry_files(
        base, target, code=code, skip=skip, only=lambda file: not is_tokenizer_file(file)
    )
    _take_token_ids(tokenizer, target)
    return Carried((*own.files, *rest.files), (*own.left, *rest.left))


def _take_token_ids(source: Path, target: Path) -> None:
    """Give ``target``'s configurations the token ids of ``source``'s."""
    config, generation = read_settings(source / CONFIG), read_settings(source / GENERATION)
    ids = _token_ids(config)
    own = read_settings(target / CONFIG)
    if ids and own:
        for part in (own, *_text_parts(own)):
            part.update({k: v for k, v in ids.items() if k in part or part is own})
        _write(target / CONFIG, own)
    ids |= {key: generation[key] for key in _TOKEN_IDS if key in generation}
    own = read_settings(target / GENERATION)
    if own and ids:
        _write(target / GENERATION, own | ids)
    elif generation and not own:
        carry_files(source, target, only=lambda file: file == GENERATION)


def _token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in (*_text_parts(config), config):
        found |= {key: part[key] for key in _TOKEN_IDS if key in part}
    return found


def _text_parts(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name in _TEXT_PARTS:
        if isinstance(config.get(name), dict):
            yield config[name]


def _end_ids(folder: Path) -> tuple[int, ...]:
    for file in (GENERATION, CONFIG):
        ids = _token_ids(read_settings(folder / file)).get("eos_token_id")
        ids = [ids] if isinstance(ids, int) else ids
        if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
            return tuple(sorted(ids))
    return ()


def _templates(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Chat templates by name, as transformers reads them: files come after the settings."""
    stated = settings.get("chat_template")
    if isinstance(stated, str):
        yield "default", stated
    elif isinstance(stated, list):
        for one in stated:
            if isinstance(one, dict) and isinstance(one.get("template"), str):
                yield str(one.get("name")), one["template"]
    stated = read_settings(folder / _TEMPLATE_FILES[1]).get("chat_template")
    if isinstance(stated, str):
        yield "default", stated
    for file in (folder / _TEMPLATE_FILES[0], *(folder / "additional_chat_templates").glob("*")):
        with contextlib.suppress(OSError, ValueError):
            text = read_bounded(file, _MOST_TEMPLATE_BYTES).decode()
            yield ("default" if file.name == _TEMPLATE_FILES[0] else file.stem), text


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, token in decoder.items():
            if _content(token) and number.isdecimal():
                found[_content(token) or ""] = int(number)
    for token, number in read_settings(folder / "added_tokens.json").items():
        if isinstance(number, int):
            found[token] = number
    for token in _listed(folder / "tokenizer.json"):
        if isinstance(token, dict) and isinstance(token.get("id"), int) and _content(token):
            found[_content(token) or ""] = token["id"]
    return found


def _listed(file: Path) -> list[Any]:
    """The added tokens of a ``tokenizer.json``, of which the vocabulary is not read."""
    with contextlib.suppress(OSError, ValueError), file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        begin = _ADDED.search(head)
        deep = 0
        for mark in _MARKS.finditer(head, begin.end() if begin else len(head)):
            deep += {b"[": 1, b"]": -1}.get(mark[0], 0)
            if not deep and begin:
                tokens = parse_json(head[begin.end() : mark.end()])
                return tokens if isinstance(tokens, list) else []
    return []


def _content(token: Any) -> str | None:
    """A token's text: it is written as such or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _list(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids))
