"""Weights in bfloat16: half the memory, and rounding that loses no small step on average.

A step of fine-tuning is smaller than what lies between two bfloat16 numbers, so that rounding to
the nearest one mostly takes it back. Stochastic rounding goes up or down with the probability of
the distance, and keeps the step in expectation (Gupta et al. 2015, arXiv 1502.02551).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from client.config import TaskConfig

_LOW_BITS = 1 << 16


def round_stochastically(values: Any, generator: Any) -> Any:
    """Round float32 values to bfloat16, up or down so that the expectation is the value."""
    import torch

    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        0, _LOW_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    rounded = bits.add(noise).bitwise_and_(-_LOW_BITS).view(torch.float32)
    # Sums of bits are no number where there was none.
    return torch.where(torch.isfinite(values), rounded, values).bfloat16()


def shrink_weights(network: Any, named: Any, config: TaskConfig) -> None:
    """Make a network's weights bfloat16, as ``weights`` says; buffers stay as they are.

    In full fine-tuning all but a new head, which is small and learns fast; else all that is not
    trained, so that what is trained has float32.
    """
    import torch

    if config.weights == "float32":
        return
    for name, parameter in network.named_parameters():
        kept = name.startswith("head.") if config.train == "full" else name in named
        if not kept and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def bfloat16_adamw(groups: Sequence[dict[str, Any]], seed: Sequence[int], nearest: bool) -> Any:
    """AdamW for bfloat16 parameters: moments and the step in float32, the result rounded.

    Stochastically, from the seed, or to the ``nearest`` (what plain bfloat16 weights do, to
    compare with). Parameters in float32 among them step as usual.
    """
    import torch
    from torch.optim.adamw import adamw

    class Bfloat16AdamW(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
            self.words = np.random.SeedSequence([*(int(s) for s in seed), 62])
            self.generators: dict[Any, Any] = {}

        def generator(self, device: Any) -> Any:
            if device not in self.generators:
                low, high = self.words.generate_state(2, np.uint32)
                made = torch.Generator(device=device)
                self.generators[device] = made.manual_seed(int(low) << 31 | int(high))
            return self.generators[device]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.move(parameter, group)

        def move(self, parameter: Any, group: dict[str, Any]) -> None:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros_like(parameter, dtype=torch.float32)
            small = parameter.dtype == torch.bfloat16
            values = parameter.float() if small else parameter
            adamw(
                [values], [parameter.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [],
                [state["step"]], fused=True, amsgrad=False, beta1=group["betas"][0],
                beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False,
            )  # fmt: skip
            if small and nearest:
                parameter.copy_(values)
            elif small:
                parameter.copy_(round_stochastically(values, self.generator(values.device)))

    return Bfloat16AdamW()
