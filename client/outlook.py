"""What a run would do to the clients on this machine: rows, labels, tensors, seconds, memory.

`dare-agg run --dry-run` asks this. Nothing is guessed that can be looked at: rows are divided as
the run divides them, and two steps of the real model are taken and timed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from client.config import ConfigValue, TaskConfig
from client.division import Division
from client.models import model_path
from client.rows import Indices
from client.training import FineTuning, build_task
from client.weights import state_parameters
from dare_agg.errors import ConfigError

# A larger model is not loaded for a look.
MOST_BYTES = 8 << 30
_STEPS = 2


def outlook(run: Mapping[str, ConfigValue], found: Mapping[str, Any]) -> dict[str, Any]:
    """What `Division` says in numbers, and a look at the first client's training.

    ``clients`` are rows and rows by label of each; ``states`` the tensors' shapes by what is
    trained; ``step_seconds``, ``row_seconds`` (of evaluation) and ``client_bytes`` (the most
    memory of this process) were measured here, None for a model too large to look at.
    """
    division = Division(run)
    divided = division.parts()
    clients = []
    for config, own, held in divided:
        data = division.data(config)
        labels = np.bincount(data.train.labels[own], minlength=len(data.label_names))
        names = data.label_names
        clients.append(
            {
                "rows": len(own),
                "held_out": len(held),
                "labels": {n: int(c) for n, c in zip(names, labels, strict=False) if n},
            }
        )
    config, own, _ = divided[0]
    task = build_task(config, division.data(config))
    sources = list({one: division.data(one) for one, _, _ in divided}.values())
    tested = sum(len(one.test) for one in sources)
    if config.held_out:
        tested = sum(len(held) for _, _, held in divided)
    told: dict[str, Any] = {
        "clients": clients,
        "test_rows": tested,
        "task": task.kind.name,
        "notes": list(dict.fromkeys(note for one in sources for note in one.notes)),
        "step_seconds": None,
        "row_seconds": None,
        "client_bytes": None,
        "states": {},
    }
    if _weight_bytes(config.model) > MOST_BYTES:
        return told
    network = task._load()
    for train in ("full", "lora", "head"):
        if train == config.train or (train == "head" and train not in task.kind.refusals):
            named = state_parameters(network, replace(config, train=train))
            told["states"][train] = {name: list(p.shape) for name, p in named.items()}
    return told | _measured(task, config, own)


def _measured(task: FineTuning, config: TaskConfig, own: Indices) -> dict[str, Any]:
    """Seconds of a step and of an evaluated row, by a few of each; this process's memory."""
    timed = build_task(
        replace(config, steps=_STEPS, epochs=0, early_stop=0, generate_rows=0), task.data
    )
    timed._model, timed._initial = task._model, task._initial
    state = task.initial_state()
    timed.train(state, own, seed=(config.seed,))  # the first takes longer: caches, threads
    began = time.perf_counter()
    timed.train(state, own, seed=(config.seed, 1))
    step = (time.perf_counter() - began) / _STEPS
    rows = np.arange(min(len(task.test_rows), task.kind.evaluate_rows))
    row = None
    if len(rows):
        began = time.perf_counter()
        timed.evaluate(state, rows)
        row = (time.perf_counter() - began) / len(rows)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "step_seconds": step,
        "row_seconds": row,
        "client_bytes": most * (1 if sys.platform == "darwin" else 1024),
    }


def _weight_bytes(model: str) -> int:
    try:
        folder = Path(model_path(model))
    except ConfigError:
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
