"""FedProx: a client's loss gains μ/2·‖w − w₀‖², a pull towards the state it received."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def proximal(parameters: Iterable[Any], mu: float) -> Callable[[], None]:
    """What adds μ·(w − w₀) to gradients; w₀ are the parameters' values now, kept as a copy.

    It is to be called between a backward pass and the step. With μ = 0 nothing is kept or added.

    Reference: Li et al. 2018, arXiv 1812.06127.
    """
    if not mu:
        return lambda: None
    pairs = [(parameter, parameter.detach().clone()) for parameter in parameters]

    def pull() -> None:
        for parameter, start in pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=mu)

    return pull
