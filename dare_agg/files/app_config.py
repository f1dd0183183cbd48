"""A Flower app's pyproject.toml: where it lies, and the run config's defaults in it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError

Scalar = bool | int | float | str


def is_app(folder: Path) -> bool:
    """Whether a folder holds a Flower app."""
    project = folder / "pyproject.toml"
    return project.is_file() and "[tool.flwr.app]" in project.read_text(encoding="utf-8")


def app_above(path: Path) -> Path | None:
    """The nearest folder above ``path`` that holds a Flower app."""
    return next((folder for folder in path.resolve().parents if is_app(folder)), None)


def find_app(path: Path | None) -> Path:
    """Return the folder of the Flower app: the given one, or this checkout.

    Raises `ConfigError` where there is none.
    """
    folder = path or app_above(Path(__file__)) or Path(__file__).parent
    if not is_app(folder):
        raise ConfigError(
            f"{str(folder)!r} is no Flower app (a pyproject.toml with [tool.flwr.app]); give its "
            "folder, for example: dare-agg run path/to/checkout"
        )
    return folder.resolve()


def app_project(folder: Path) -> dict[str, Any]:
    """What the pyproject.toml of an app says; raises `ConfigError` where it is no TOML."""
    path = folder / "pyproject.toml"
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}; mend that line") from error


def absent_words(folder: Path) -> dict[str, str]:
    """Keys that the app in a folder has not, and why: ``[tool.dare-agg.absent]``."""
    found = app_project(folder).get("tool", {}).get("dare-agg", {}).get("absent", {})
    return {str(key): str(why) for key, why in found.items()}


def app_defaults(folder: Path) -> dict[str, Scalar]:
    """The run config's defaults of the app in a folder; nested keys are joined by dots."""
    return flat(app_project(folder)["tool"]["flwr"]["app"].get("config", {}))


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join the keys of nested tables by dots, as Flower does.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


@cache
def config_defaults(path: Path) -> dict[str, Scalar]:
    """The run config's defaults, by kebab-case key, of the app that ``path`` belongs to.

    They stand nowhere else: Flower needs them in ``[tool.flwr.app.config]``, and ships that
    file with the app. Raises `FileNotFoundError` where there is no app above ``path``.
    """
    folder = app_above(path)
    if folder is None:
        raise FileNotFoundError(f"no pyproject.toml with [tool.flwr.app] above {path}")
    return app_defaults(folder)


def key_groups(folder: Path) -> dict[str, list[str]]:
    """The run config's keys by heading: ``[tool.dare-agg.groups]`` names each one's first key.

    Keys before any heading stand under "Run config". Raises `ConfigError` where a heading names
    a key that the app has not.
    """
    named = app_project(folder).get("tool", {}).get("dare-agg", {}).get("groups", {})
    usual = app_defaults(folder)
    for heading, key in named.items():
        if key not in usual:
            raise ConfigError(f"[tool.dare-agg.groups]: {heading!r} begins with {key!r}, no key")
    starts = {key: heading for heading, key in named.items()}
    groups: dict[str, list[str]] = {}
    heading = "Run config"
    for key in usual:
        heading = starts.get(key, heading)
        groups.setdefault(heading, []).append(key)
    return groups
