"""Which rows a round trains on, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client.config import TaskConfig
from client.rows import Indices
from dare_agg.errors import ConfigError

# Rows that one round trains on: more would not fit as a list of batches.
MOST_ROWS = 1 << 24


def draw_batches(rows: Indices, config: TaskConfig, seed: Sequence[int]) -> list[Indices]:
    """Cut seeded permutations of a client's rows into batches for one round.

    Raises `ConfigError` for more than `MOST_ROWS` rows.
    """
    rng = np.random.default_rng(np.random.SeedSequence([int(s) for s in seed]))
    wanted = config.steps * config.batch if config.epochs == 0 else config.epochs * len(rows)
    if wanted > MOST_ROWS:
        raise ConfigError(
            f"{wanted} rows to train on in a round, at most {MOST_ROWS}; lower steps or batch"
        )
    order = [rng.permutation(rows) for _ in range(-(-wanted // len(rows)) if len(rows) else 0)]
    drawn = np.concatenate(order)[:wanted] if order else np.empty(0, np.int64)
    return [drawn[lo : lo + config.batch] for lo in range(0, len(drawn), config.batch)]
