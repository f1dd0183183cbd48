"""What each party begins with and learns: anyone can compute it again."""

import numpy as np


def base() -> np.ndarray:
    return np.random.default_rng(0).normal(size=20_000).astype(np.float32)


def learned(name: str) -> np.ndarray:
    rng = np.random.default_rng(list(name.encode()))
    return rng.normal(0.002, 0.004, 20_000).astype(np.float32)
