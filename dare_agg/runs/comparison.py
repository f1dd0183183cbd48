"""Several runs side by side: the settings in which they differ, and their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.runs.report.records import RunRecord, read_run, title_of

# They say where a run is, not what it computes.
_ELSEWHERE = frozenset({"output", "resume", "prometheus-port", "prometheus-host", "secure-roster"})
_NOTHING = "–"


@dataclass(frozen=True)
class Comparison:
    """``settings`` are (key, its value in each run), ``names`` the runs' in that order."""

    names: tuple[str, ...]
    settings: tuple[tuple[str, tuple[str, ...]], ...]
    runs: tuple[RunRecord, ...]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read the runs' folders. Raises `ConfigError` for fewer than two or one given twice, and
    `StateError` as `read_run`."""
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} run to compare; give two folders or more")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is given twice; give each folder once")
    names = run_names(folders)
    records: list[RunRecord] = []
    configs: list[Mapping[str, Any]] = []
    for name, folder in zip(names, folders, strict=True):
        found = read_run(folder)
        if not found:
            raise ConfigError(f"{folder} holds no finished round yet; wait for the first one")
        configs.append(found[0].config)
        records += [replace(one, method=_called(name, one.method)) for one in found]
    return Comparison(tuple(names), tuple(differing(configs)), tuple(records))


def _called(name: str, method: str) -> str:
    return f"{name}: {title_of(method)}"


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart.

    >>> run_names([Path("/a/x/run"), Path("/a/y/run")])
    ['x/run', 'y/run']
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Keys whose values are not the same in all runs; a run that has none shows a dash."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [
        (key, tuple(_shown(config.get(key, None)) for config in configs))
        for key in keys
        if key not in _ELSEWHERE
    ]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text or '""'
