"""Segments that wrappers put into tensor names: one model's names in and out of its wrappers."""

from __future__ import annotations

# DDP, torch.compile, activation checkpoints, FSDP, Lightning, Opacus.
WRAPPERS = frozenset(
    ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_fpw_module",
     "_forward_module", "_module")
)  # fmt: skip


def unwrapped(name: str) -> str:
    """A tensor's name without the segments of wrappers.

    >>> unwrapped("module._orig_mod.encoder.weight")
    'encoder.weight'
    """
    parts = name.split(".")
    return name if WRAPPERS.isdisjoint(parts) else ".".join(p for p in parts if p not in WRAPPERS)
