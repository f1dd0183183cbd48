"""Handwritten digits and a small network in torch, as a user of NVFlare would have them."""

from __future__ import annotations

import numpy as np
import torch

from simulations.runs.digits import load_digits

TEST_ROWS = 719


class Net(torch.nn.Module):
    """One hidden layer: 15,010 parameters; begins as the seed says."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = torch.nn.Linear(64, 200)
            self.out = torch.nn.Linear(200, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits of ten classes."""
        return self.out(torch.relu(self.hidden(pixels)))


def rows_of(seed: int, client: int | None, clients: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels: a client's (labels divided by Dirichlet .5), or the test rows (None).

    Another seed divides anew, test rows too.
    """
    digits = load_digits()
    pixels = np.concatenate([digits.train, digits.test])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    rng = np.random.default_rng([seed, 22])
    order = rng.permutation(len(labels))
    if client is None:
        chosen = order[:TEST_ROWS]
    else:
        order = order[TEST_ROWS:]
        owner = np.empty(len(order), np.int64)
        for label in range(10):
            mine = np.flatnonzero(labels[order] == label)
            owner[mine] = rng.choice(clients, len(mine), p=rng.dirichlet([0.5] * clients))
        chosen = order[owner == client]
    return torch.from_numpy(pixels[chosen]), torch.from_numpy(labels[chosen])
