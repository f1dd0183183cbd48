"""A small language model of torch alone, for processes that should not import transformers."""

from __future__ import annotations

import torch
from torch import nn


class Small(nn.Module):
    """Tied embeddings over a few layers; sizes do not divide by two everywhere."""

    def __init__(self, words: int, width: int, layers: int, head: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 2 * width + 1), nn.GELU(), nn.Linear(2 * width + 1, width)
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, head or words, bias=bool(head))
        if not head:
            self.score.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of the next token."""
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        scores = self.score(self.norm(hidden))
        return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
