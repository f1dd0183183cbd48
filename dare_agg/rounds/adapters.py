"""LoRA adapters merged by what they mean: a step before the merge, for factors of any run.

The clients' factors are those of the version plus their decoded changes. `merge_products` puts one
update in the place of all: the factors of the mean of the products, at the version's rank, less
the version's. Everything else of the state (heads, biases, magnitudes) is the weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError
from dare_agg.merge.low_rank import Truncated, mean_of_products
from dare_agg.merge.methods import MEANS
from dare_agg.rounds.chain import Passed, StepContext, pooled
from dare_agg.rounds.server import Accepted, round_weights
from dare_agg.vectors.layout import Entry, Layout
from dare_agg.vectors.sources import DeltaSource, array_source

# The factors' names in PEFT: A (r, in) and B (out, r), or of kernels and embeddings the same.
_MARKS = ((".lora_A.", ".lora_B."), (".lora_embedding_A.", ".lora_embedding_B."))


@dataclass(frozen=True)
class Pair:
    """The two factors of an adapted module."""

    module: str
    a: Entry
    b: Entry


def factor_pairs(layout: Layout) -> list[Pair]:
    """The adapters of a layout, module by module; empty where it has none."""
    found = []
    for entry in layout.entries:
        for first, second in _MARKS:
            module, mark, rest = entry.name.partition(first)
            other = f"{module}{second}{rest}"
            if mark and other in layout:
                found.append(Pair(module.removeprefix("base_model.model."), entry, layout[other]))
    return found


def merge_products(accepted: Sequence[Accepted], context: StepContext) -> Passed:
    """The step: one update for all, whose adapters are the mean of the clients' products.

    It measures, by module, ``lora_errors``, ‖mean − merged‖/‖mean‖ of what the common rank cannot
    hold, and ``lora_ranks``, the ranks of the exact means. Raises `ConfigError` where a round has
    no adapters, or does more with a merged delta than add it.
    """
    layout = context.model.groups.layout
    pairs = factor_pairs(layout)
    if not pairs:
        raise ConfigError("merge_products: the model has no LoRA factors; leave the step out")
    settings = context.settings
    if settings.method not in MEANS or settings.scaling != 1:
        raise ConfigError(
            f"merge_products merges by itself, and the round would go on with method "
            f"{settings.method!r}, scaling {settings.scaling:g}: of factors that is no mean of "
            "products; use task-arithmetic with scaling 1"
        )
    ordered = sorted(accepted, key=lambda reply: reply.plan.client)
    weights = round_weights(ordered, settings.weighting)
    merged = np.zeros(layout.size, np.float32)
    errors, ranks = {}, {}
    for pair in pairs:
        base_a, base_b = (context.model.delta[e.offset : e.stop] for e in (pair.a, pair.b))
        found = _merge(ordered, weights, pair, base_a, base_b)
        errors[pair.module], ranks[pair.module] = found.error, found.rank
        merged[pair.a.offset : pair.a.stop] = found.a.reshape(-1) - base_a
        merged[pair.b.offset : pair.b.stop] = found.b.reshape(-1) - base_b
    done = {entry.name for pair in pairs for entry in (pair.a, pair.b)}
    for entry in layout.entries:
        if entry.name not in done:
            part = merged[entry.offset : entry.stop]
            for reply, weight in zip(ordered, weights, strict=True):
                part += np.float32(weight) * _read(reply.update, entry)
    one = replace(pooled(ordered, weights), update=array_source(merged))
    return Passed((one,), measurements=({"lora_errors": errors, "lora_ranks": ranks},))


def _merge(
    replies: Sequence[Accepted],
    weights: Sequence[float],
    pair: Pair,
    base_a: NDArray[np.float32],
    base_b: NDArray[np.float32],
) -> Truncated:
    rank = pair.a.shape[0]
    factors = [
        (
            (base_b + _read(reply.update, pair.b)).reshape(-1, rank),
            (base_a + _read(reply.update, pair.a)).reshape(rank, -1),
        )
        for reply in replies
    ]
    return mean_of_products(factors, weights)


def _read(update: DeltaSource, entry: Entry) -> NDArray[np.float32]:
    values = np.empty(entry.size, np.float32)
    update.read(entry.offset, entry.stop, values)
    return values
