"""Rows of single tokens, trained beside LoRA (PEFT's trainable tokens)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from dare_agg.errors import CheckpointError
from dare_agg.offline.adapters.forms import Replaced, Rows, Step
from dare_agg.offline.adapters.parts import REPLACE, Contribution, Module

TOKENS = "trainable_tokens_delta"


def token_rows(module: Module) -> Iterator[Contribution]:
    """Rows that take the place of the base's. Raises `CheckpointError` where they do not fit."""
    _, tensor, shape = module.place([f"{module.name}.weight"])
    indices, rows = _indices(module), module.shape(TOKENS)
    if len(shape) != 2 or rows != (len(indices), shape[1]):
        raise module.unfit(f"{len(indices)} tokens of shape {rows}, the base's are {shape}")
    if indices and not 0 <= min(indices) <= max(indices) < shape[0]:
        raise CheckpointError(
            f"{module.folder.path}: token {max(indices)} of {module.name!r} is beyond the base's "
            f"{shape[0]} rows; give the base with the tokens that were added for the training"
        )
    yield Contribution(tensor, REPLACE, partial(_replaced, module, indices), adds=False)


def _indices(module: Module) -> list[int]:
    given: Any = module.config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        leaf = module.name.rpartition(".")[2]
        given = next((v for k, v in given.items() if k in (module.name, leaf)), None)
    found = given if isinstance(given, list) else []
    if not found or not all(type(i) is int for i in found) or len(set(found)) != len(found):
        raise CheckpointError(
            f"{module.folder.path}: trainable_token_indices names no tokens of {module.name!r}; "
            "save the adapter again"
        )
    return found


def _replaced(
    module: Module, indices: list[int], base: Rows, before: Sequence[Step]
) -> Sequence[Step]:
    order = np.argsort(np.array(indices))
    return [Replaced(np.array(indices, np.int64)[order], module.load(TOKENS)[order])]
