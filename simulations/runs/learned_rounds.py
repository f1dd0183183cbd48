"""Survivors that learn alone, in rounds: the plan's mask comes before the training, so why not?

A round's masks are known before a client trains. ``dare`` trains everything and drops; ``learned``
lets the survivors of a client's own mask learn alone and sends them as they are, in the same format
and bytes. Masks of clients are disjoint, so that each element is moved by one client at most, and
the merged step is the sum of what they send, by their weights times the number of clients;
``learned, one mask`` gives all the same mask, and the step is the mean. ``rate`` multiplies the
learning rate (and √(1/(1−p)) does, too, where survivors learn alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.partition import partition
from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec
from dare_agg.errors import ConfigError, NonFiniteError, did_you_mean
from dare_agg.vectors.layout import FloatVector, Layout, layout_of
from simulations.runs import digits
from simulations.runs.hard_learning import State, resent, survivors_alone, survivors_of

WAYS = ("fedavg", "dare", "learned", "learned, one mask")
_NOBODY = "0" * 64
# Rounds whose accuracies are averaged at the end.
LAST = 3


def specs_of(way: str, size: int, rate: str, seed: int, number: int, n: int) -> list[UpdateSpec]:
    """What each client's update of a round must be."""
    secret = seed_secret(seed)
    return [
        UpdateSpec(
            size,
            parse_drop_rate(rate),
            "stratified",
            derive_key(secret, "learned mask", number),
            derive_key(secret, "learned values", number, client),
            0 if way == "learned, one mask" else client,
            "b1",
            _NOBODY,
            _NOBODY,
            rescale=way == "dare",
        )
        for client in range(n)
    ]


class _Digits:
    """The digits' clients, trained side by side."""

    def __init__(self, settings: Any, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.state: State = digits.initial_state(seed)
        self.labels, self.groups = digits.load_digits().train_labels, None
        self.layout = layout_of({name: array.shape for name, array in self.state.items()})

    def train(
        self, state: State, parts: Sequence[NDArray[Any]], number: int, specs: Sequence[UpdateSpec]
    ) -> list[State]:
        words, kept = self.settings, None
        rate = words["learning_rate"] * words["rate"]
        if not words["way"].startswith(("fedavg", "dare")):
            masks = [self.layout.unflatten(survivors_of(spec)) for spec in specs]
            kept = {name: np.stack([mask[name] for mask in masks]) for name in state}
            rate /= sqrt(specs[0].drop_rate.keep)
        return list(
            digits.train(
                state, parts, [digits.Poison()] * len(parts), steps=words["steps"],
                batch=words["batch"], rate=rate, seed=(self.seed, number), kept=kept,
            )
        )  # fmt: skip

    def accuracy(self, state: State) -> float:
        return digits.accuracy(state)


class _Task:
    """A real task's clients, one after another; the head learns and travels whole."""

    def __init__(self, settings: Any, seed: int) -> None:
        from simulations.runs.federated import build
        from simulations.runs.single import body_layout

        self.settings, self.seed = settings, seed
        self.task = build({**settings["task"], "steps": settings["steps"]}, seed)
        self.state = self.task.initial_state()
        self.labels, self.groups = self.task.train_rows.labels, self.task.train_rows.groups
        self.layout: Layout = body_layout(self.state)

    def train(
        self, state: State, parts: Sequence[NDArray[Any]], number: int, specs: Sequence[UpdateSpec]
    ) -> list[State]:
        found = []
        for client, (part, spec) in enumerate(zip(parts, specs, strict=True)):
            seed = (self.seed, number, client)
            if self.settings["way"].startswith("learned"):
                with survivors_alone(self.task, state, self.layout, spec, self.settings["rate"]):
                    found.append(self.task.train(state, part, seed=seed)[0])
            else:
                found.append(self.task.train(state, part, seed=seed)[0])
        return found

    def accuracy(self, state: State) -> float:
        return float(self.task.evaluate(state)["accuracy"])


def learner_of(settings: Any, seed: int) -> _Digits | _Task:
    """The clients of a row: of its task, or of the digits."""
    return (_Task if settings["task"] else _Digits)(settings, seed)


def run_row(row: Any) -> dict[str, Any]:
    """Accuracy at the end, and the bytes of one client's update."""
    settings = row.settings
    way, n = settings["way"], settings["clients"]
    if way not in WAYS:
        raise ConfigError(f"way {way!r} is unknown{did_you_mean(way, WAYS)}")
    learner = learner_of(settings, row.seed)
    layout, state = learner.layout, dict(learner.state)
    parts = partition(
        "dirichlet", learner.labels, learner.groups, n, alpha=settings["alpha"], seed=row.seed
    )
    weights = np.array([part.size for part in parts], np.float64)
    weights /= weights.sum()
    nbytes, curve = 4 * layout.size, []
    for number in range(1, settings["rounds"] + 1):
        specs = specs_of(way, layout.size, settings["drop_rate"], row.seed, number, n)
        before = layout.flatten(state)
        step = np.zeros(layout.size)
        heads: dict[str, Any] = {}
        try:
            tuned = learner.train(state, parts, number, specs)
            for weight, spec, one in zip(weights, specs, tuned, strict=True):
                delta: FloatVector = layout.flatten(one) - before
                if way != "fedavg":
                    delta, nbytes = resent(spec, delta)
                step += weight * (n if way == "learned" else 1) * delta
                for name in one:
                    if name not in layout:
                        heads[name] = heads.get(name, 0) + np.float32(weight) * one[name]
        except NonFiniteError:
            break  # what is left of the model is what is measured
        state = {**layout.unflatten((before + step).astype(np.float32)), **heads}
        if number > settings["rounds"] - LAST:
            curve.append(round(learner.accuracy(state), 4))
    while len(curve) < LAST:
        curve.append(round(learner.accuracy(state), 4))
    return {
        "way": way,
        "accuracy": round(float(np.mean(curve)), 4),
        "curve": curve,
        "drop_rate": settings["drop_rate"],
        "rate": settings["rate"],
        "bytes": nbytes,
        "parameters": layout.size,
    }
