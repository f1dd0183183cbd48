"""A merge's recipe in a file: YAML, TOML or JSON, ours or mergekit's."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare_agg.checkpoint.hub_names import hub_name
from dare_agg.errors import ConfigError, FormatError
from dare_agg.files.json_text import parse_json, read_bounded
from dare_agg.offline.mergekit.document import is_mergekit
from dare_agg.offline.mergekit.translation import translated
from dare_agg.offline.model_words import base_word, model_words
from dare_agg.offline.recipe import BASES_TOKENIZER
from dare_agg.offline.yaml_text import MOST_BYTES, Located, parse_yaml, parse_yaml_with_lines

# The parser of the standard library takes minutes for long dotted keys.
_MOST_PARTS = 64
_LONG_KEY = re.compile(rf"(?<![\w\"'-])(?:[\w\"'-]++\s*+\.\s*+){{{_MOST_PARTS}}}")


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's plain values, ``out`` among them, and what reading it passed over."""

    values: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe, or a file of mergekit's; relative paths count from its folder.

    Raises `ConfigError` naming the first key or value that is wrong.
    """
    try:
        text = read_bounded(path, MOST_BYTES).decode()
        if path.suffix == ".toml":
            if _LONG_KEY.search(text):
                raise FormatError(f"a dotted key of more than {_MOST_PARTS} parts")
            values = tomllib.loads(text)
            # What JSON could not say within its bounds is no recipe either.
            parse_json(json.dumps(values, default=str))
        else:
            values = parse_json(text) if path.suffix == ".json" else parse_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as a recipe: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping; a recipe has base, models and method")
    if path.suffix != ".toml" and is_mergekit(values):
        found = translated(_with_lines(path, text), path)
        return RecipeFile(found.values, found.notes)
    folder = path.absolute().parent

    def here(value: Any) -> Any:
        return str(folder / value) if isinstance(value, str) else value

    def model(value: Any) -> Any:
        return value if isinstance(value, str) and hub_name(value, folder) else here(value)

    def tokenizer(value: Any) -> Any:
        return value if value == BASES_TOKENIZER else model(value)

    def base(value: Any) -> Any:
        return model(base_word(value, folder) if isinstance(value, str) else value)

    def words(value: Any) -> Any:
        found = model_words(value, folder) if isinstance(value, str) else {"path": value}
        return {key: model(part) for key, part in found.items()}

    def pieces(value: Any) -> Any:
        return [
            {**piece, **{k: model(piece[k]) for k in ("path", "adapter") if k in piece}}
            if isinstance(piece, dict)
            else piece
            for piece in value
        ] if isinstance(value, list) else value  # fmt: skip

    where = {"adapter": model, "statistics": here, "pieces": pieces}
    for key, read in (
        ("base", base), ("base-pieces", pieces), ("out", here), ("tokenizer", tokenizer)
    ):  # fmt: skip
        if key in values:
            values[key] = read(values[key])
    models = values.get("models")
    if isinstance(models, list):
        values["models"] = [
            {
                **{k: where[k](v) if k in where else v for k, v in m.items()},
                **(words(m["path"]) if "path" in m else {}),
            }
            if isinstance(m, dict)
            else words(m)
            for m in models
        ]
    return RecipeFile(values)


def _with_lines(path: Path, text: str) -> Located:
    try:
        return parse_yaml_with_lines(text)
    except FormatError as error:
        raise ConfigError(f"{path}, {error}") from error
