"""What nodes must have alike where they train a part: the tensors that stay what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

# Values of a tensor that are looked at, spread over it.
_VALUES = 1024


def frozen_fingerprint(network: Any, learned: Collection[str]) -> str:
    """SHA-256 (hex) of what a network does not learn: names, shapes and values spread over each.

    Values count as bfloat16, so nodes that load one checkpoint in other precisions agree; of
    tensors that are codes (a base in four bits) the shapes count.
    """
    import torch

    digest = hashlib.sha256(b"dare-agg frozen 1\0")
    for name, parameter in sorted(network.named_parameters()):
        if name in learned:
            continue
        digest.update(f"{name}\0{tuple(parameter.shape)}\0".encode())
        if parameter.is_floating_point():
            flat = parameter.detach().reshape(-1)
            values = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES]
            # From float32 in any case: a rounding of its own is what all have alike.
            rounded = values.float().to(torch.bfloat16).view(torch.int16)
            digest.update(rounded.cpu().numpy().tobytes())
    return digest.hexdigest()
