"""Initialisations that change the base: what PEFT takes out of it before an adapter is added.

PEFT repeats them whenever it loads the adapter. PiSSA (arXiv 2404.02948) takes out the best
approximation of rank r, OLoRA (2406.01775) scaling times the part in the span of the first r
columns, KaSA (2412.06071) the r smallest singular components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import CheckpointError

Taken = Callable[[NDArray[np.float32], int, float], tuple[NDArray[Any], NDArray[Any]]]
# Of these the base is what it was: only where training began is another.
_PLAIN = {"gaussian", "eva", "orthogonal", "mica"}


def taken_out(config: Mapping[str, Any], path: object) -> Taken | None:
    """The function of (weight (out, in), r, scaling) that gives the factors L·R taken out of it.

    None where nothing is. Raises `CheckpointError` for kinds whose part was drawn at random,
    or came from data, and is not in the adapter.
    """
    if config.get("kasa_config"):
        return lambda weight, rank, scaling: _component(weight, rank, smallest=True)
    kind = config.get("init_lora_weights", True)
    if not isinstance(kind, str) or kind.lower() in _PLAIN or kind.lower() in ("true", "false"):
        return None
    if kind == "pissa":
        return lambda weight, rank, scaling: _component(weight, rank, smallest=False)
    if kind.lower() == "olora":
        return _olora
    raise CheckpointError(
        f"{path} has init_lora_weights {kind!r:.40}: training began from a changed base, and what "
        "was changed is not in the adapter. Where the adapter as it was at the start was saved, "
        "load the trained one with peft and convert it: model.save_pretrained(FOLDER, "
        "path_initial_model_for_weight_conversion=START); else give the changed base as BASE, and "
        "set init_lora_weights to true in adapter_config.json"
    )


def _component(
    weight: NDArray[np.float32], rank: int, *, smallest: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """U·(UᵀW) of the r left singular vectors of the largest or smallest singular values, or
    the same from the right, whichever matrix of products is smaller."""
    wide = weight.astype(np.float64)
    if wide.shape[0] > wide.shape[1]:
        right, left = _component(weight.T, rank, smallest=smallest)
        return left.T, right.T
    _, vectors = np.linalg.eigh(wide @ wide.T)
    chosen = vectors[:, :rank] if smallest else vectors[:, -rank:]
    return chosen, chosen.T @ wide


def _olora(
    weight: NDArray[np.float32], rank: int, scaling: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    wide = weight.astype(np.float64)
    chosen, _ = np.linalg.qr(wide[:, :rank])
    return chosen * scaling, chosen.T @ wide
