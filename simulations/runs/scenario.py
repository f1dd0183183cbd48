"""Scenario files: TOML, checked before anything runs, expanded into (cell, seed) rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError, did_you_mean

_FEDERATED: Mapping[str, Any] = {
    "method": "fedavg",
    "drop_rate": "0.9",
    "values": "b1",
    "mask": "stratified",
    "masks": "rotated",
    "merge": "task-arithmetic",
    "merge_options": {},
    "scaling": 1.0,
    "weighting": "examples",
    "server_step": "plain",
    "server_step_numbers": {},
    "dense_values": "f32",
    "feedback": False,
    "downlink": "full",
    "downlink_options": {},
    "rounds": 12,
    "evaluate_every": 2,
    "task": {},
}
_ROUNDS: Mapping[str, Any] = {
    **_FEDERATED,
    "clients": 10,
    "sample": 0,
    "partition": "dirichlet",
    "alpha": 0.5,
    "evaluate_rows": 600,
    "milestones": [],
}
_PRIVATE: Mapping[str, Any] = {
    "way": "central",
    "epsilon": 8.0,
    "clients": 1000,
    "rate": 0.1,
    "drop_rate": "0",
    "values": "f32",
    "clip": 0.5,
    "quantile": 0.5,
    "rounds": 30,
    "alpha": 0.5,
    "steps": 10,
    "batch": 20,
    "learning_rate": 0.1,
}
# Clients of the digits, or of a task.
_LEARNERS: Mapping[str, Any] = {
    "rate": 1.0,
    "rounds": 30,
    "clients": 10,
    "alpha": 0.5,
    "steps": 10,
    "batch": 16,
    "learning_rate": 0.1,
    "task": {},
}
# The kinds of experiment: module of this package that has ``run_row(row) -> dict``, and the
# settings a cell may carry with their defaults.
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "federated": ("simulations.runs.federated", _ROUNDS),
    # A kind of its own, so that its words do not change the keys of rows that are there.
    "federated-robust": (
        "simulations.runs.federated",
        {**_ROUNDS, "method": "dare", "robust": "", "byzantine": 0, "attack": "none"},
    ),
    "single": (
        "simulations.runs.single",
        {"sweeps": [], "drop_rates": [], "task": {}, "wrong_base": {}},
    ),
    "hard": ("simulations.runs.hard", {"ways": [], "bits": [], "task": {}}),
    "learned-rounds": (
        "simulations.runs.learned_rounds",
        {**_LEARNERS, "way": "fedavg", "drop_rate": "0.99"},
    ),
    "secure-rates": (
        "simulations.runs.secure_rates",
        {
            **_LEARNERS,
            "way": "fedavg",
            "method": "mean",
            "drop_rate": "0.99",
            "keep_rates": "uniform",
            "clip": 1.0,
        },
    ),
    "adapters": (
        "simulations.runs.adapters",
        {
            "ways": {"factors": [], "product": []},
            "clients": 6,
            "partition": "column",
            "alpha": 0.5,
            "own_start": False,
            "ranks": [],
            "task": {},
        },
    ),
    "merging": (
        "simulations.runs.merging",
        {
            "tasks": {},
            "sets": [],
            "methods": [],
            "drop_rates": ["0", "0.9"],
            "task": {},
            "test_rows": 200,
            "statistics_examples": 24,
        },
    ),
    "abilities": (
        "simulations.runs.abilities",
        {
            "abilities": {},
            "task": {},
            "sets": [],
            "update": {},
            "methods": [],
            "split": "test",
        },
    ),
    "federated-abilities": (
        "simulations.runs.federated_abilities",
        {**_FEDERATED, "abilities": {}, "each": 1},
    ),
    "private": ("simulations.runs.private", _PRIVATE),
    # A kind of its own, as above.
    "private-apart": ("simulations.runs.private", {**_PRIVATE, "apart": 0}),
    "private-records": (
        "simulations.runs.private_records",
        {
            "data": "reuters-r8",
            "epsilon": 8.0,
            "parties": 4,
            "alpha": 0.5,
            "drop_rate": "0.9",
            "values": "b1",
            "clip": 1.0,
            "rounds": 10,
            "steps": 10,
            "batch": 128,
            "learning_rate": 0.003,
        },
    ),
    "gram-rounds": (
        "simulations.runs.gram_rounds",
        {
            "clients": [],
            "drop_rate": "0.95",
            "values": "b1",
            "directions": [],
            "merge": "task-arithmetic",
            "merge_options": {},
            "scaling": 1.0,
            "rounds": 10,
            "task": {},
            "test_rows": 300,
        },
    ),
    "gram": (
        "simulations.runs.gram",
        {
            "tasks": {},
            "values": "b1",
            "drop_rates": ["0.99"],
            "directions": [],
            "ridge": 0.1,
            "task": {},
            "test_rows": 200,
        },
    ),
    "gram-pictures": (
        "simulations.runs.gram_pictures",
        {
            "views": [],
            "values": "b1",
            "drop_rates": ["0.99"],
            "directions": [],
            "ridge": 0.1,
            "width": 512,
            "steps": 200,
            "test_rows": 500,
        },
    ),
    "robust": (
        "simulations.runs.robust",
        {
            "rule": "mean",
            "attack": "none",
            "n": 10,
            "f": 2,
            "drop_rate": "0.9",
            "values": "f32",
            "rounds": 60,
            "steps": 5,
            "batch": 32,
            "rate": 0.1,
            "alpha": 0.5,
        },
    ),
    "asynchronous": (
        "simulations.runs.asynchronous",
        {
            "way": "rounds",
            "wait": 0,
            "rounds": 60,
            "buffer": 5,
            "staleness": "sqrt",
            "max_staleness": 20,
            "hours": 3.0,
            "evaluate_every": 1,
            "drop_rate": "0.9",
            "values": "b1",
            "downlink": "auto",
            "scaling": 1.0,
            "server_step": "plain",
            "clients": 10,
            "slow": 3,
            "times": 10.0,
            "train_seconds": 60.0,
            "link_kbit_s": 300.0,
            "alpha": 0.5,
            "hidden": 200,
            "steps": 20,
            "batch": 32,
            "learning_rate": 0.1,
        },
    ),
    "many-clients": (
        "simulations.runs.many_clients",
        {
            "clients": 10000,
            "hours": 24,
            "stay": 1.0,
            "away": 6.0,
            "at_once": 100,
            "minutes": 8.0,
            "buffer": 50,
            "staleness": "sqrt",
            "max_staleness": 20,
            "drop_rate": "0.9",
            "scaling": 1.0,
            "weighting": "examples",
            "weight_bound": 100.0,
            "robust": "",
            "byzantine": 0,
            "keep_bytes": 16384,
            "alpha": 0.5,
            "steps": 10,
            "batch": 10,
            "learning_rate": 0.1,
            "liars": 0.0,
            "lie": 1e6,
            "flip": False,
        },
    ),
    "robust-groups": (
        "simulations.runs.robust",
        {
            "rule": "norm-bound+nnm+trimmed-mean",
            "attack": "none",
            "n": 20,
            "f": 2,
            "groups": 6,
            "division": "fixed",
            "drop_rate": "0.9",
            "values": "f32",
            "rounds": 60,
            "steps": 5,
            "batch": 32,
            "rate": 0.2,
            "alpha": 0.5,
        },
    ),
}
SCENARIOS = Path(__file__).parents[1] / "scenarios"
TOP_LEVEL = ("name", "kind", "title", "seeds", "defaults", "cells", "grids")


@dataclass(frozen=True)
class Row:
    """One run to be made: a cell of the scenario with a seed."""

    scenario: str
    kind: str
    cell: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Names the run by everything that decides its result."""
        text = json.dumps([self.kind, self.seed, dict(self.settings)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Scenario:
    """A checked scenario: by cell name its full settings, and its own seeds where it has any."""

    name: str
    kind: str
    title: str
    seeds: tuple[int, ...]
    cells: Mapping[str, Mapping[str, Any]]
    own_seeds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Yield the runs, every cell of the first seed before the second seed."""
        for seed in self.seeds:
            for cell, settings in self.cells.items():
                if seed in self.own_seeds.get(cell, self.seeds):
                    yield Row(self.name, self.kind, cell, seed, settings)


def read_scenario(path: Path, task: Mapping[str, Any] | None = None) -> Scenario:
    """Read a scenario file; ``task`` replaces settings of every cell's task.

    Raises `ConfigError` naming the wrong key and the nearest right one.
    """
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"scenario {str(path)!r} does not exist; check the path") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"scenario {str(path)!r} is not TOML: {error}") from error
    _check_keys(raw, TOP_LEVEL, f"scenario {path.name}")
    kind = raw.get("kind", "federated")
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is unknown{did_you_mean(str(kind), KINDS)}")
    known = KINDS[kind][1]
    defaults = raw.get("defaults", {})
    _check_keys(defaults, known, f"[defaults] of {path.name}")
    cells: dict[str, dict[str, Any]] = {}
    own_seeds: dict[str, tuple[int, ...]] = {}
    for cell in [*raw.get("cells", []), *_crossed(raw.get("grids", []), path.name)]:
        own = {key: value for key, value in cell.items() if key not in ("name", "seeds")}
        if "name" not in cell or cell["name"] in cells:
            raise ConfigError(f"{path.name}: every [[cells]] needs a name of its own")
        _check_keys(own, known, f"cell {cell['name']!r}")
        settings = {**known, **defaults, **own}
        if isinstance(known.get("task"), dict):
            settings["task"] = {**defaults.get("task", {}), **own.get("task", {}), **(task or {})}
        cells[cell["name"]] = settings
        if "seeds" in cell:
            own_seeds[cell["name"]] = tuple(cell["seeds"])
    seeds = tuple(raw.get("seeds", (0,)))
    if not cells or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ConfigError(f"{path.name} needs at least one cell and seeds that are whole numbers")
    for cell, chosen in own_seeds.items():
        if not chosen or not set(chosen) <= set(seeds):
            raise ConfigError(
                f"{path.name}: cell {cell!r} has seeds {list(chosen)}; choose from {list(seeds)}"
            )
    return Scenario(raw.get("name", path.stem), kind, raw.get("title", ""), seeds, cells, own_seeds)


def _crossed(grids: list[dict[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """The cells of ``[[grids]]``: every combination of the lists of a grid's ``cross``.

    A cell is named by the grid's ``name``, in which {key} stands for a setting. One that an earlier
    grid has named is left out.
    """
    met: set[str] = set()
    for grid in grids:
        _check_keys(grid, ("name", "cross", "settings", "seeds"), f"[[grids]] of {where}")
        cross = grid.get("cross", {})
        for values in itertools.product(*cross.values()):
            settings = {**grid.get("settings", {}), **dict(zip(cross, values, strict=True))}
            name = str(grid.get("name", "")).format_map(settings)
            if name not in met:
                met.add(name)
                seeds = {"seeds": grid["seeds"]} if "seeds" in grid else {}
                yield {"name": name, **settings, **seeds}


def _check_keys(found: Mapping[str, Any], known: Any, where: str) -> None:
    for key in found:
        if key not in known:
            raise ConfigError(f"{where}: key {key!r} is unknown{did_you_mean(key, known)}")
