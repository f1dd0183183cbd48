"""Whose budget a training of ``dp = "records"`` is charged to, and where it lies.

A party's file is its own, over all runs that it takes part in: ``dp-budget`` of its node config,
else ``privacy/`` below its cache. Simulated clients begin a new one with each run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.config import ConfigValue, TaskConfig
from client.privately import PrivateSteps
from client.weights import State
from dare_agg.errors import ConfigError, PrivacyError
from dare_agg.files.cache import cache_folder
from dare_agg.privacy.record_ledger import open_ledger
from dare_agg.privacy.records import Permit, RecordPrivacy, Sitting, permit, permit_anew

RECORDS = "records"
# Words of a node's config that say what it keeps by itself.
BUDGET, EPSILON, DELTA = "dp-budget", "dp-epsilon", "dp-delta"


def record_privacy(
    run: Mapping[str, ConfigValue], node: Mapping[str, ConfigValue]
) -> RecordPrivacy | None:
    """What this party's rows are promised: by the run, within what the node allows; None: nothing.

    Raises `PrivacyError` where the node keeps a budget and the run promises nothing to its rows.
    """
    own = [word for word in (BUDGET, EPSILON, DELTA) if word in node]
    if run.get("dp") != RECORDS:
        if own:
            raise PrivacyError(
                f"this node keeps a privacy budget of its rows ({own[0]} in its node config), and "
                f"the run's dp is {str(run.get('dp', ''))!r}: nothing is trained; set dp = "
                "records, or leave the word out of the node's config"
            )
        return None
    asked = _number("dp-epsilon", run["dp-epsilon"])
    most = _number("dp-epsilon of this node", node[EPSILON]) if EPSILON in node else 0.0
    weak = run["dp-weak"]
    if most and most < asked:
        asked = most
    return RecordPrivacy(
        epsilon=asked,
        delta=_number("dp-delta", node.get(DELTA, run["dp-delta"])),
        clip=_number("dp-clip", run["dp-clip"]),
        noise=_number("dp-noise", run["dp-noise"]),
        weak=weak is True,
        most=most,
    )


@dataclass(frozen=True)
class Party:
    """Whose rows these are, the file of their budget, and that of its mark."""

    name: str
    budget: Path
    marks: Path


def party_of(node: Mapping[str, ConfigValue], run: str, name: str, versions: Path) -> Party:
    """The party of a node config; ``versions`` is the folder where it keeps the model.

    Raises `ConfigError` for a node without a name of its own and without a file.
    """
    if not name and BUDGET not in node:
        raise ConfigError(
            "dp = 'records' on a node without a name, whose budget could not be found again: set "
            "client-name, or dp-budget (a file), in its node config"
        )
    marks = cache_folder("privacy-marks")
    if BUDGET in node:
        return Party(name, Path(str(node[BUDGET])).expanduser(), marks)
    simulated = "partition-id" in node and "client-name" not in node
    if simulated and Path(run).is_absolute() and Path(run).is_dir():
        # With the run's folder its simulated parties are gone.
        kept = Path(run) / "privacy"
        return Party(name, kept / f"{name}.budget", kept / "marks")
    parts = [run, name] if simulated else [name]
    file = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return Party(name, versions / "privacy" / f"{file}.budget", marks)


def begin_training(
    party: Party,
    privacy: RecordPrivacy,
    config: TaskConfig,
    rows: int,
    run: str,
    rounds_left: int,
    what: Mapping[str, Any],
    state: Mapping[str, np.ndarray],
) -> Permit:
    """Charge a round's training on ``rows`` rows to the party; raises as `permit`."""
    delta = privacy.settled_delta(rows)
    steps = steps_of(config, rows)
    named = {"what": dict(what), "config": asdict(config), "clip": privacy.clip}
    text = json.dumps(named, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    digest.update(state_digest(state))
    ledger = open_ledger(party.budget, party.marks, party.name, delta, bool(privacy.delta))
    sitting = Sitting(run, digest.digest(), rows, config.batch, steps, steps * max(1, rounds_left))
    return permit(ledger, privacy, sitting)


def private_steps(allowed: Permit, config: TaskConfig) -> PrivateSteps:
    """How the training that was charged is done."""
    charge = allowed.charge
    return PrivateSteps(
        charge.steps, config.batch, charge.rate, allowed.privacy.clip, charge.noise, allowed.key
    )


def train_privately(
    train: Callable[[PrivateSteps], State], begin: Callable[[], Permit], config: TaskConfig
) -> tuple[State, dict[str, float]]:
    """Train once charged, and note the result before it is sent; returns it and what is told.

    A training that was sent before and ends otherwise now, since the rows or the machine are
    others, is a further release: it is thrown away, charged, and done again with other draws.
    """
    allowed = begin()
    state = train(private_steps(allowed, config))
    if not allowed.settle(state_digest(state)):
        allowed = permit_anew(allowed)
        state = train(private_steps(allowed, config))
        if not allowed.settle(state_digest(state)):
            raise PrivacyError(
                f"party {allowed.ledger.party!r} trains twice at once and each time otherwise; "
                "nothing is sent: let one process of it train at a time"
            )
    return state, allowed.measured()


def steps_of(config: TaskConfig, rows: int) -> int:
    """Steps of a round: ``steps``, or as many as pass over the rows ``epochs`` times."""
    return math.ceil(config.epochs * rows / config.batch) if config.epochs else config.steps


def state_digest(state: Mapping[str, np.ndarray]) -> bytes:
    """SHA-256 of named arrays."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        digest.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode())
        digest.update(array.data if array.size else b"")
    return digest.digest()


def check_record_words(config: TaskConfig) -> None:
    """Raise `ConfigError` for settings under which rows are not what is promised."""
    refusals: tuple[tuple[object, str], ...] = (
        (config.packing, "packing = true: several conversations share a row; leave it out"),
        (config.early_stop, "early-stop, which looks at losses of rows without noise; leave it "
         "out, steps says how long a round is"),
        (config.precision == "float16", "precision = float16, whose gradients overflow row by "
         "row; set precision = bfloat16 or float32"),
        (config.batch < 1, "batch = 0; rows of a step are needed"),
        (config.epochs == 0 and config.steps < 1, "steps = 0; at least one is needed"),
    )  # fmt: skip
    for bad, why in refusals:
        if bad:
            raise ConfigError(f"dp = {RECORDS!r} with {why}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} = {value!r}; a number is needed")
    return float(value)
