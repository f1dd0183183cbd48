"""How mergekit's files name a model: a path or hub name, a revision, an adapter behind a plus."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dare_agg.checkpoint.hub_names import hub_name
from dare_agg.offline.mergekit.words import at_line
from dare_agg.offline.yaml_text import Located


@dataclass(frozen=True)
class ModelName:
    """``path[@revision][+adapter[@revision]]`` as it stands on a line."""

    path: str
    line: int
    adapter: str | None = None

    def __str__(self) -> str:
        return self.path if self.adapter is None else f"{self.path}+{self.adapter}"


def read_name(given: Located) -> ModelName:
    """Read a word, or the mapping that older versions of mergekit write on model cards:
    ``{model: {path, revision}, lora: {path}}``."""
    if isinstance(given.value, str):
        parts = given.value.split("+")
        if len(parts) > 2 or not all(parts):
            raise at_line(given.line, f"{given.value!r} is not MODEL or MODEL+ADAPTER")
        return ModelName(parts[0], given.line, parts[1] if parts[1:] else None)
    if not isinstance(given.value, Mapping):
        raise at_line(given.line, f"{str(given.plain())[:60]!r} names no model")
    if "path" in given.value:
        return ModelName(_path(given), given.line)
    if "model" not in given.value:
        raise at_line(given.line, "a model's mapping is {model: {path: …}}")
    for key, one in given.value.items():
        if key not in ("model", "lora") and one.value is not None:
            raise at_line(one.line, f"{key!r} of a model is not supported; write its path alone")
    adapter = given.value.get("lora")
    if adapter is None or adapter.value is None:
        return ModelName(_path(given.value["model"]), given.line)
    return ModelName(_path(given.value["model"]), given.line, _path(adapter))


def _path(given: Located) -> str:
    if isinstance(given.value, str):
        return given.value
    plain = given.plain()
    if not isinstance(plain, Mapping) or not isinstance(plain.get("path"), str):
        raise at_line(given.line, "a model's mapping is {model: {path: …}}")
    revision = plain.get("revision")
    return f"{plain['path']}@{revision}" if revision else str(plain["path"])


def place(word: str, line: int, folder: Path) -> str:
    """Return where a model lies: an absolute path, or a hub's name as it is.

    A relative path counts from the file's ``folder``, or, as with mergekit, from the current one.
    Raises `ConfigError` for what is in neither and no hub's name, and for what is in both.
    """
    path = Path(os.path.expanduser(word))
    here, there = folder / path, Path.cwd() / path
    if here.exists() and there.exists() and not here.samefile(there):
        raise at_line(
            line,
            f"{word} is in the file's folder ({here}) and in the current one ({there}); give the "
            "one that is meant by its whole path",
        )
    for found in (here, there):
        if found.exists():
            return os.path.abspath(found)
    if hub_name(word) is None:
        raise at_line(
            line,
            f"{word} does not exist, neither beside the file nor in the current folder, and is no "
            "name of a model on the hub (OWNER/NAME)",
        )
    return word


def same(left: str, right: str) -> bool:
    """Whether two places are one."""
    return left == right or os.path.realpath(left) == os.path.realpath(right)
