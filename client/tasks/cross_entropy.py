"""Loss and metrics of tasks whose targets are classes."""

from __future__ import annotations

from typing import Any

IGNORED = -100  # a target that does not count


def class_loss(scores: Any, targets: Any) -> Any:
    """Mean cross entropy of logits (n, classes) and the classes (n,)."""
    import torch

    return torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED)


def counted_targets(targets: Any) -> int:
    """How many targets count."""
    return int((targets != IGNORED).sum())


def class_sums(scores: Any, targets: Any) -> tuple[int, dict[str, float]]:
    """How many targets count; their summed cross entropy, and how many are scored highest."""
    import torch

    loss = torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
    right = int((scores.argmax(dim=1) == targets).sum())
    return counted_targets(targets), {"loss": float(loss), "accuracy": right}
