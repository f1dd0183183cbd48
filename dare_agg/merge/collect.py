"""Statistics of a trained model that merges go by: the Fisher diagonal, Gram matrices of Linears.

Fisher values (arXiv 2111.09832) weigh models in `fisher`, Gram matrices (arXiv 2212.09849)
make the least-squares problem of `regmean`. Needs torch, which is imported when called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, Any]
Arrays = dict[str, NDArray[np.float32]]
Forward = Callable[["torch.nn.Module", Batch], "torch.Tensor"]

FISHER_RULES = {
    "true": "mean over examples of Σ_c p_c·(∂ log p_c)², each example by itself",
    "reference": "the paper's code: (∂ Σ_batch Σ_c √p_c·log p_c)² summed over batches / examples",
}

KINDS = ("fisher", "gram")


def model_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Call a Hugging Face model on a batch without its labels; return the logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = model(**inputs)
    return getattr(output, "logits", output)


def collect_fisher(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    rule: str = "true",
    examples: int | None = None,
    forward: Forward = model_logits,
) -> Arrays:
    """Return the Fisher diagonal of every parameter that takes part, by name.

    ``rule`` is one of `FISHER_RULES`. One output column is a regression: the Fisher value is
    the squared derivative of the output; the reference rule takes that of the batch's mean
    squared error where the batch has ``labels``. Collection stops after ``examples`` examples; the
    reference rule counts a last, smaller batch as a whole one, as the paper's code does.
    Parameters the output does not depend on are left out.

    Raises `ConfigError` for an unknown rule and for no example.
    """
    import torch

    if rule not in FISHER_RULES:
        raise ConfigError(f"Fisher rule {rule!r} is unknown{did_you_mean(rule, FISHER_RULES)}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums: dict[str, torch.Tensor] = {}
    # Sums of few terms in float32, of those in float64: nearly as fast as float32 alone.
    recent: dict[str, torch.Tensor] = {}
    terms = 0

    def flush() -> None:
        for name, part in recent.items():
            if name not in sums:
                sums[name] = torch.zeros_like(part, dtype=torch.float64)
            sums[name] += part
            part.zero_()

    def add_square(target: torch.Tensor, weight: float, last: bool = True) -> None:
        nonlocal terms
        found = torch.autograd.grad(
            target, list(parameters.values()), retain_graph=not last, allow_unused=True
        )
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                if name not in recent:
                    recent[name] = torch.zeros_like(gradient, dtype=torch.float32)
                recent[name].addcmul_(gradient.float(), gradient.float(), value=weight)
        terms += 1
        if terms % 64 == 0:
            flush()

    model.eval()
    seen, full = 0, 0
    for batch in batches:
        if examples is not None and seen >= examples:
            break
        size = _batch_size(batch)
        full = max(full, size)
        if rule == "reference":
            logits = forward(model, batch)
            if logits.shape[-1] == 1 and "labels" in batch:
                gap = logits.reshape(-1) - batch["labels"].reshape(-1).to(logits.dtype)
                add_square(gap.square().mean(), 1.0)
            elif logits.shape[-1] == 1:
                add_square(logits.sum(), 1.0)
            else:
                logs = torch.log_softmax(logits, -1)
                add_square((logs.detach().exp().sqrt() * logs).sum(), 1.0)
            seen += full
            continue
        for number in range(size if examples is None else min(size, examples - seen)):
            logits = forward(model, {k: v[number : number + 1] for k, v in batch.items()})
            if logits.shape[-1] == 1:
                add_square(logits.sum(), 1.0)
            else:
                logs = torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1).sum(0)
                shares = torch.softmax(logits.detach().reshape(-1, logits.shape[-1]), -1).mean(0)
                for column in range(logs.numel()):
                    last = column + 1 == logs.numel()
                    add_square(logs[column], float(shares[column]), last)
            seen += 1
    if not seen:
        raise ConfigError("no example to collect statistics on; the data are empty")
    flush()
    return {name: (sums[name] / seen).float().cpu().numpy() for name in parameters if name in sums}


def collect_grams(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    examples: int | None = None,
    include_padding: bool = False,
    forward: Forward = model_logits,
) -> Arrays:
    """Return XᵀX / rows of the inputs of every Linear, under ``<module>.weight``.

    Rows are tokens; those the batch's ``attention_mask`` marks as padding are left out unless
    ``include_padding``. Linears that are never called are left out.

    Raises `ConfigError` where no Linear was called.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}
    mask: list[torch.Tensor | None] = [None]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach()
            kept = mask[0]
            if kept is not None and x.dim() == 3 and x.shape[:2] == kept.shape:
                x = x[kept]
            x = x.reshape(-1, x.shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            rows[name] = rows.get(name, 0) + x.shape[0]

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    seen = 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if examples is not None and seen >= examples:
                    break
                padding = batch.get("attention_mask")
                mask[0] = None if include_padding or padding is None else padding.bool()
                forward(model, batch)
                seen += _batch_size(batch)
    finally:
        for handle in hooks:
            handle.remove()
    if not sums:
        raise ConfigError("no Linear was called; regmean has nothing to solve for this model")
    return {name: (sums[name] / max(1, rows[name])).float().cpu().numpy() for name in sorted(sums)}


def _batch_size(batch: Batch) -> int:
    return len(next(iter(batch.values())))
