"""The run config that a command line means: its words, a file's, or those of a run before."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from dare_agg.cli.run_words import typed
from dare_agg.errors import ConfigError, StateError
from dare_agg.files.app_config import Scalar, flat
from dare_agg.files.json_text import read_json
from dare_agg.runs.rows import STATE_FILE

# Several pairs in one word, as `flwr run --run-config` takes them.
_PAIR = r"[\w.-]+=(?:'[^']*'|\"[^\"]*\"|\S+)"
_PAIRS = re.compile(rf"\s*{_PAIR}(?:\s+{_PAIR})+\s*")


def run_settings(pairs: list[str], *, deployed: bool, resume: Path | None) -> dict[str, Scalar]:
    """Return the run config that differs from the app's: given, resumed, or by default."""
    given = parse_overrides(pairs)
    if resume is not None:
        return {**resumed_config(resume.absolute()), **given, "resume": True}
    if deployed:
        # Over a real network the model travels once, then only small steps.
        given.setdefault("downlink", "full" if given.get("secure-merge") else "auto")
    return given


def resumed_config(folder: Path) -> dict[str, Scalar]:
    """Return the config a run was started with, as its run.json keeps it."""
    try:
        stored = read_json(folder / STATE_FILE)["config"]
    except (OSError, ValueError, KeyError) as error:
        raise StateError(
            f"{folder} holds no run to resume ({type(error).__name__}: {error}); give the folder "
            "that dare-agg run --output named"
        ) from error
    return {
        key: ",".join(value) if isinstance(value, list) else value
        for key, value in stored.items()
        if key not in ("output", "resume")
    }


def parse_overrides(words: Sequence[str]) -> dict[str, Scalar]:
    """Read ``key=value`` words; values are TOML, anything else is text.

    A word may also hold several pairs, or be the name of a TOML file of them. Raises
    `ConfigError`.
    """
    overrides: dict[str, Scalar] = {}
    for word in words:
        if word.endswith(".toml") and "=" not in word:
            overrides |= _read_pairs(Path(word))
            continue
        pairs = re.findall(_PAIR, word) if _is_several(word) else [word]
        for pair in pairs:
            key, separator, value = pair.partition("=")
            if not separator or not key.strip():
                raise ConfigError(
                    f"--config {pair!r}; key=value is needed, for example num-rounds=3, or the "
                    "name of a .toml file"
                )
            overrides[key.strip()] = _value(value)
    return overrides


def _is_several(word: str) -> bool:
    return bool(_PAIRS.fullmatch(word)) and _toml(word.partition("=")[2]) is None


def _value(text: str) -> Scalar:
    found: Scalar | None = _toml(text)
    if found is None:
        # Quotes of TOML around what TOML cannot read, such as "^head\\.": the quotes are meant.
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
        return text[1:-1] if quoted else text
    return found


def as_texts(given: Mapping[str, Any], usual: Mapping[str, Scalar]) -> dict[str, Any]:
    """Words with numbers, dates and truth values as texts where the app's default is a text.

    So nobody has to quote a column that is called 1, or a label true.
    """
    found = {}
    for key, value in given.items():
        plain = isinstance(value, bool | int | float | date | time)
        found[key] = typed(value) if plain and isinstance(usual.get(key), str) else value
    return found


def _toml(text: str) -> Any:
    """The value of a text that is one of TOML, else None."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return None


def _read_pairs(path: Path) -> dict[str, Scalar]:
    try:
        with path.open("rb") as file:
            return flat(tomllib.load(file))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is no TOML: {error}; mend that line") from error


def absolute_paths(settings: dict[str, Scalar]) -> None:
    """Make files and folders named from here absolute: Flower's processes run elsewhere.

    A word that names nothing here (a built-in data set, a hub's name) stays as it is.
    """
    from dare_agg.checkpoint.hub import located

    for key in ("data", "test-data", "model", "initial", "base", "identities", "secure-models"):
        words = str(settings.get(key, "")).split(",")
        found = [
            str(located(Path(word.strip()).absolute()))
            if word.strip() and Path(word.strip()).exists()
            else word
            for word in words
        ]
        if found != words:
            settings[key] = ",".join(found)
