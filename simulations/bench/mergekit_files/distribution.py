"""Whether two ways to draw at random draw from the same distribution, as far as seeds tell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dare_agg.checkpoint import open_checkpoint


@dataclass
class Draws:
    """Sums over the OUTs of many seeds, by element, and shares by tensor."""

    count: int = 0
    first: np.ndarray | None = None
    second: np.ndarray | None = None
    kept: list[np.ndarray] = field(default_factory=list)
    energy: list[np.ndarray] = field(default_factory=list)

    def add(self, out: Path, base: Path) -> None:
        """Count one OUT: its change to the base, the share that changed, its mean square."""
        model, ground = open_checkpoint(out), open_checkpoint(base)
        names = sorted(ground.names)
        changes = [
            model.array(n).astype(np.float64).ravel() - ground.array(n).ravel() for n in names
        ]
        flat = np.concatenate(changes)
        self.count += 1
        self.first = flat if self.first is None else self.first + flat
        self.second = flat**2 if self.second is None else self.second + flat**2
        self.kept.append(np.array([np.count_nonzero(c) / c.size for c in changes]))
        self.energy.append(np.array([(c**2).mean() for c in changes]))

    def mean_and_error(self) -> tuple[np.ndarray, np.ndarray]:
        """Each element's mean, and the variance of that mean."""
        assert self.first is not None and self.second is not None
        mean = self.first / self.count
        return mean, (self.second / self.count - mean**2) / (self.count - 1)


def deviations(ours: Draws, theirs: Draws) -> dict[str, float]:
    """Standard scores: of the elements' means the root mean square (1 where the distributions are
    the same), of the tensors' kept shares and mean squares the largest."""
    (a, va), (b, vb) = ours.mean_and_error(), theirs.mean_and_error()
    spread = va + vb > 0
    scores = (a - b)[spread] / np.sqrt((va + vb)[spread])
    return {
        "mean": float(np.sqrt((scores**2).mean())),
        "kept": _largest(ours.kept, theirs.kept),
        "square": _largest(ours.energy, theirs.energy),
    }


def _largest(ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> float:
    a, b = np.stack(list(ours)), np.stack(list(theirs))
    error = np.sqrt(a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b))
    gap = np.abs(a.mean(axis=0) - b.mean(axis=0))
    # What never varies must be equal.
    return float(np.where(error > 0, gap / np.maximum(error, 1e-300), 1e6 * (gap > 1e-12)).max())
