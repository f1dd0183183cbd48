"""What a server knows besides an update: the base, public texts, any text's gradient and loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

State = Mapping[str, NDArray[Any]]
Rows = NDArray[np.int64]


class KnownModel:
    """A task's base, texts and labels; trains as the app does, with fewer steps or rows too."""

    def __init__(self, public: int, **task: Any) -> None:
        from client.config import configure
        from client.training import build_task

        self._config = configure(**task)
        self.task = build_task(self._config)
        self.base = self.task.initial_state()
        self.labels = np.asarray(self.task.train_rows.labels)
        self.public = self.features("test", np.arange(min(public, len(self.task.test_rows))))
        self.mean = self.public.mean(axis=0)
        # What stands in every text, and padding, says nothing of one.
        tokens = self.tokens("train", np.arange(16))
        self.common = sorted(set.intersection(*(set(row) for row in tokens)) | {0})

    def train(self, rows: Rows, seed: Sequence[int], steps: int, base: State) -> Any:
        """Train as the app does; fewer rows than a batch are a batch of their own.

        The app repeats them up to the batch, which gives the same gradient.
        """
        self.task.config = replace(
            self._config, steps=steps, batch=min(self._config.batch, len(rows))
        )
        return self.task.train(base, rows, seed=seed)[0]

    def features(self, split: str, rows: Rows) -> NDArray[np.float32]:
        """Pooled features at the base, shape (rows, width)."""
        import torch

        model, read = self.task.network(self.base, split)
        seen: list[Any] = []
        hook = model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        with torch.inference_mode():
            for lo in range(0, len(rows), 50):
                model(**read(rows[lo : lo + 50]))
        hook.remove()
        return torch.cat(seen).numpy()

    def tokens(self, split: str, rows: Rows) -> list[list[int]]:
        """Tokens of each row, padding left out."""
        _, read = self.task.network(self.base, split)
        batch = read(rows)
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return [ids[mask > 0].tolist() for ids, mask in pairs]

    def losses(self, state: State, rows: Rows) -> NDArray[np.float64]:
        """The loss of each row under a state."""
        import torch

        model, read = self.task.network(state, "train")
        with torch.inference_mode():
            loss = torch.nn.functional.cross_entropy(
                model(**read(rows)), torch.from_numpy(self.labels[rows]), reduction="none"
            )
        return loss.double().numpy()

    def gradients(self, rows: Rows) -> Iterator[dict[str, NDArray[np.float32]]]:
        """The gradient of each row's loss at the base, negated: where it pulls the model."""
        import torch

        model, read = self.task.network(self.base, "train")
        named = {name: p for name, p in model.named_parameters() if name in self.base}
        for parameter in named.values():
            parameter.requires_grad_(True)
        for row in rows:
            at = np.array([row])
            model.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(
                model(**read(at)), torch.from_numpy(self.labels[at])
            )
            (-loss).backward()
            yield {
                name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
                for name, p in named.items()
            }
        model.zero_grad(set_to_none=True)
