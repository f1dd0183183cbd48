"""Machines of different speed on the virtual clock: how long training and transfers take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Bytes of a message to a client and its answer besides what they carry, measured with Flower.
MESSAGE_BYTES = 1600
# Standard deviation of the logarithm of what one training takes beside the machine's own mean.
SPREAD = 0.1


@dataclass(frozen=True)
class Machine:
    """A client's speed: seconds that a training takes it, and bytes a second on its line."""

    client: int
    seed: int
    training: float
    line: float

    def turn_seconds(self, turn: int, down: int, up: int) -> float:
        """Seconds of its ``turn``-th turn: what it is sent, training, and its answer."""
        draw = np.random.default_rng([self.seed, 21, self.client, turn])
        spread = float(np.exp(draw.normal(0, SPREAD)))
        return self.training * spread + (down + up + MESSAGE_BYTES) / self.line


def make_machines(
    clients: int, slow: int, times: float, training: float, kbit_s: float, seed: int
) -> list[Machine]:
    """So many machines, of which ``slow`` (drawn) take ``times`` as long for everything."""
    lame = set(np.random.default_rng([seed, 20]).permutation(clients)[:slow].tolist())
    return [
        Machine(
            client,
            seed,
            training * (times if client in lame else 1),
            125 * kbit_s / (times if client in lame else 1),
        )
        for client in range(clients)
    ]
