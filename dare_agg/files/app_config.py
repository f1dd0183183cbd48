"""A Flower app's pyproject.toml: where it lies, and the run config's defaults in it."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path

Scalar = bool | int | float | str


def is_app(folder: Path) -> bool:
    """Whether a folder holds a Flower app."""
    project = folder / "pyproject.toml"
    return project.is_file() and "[tool.flwr.app]" in project.read_text(encoding="utf-8")


def app_above(path: Path) -> Path | None:
    """The nearest folder above ``path`` that holds a Flower app."""
    return next((folder for folder in path.resolve().parents if is_app(folder)), None)


@cache
def config_defaults(path: Path) -> dict[str, Scalar]:
    """The run config's defaults, by kebab-case key, of the app that ``path`` belongs to.

    They stand nowhere else: Flower needs them in ``[tool.flwr.app.config]``, and ships that
    file with the app. Raises `FileNotFoundError` where there is no app above ``path``.
    """
    folder = app_above(path)
    if folder is None:
        raise FileNotFoundError(f"no pyproject.toml with [tool.flwr.app] above {path}")
    with (folder / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["tool"]["flwr"]["app"]["config"]
