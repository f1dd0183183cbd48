"""Training that knows what will be sent: survivors alone learn, or the delta is pulled to zero.

Both go through the task's own loop by hooks of torch: gradients outside a mask are zero, or every
step of the optimizer is followed by a pull of the trained values towards those they began with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update import HEADER_BYTES, UpdateSpec, decode_update, encode_update
from dare_agg.errors import LayoutError
from dare_agg.vectors.layout import FloatVector, Layout

State = Mapping[str, NDArray[Any]]
# The learning rate of survivors alone: the task's own times this and √(1/(1−p)).
RATE = 2.0
# Of AdamR-L2: what of the delta goes with each step, in units of the learning rate.
PULL = 100.0
_NOBODY = "0" * 64


def survivors_spec(size: int, nbytes: int, values: str, seed: int) -> UpdateSpec:
    """The update of at most so many bytes whose survivors alone learn: nothing rescales them."""
    rate, keep = parse_drop_rate(0), 1.0
    while HEADER_BYTES + payload_bytes(values, rate.survivors(size)) > nbytes:
        keep *= min(0.995, nbytes / (HEADER_BYTES + payload_bytes(values, rate.survivors(size))))
        rate = parse_drop_rate(round(1 - keep, 6))
    key = derive_key(seed_secret(seed), "hard")
    return UpdateSpec(
        size, rate, "stratified", key, key, 0, values, _NOBODY, _NOBODY, rescale=False
    )


def survivors_of(spec: UpdateSpec) -> FloatVector:
    """1 where an update has a survivor, 0 elsewhere."""
    mask = spec.draw_mask()
    return mask.scatter(np.ones(mask.survivors, np.float32), rescale=False)


def resent(spec: UpdateSpec, delta: FloatVector) -> tuple[FloatVector, int]:
    """A delta as an update of this spec brings it, and its bytes."""
    blob, out = encode_update(spec, delta), np.empty(delta.size, np.float32)
    decode_update(blob, spec).read(0, delta.size, out)
    return out, len(blob)


def learned(task: Any, base: State, layout: Layout, spec: UpdateSpec, seed: int) -> State:
    """A state tuned from ``base`` in which only an update's survivors, and the head, moved."""
    with survivors_alone(task, base, layout, spec, RATE):
        return _trained(task, base, seed)


@contextmanager
def survivors_alone(
    task: Any, state: State, layout: Layout, spec: UpdateSpec, rate: float
) -> Iterator[None]:
    """Lets only an update's survivors, and the head, learn from ``state``.

    They have to go further than all elements would: their learning rate is the task's own times
    ``rate`` and √(1/(1−p)).
    """
    import torch

    kept = layout.unflatten(survivors_of(spec))
    masks = {name: torch.from_numpy(array.copy()) for name, array in kept.items()}
    network, _ = task.network(state, "train")
    handles = []
    for name, parameter in network.named_parameters():
        if name in masks:
            parameter.requires_grad_(True)
            handles.append(parameter.register_hook(lambda g, mask=masks[name]: g * mask))
    if len(handles) != len(masks):
        raise LayoutError(f"{len(masks)} tensors of a mask, {len(handles)} of them parameters")
    factor = rate / sqrt(spec.drop_rate.keep)
    try:
        with _changed(task, learning_rate=task.config.learning_rate * factor):
            yield
    finally:
        for handle in handles:
            handle.remove()


def pulled(task: Any, base: State, layout: Layout, seed: int) -> State:
    """A state tuned by AdamW whose steps end in θ ← θ − lr·`PULL`·(θ − θ₀), but for the head.

    AdamR-L2 of Deng et al. 2024 (arXiv 2410.09344): decay towards the pretrained values.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    network, _ = task.network(base, "train")
    starts = [(p, p.detach().clone()) for name, p in network.named_parameters() if name in layout]

    def after(optimizer: Any, _: Any, __: Any) -> None:
        rate = optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for parameter, start in starts:
                parameter.lerp_(start, min(1.0, rate * PULL))

    handle = register_optimizer_step_post_hook(after)
    try:
        return _trained(task, base, seed)
    finally:
        handle.remove()


def _trained(task: Any, base: State, seed: int) -> State:
    """As `simulations.runs.single.tuned_state` trains: all rows, the same order."""
    state: State = task.train(base, np.arange(len(task.train_rows)), seed=(seed, 1))[0]
    return state


@contextmanager
def _changed(task: Any, **words: Any) -> Iterator[None]:
    """The task with other words of its configuration; rows share tasks."""
    before = task.config
    task.config = replace(before, **words)
    try:
        yield
    finally:
        task.config = before
