"""Whether a base in four bits can be held here, told without loading torch."""

from __future__ import annotations

import importlib.util

from dare_agg.deploy.devices import AUTO, parse_device, seen_by_driver


def why_no_four_bits(device: str) -> str:
    """What a base of four bits lacks on a ``device``, with what to do; "" where nothing."""
    kind, _ = parse_device(device)
    other = f'weights = "bfloat16" holds the base in 16 bits on any device ({kind!r} here)'
    if kind not in (AUTO, "cuda"):
        return f"it needs a CUDA device, and device is {kind!r}; {other}"
    if seen_by_driver("cuda") == 0:
        return f"it needs a CUDA device, and there is none here; {other}"
    if importlib.util.find_spec("bitsandbytes") is None:
        return (
            "it needs the package bitsandbytes; install it with: pip install bitsandbytes; " + other
        )
    return ""
