"""Several conversations in one row of a batch, kept apart by their positions.

Positions begin anew with each conversation, and transformers makes of that an attention in which
none sees another. So a packed batch has the loss and the gradient of the unpacked one; it only
has fewer places that hold nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.instructions.lengths import Example
from dare_agg.errors import ConfigError

# Logits of a conversation behind another may differ from its own by rounding alone.
_ROUNDING = 1e-4

Arrays = Mapping[str, NDArray[Any]]


def pack(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Divide things of these sizes among bins of ``room``, each the longest first that fits.

    First-fit decreasing, equal sizes in their order; a thing larger than the room gets a bin of
    its own. Bins list places in ``sizes``.
    """
    bins: list[list[int]] = []
    left: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda p: -sizes[p]):
        size = sizes[place]
        target = next((b for b, free in enumerate(left) if free >= size), None)
        if target is None:
            bins.append([place])
            left.append(room - size)
        else:
            bins[target].append(place)
            left[target] -= size
    return bins


def batch_arrays(examples: Sequence[Example], room: int = 0) -> Arrays:
    """The arrays of a batch, padded on the right: a row an example, or packed into ``room``.

    ``input_ids`` (rows, width), ``attention_mask`` and ``answer_mask`` as bool, and, packed,
    ``position_ids``. The first token of a conversation is never to be predicted: what stands
    before it is another's.
    """
    sizes = [e.ids.size for e in examples]
    bins = pack(sizes, room) if room else [[place] for place in range(len(examples))]
    width = max((sum(sizes[place] for place in of) for of in bins), default=0)
    ids = np.zeros((len(bins), width), np.int64)
    there, answers = (np.zeros(ids.shape, np.bool_) for _ in range(2))
    positions = np.zeros(ids.shape, np.int64)
    for row, of in enumerate(bins):
        at = 0
        for place in of:
            size = sizes[place]
            ids[row, at : at + size] = examples[place].ids
            answers[row, at + 1 : at + size] = examples[place].answer_mask[1:]
            there[row, at : at + size] = True
            positions[row, at : at + size] = np.arange(size)
            at += size
        positions[row, at:] = np.arange(width - at)
    arrays = {"input_ids": ids, "attention_mask": there, "answer_mask": answers}
    return {**arrays, "position_ids": positions} if room else arrays


def check_apart(network: Any, what: str) -> None:
    """Raise `ConfigError` where packed conversations see each other in this model.

    It is tried: a conversation's logits behind another one must be those it has alone.
    """
    import torch

    device = next(network.parameters()).device
    first, second = [[5, 3, 9, 4], [7, 2, 6]]
    ids = torch.tensor([first + second], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=device)
    remedy = "its conversations cannot be packed: leave packing out"
    try:
        with torch.inference_mode():
            packed = network(input_ids=ids, position_ids=positions, use_cache=False).logits
            alone = network(input_ids=ids[:, len(first) :], use_cache=False).logits
    except TypeError as error:
        raise ConfigError(f"{what} takes no position_ids, so {remedy}") from error
    behind = packed[:, len(first) :].float()
    gap = float((behind - alone.float()).abs().max())
    scale = float(alone.float().abs().max())
    if not gap <= _ROUNDING * max(scale, 1e-6):
        raise ConfigError(
            f"{what} lets a conversation see the one packed before it (its logits change by "
            f"{gap / max(scale, 1e-6):.2g} of their size), so {remedy}"
        )
