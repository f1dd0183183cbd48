"""What Byzantine clients send: attacks that know everything, and some that know only themselves.

An attack gets the honest clients' deltas of the round and what the Byzantine ones learned
themselves, and returns a delta for each of these. Those of `SEARCHED` try scales and take the
one that moves the rule's result farthest from the honest mean; they know the rule and its state.
``greedy`` tries every direction at more scales, and takes what leaves the model with the largest
loss over all clients' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from simulations.runs.digits import Poison

Deltas = NDArray[np.float32]
# How far the rule's result would be from the honest mean if all Byzantine clients sent this.
Distance = Callable[[NDArray[np.float32]], float]
_SCALES = (0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 10.0)
_MORE_SCALES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0)


@dataclass(frozen=True)
class Known:
    """What attackers know: honest deltas, their own, the round, and how the rule would answer.

    ``loss`` is that of the model after the round, over all clients' rows, if all sent this.
    """

    honest: Deltas
    own: Deltas
    draw: np.random.Generator
    distance: Distance
    loss: Distance


@dataclass(frozen=True)
class Attack:
    """A row: what is sent, on what data its clients train, and what weight they claim.

    ``weight`` is a multiple of the largest that an honest client has.
    """

    about: str
    send: Callable[[Known], Deltas]
    poison: Poison = field(default_factory=Poison)
    weight: float = 1.0


def _times(factor: float) -> Callable[[Known], Deltas]:
    return lambda known: known.own * np.float32(factor)


def _all(delta: NDArray[np.float32], known: Known) -> Deltas:
    return np.repeat(delta[None].astype(np.float32), len(known.own), axis=0)


def _alie(known: Known, scale: float) -> NDArray[np.float32]:
    return known.honest.mean(axis=0) - np.float32(scale) * known.honest.std(axis=0, ddof=1)


def _ipm(known: Known, scale: float) -> NDArray[np.float32]:
    return np.float32(-scale) * known.honest.mean(axis=0)


def _searched(
    direction: Callable[[Known, float], NDArray[np.float32]],
) -> Callable[[Known], Deltas]:
    def send(known: Known) -> Deltas:
        found = [direction(known, scale) for scale in _SCALES]
        return _all(max(found, key=known.distance), known)

    return send


def _mimic(known: Known) -> Deltas:
    # The one that is farthest from the others: what it alone knows is counted several times.
    others = np.linalg.norm(known.honest - known.honest.mean(axis=0), axis=1)
    return _all(known.honest[int(np.argmax(others))], known)


def _greedy(known: Known) -> Deltas:
    learned = known.own.mean(axis=0)
    found = [one for honest in known.honest for one in (honest, -honest)]
    for scale in _MORE_SCALES:
        factor = np.float32(-scale)
        found += [_ipm(known, scale), _alie(known, scale), _alie(known, -scale), factor * learned]
    return _all(max(found, key=known.loss), known)


def _gaussian(known: Known) -> Deltas:
    # As long as ten honest deltas.
    size = 10 * np.linalg.norm(known.honest, axis=1).mean() / np.sqrt(known.honest.shape[1])
    return known.draw.normal(0, size, known.own.shape).astype(np.float32)


ATTACKS: Mapping[str, Attack] = {
    "none": Attack("Byzantine clients that behave", _times(1)),
    "flip": Attack("what was learned, with the sign changed", _times(-1)),
    "flip-10": Attack("ten times that", _times(-10)),
    "alie": Attack("honest mean − 1.5 standard deviations", lambda k: _all(_alie(k, 1.5), k)),
    "alie-best": Attack("the same, at the best of seven scales", _searched(_alie)),
    "ipm": Attack("−0.6·honest mean", lambda k: _all(_ipm(k, 0.6), k)),
    "ipm-best": Attack("the same, at the best of seven scales", _searched(_ipm)),
    "mimic": Attack("all send what the most unusual honest client sends", _mimic),
    "greedy": Attack("what raises the loss most, of 60 such deltas and honest ones", _greedy),
    "gaussian": Attack("noise ten times as long as honest deltas", _gaussian),
    "label-flip": Attack("trained on labels 9 − y", _times(1), Poison(flip=True)),
    "weight": Attack(
        "trained on labels 9 − y, claiming 1e6 times the examples",
        _times(1),
        Poison(flip=True),
        1e6,
    ),
    "backdoor": Attack(
        "trained on stamped rows, five times as long", _times(5), Poison(stamp=True)
    ),
}
SEARCHED = ("alie-best", "ipm-best")
