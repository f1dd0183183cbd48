"""Putting a sparsifier over each delta of a merge, with a mask key of the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import groupby

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import MAX_STRIDE, DropRate, Mask, parse_drop_rate
from dare_agg.errors import ConfigError
from dare_agg.merge.norms import norm_ratios
from dare_agg.merge.thresholds import kth_smallest
from dare_agg.merge.wrapped import MaskedSource, PiecewiseSource, ScaledSource, TrimmedSource
from dare_agg.offline.opening import OpenedModel
from dare_agg.offline.parameters import Place, by_tensor, order_key, places
from dare_agg.offline.recipe import MERGEKIT_NORMS, Rate, Recipe
from dare_agg.vectors.contents import sketch
from dare_agg.vectors.layout import Layout
from dare_agg.vectors.sources import DeltaSource

# The label of mask keys that follow from a seed and a delta's contents.
UPDATE_MASK = "update file mask"
_TILE = 1 << 17


def sparsified(opened: list[OpenedModel], recipe: Recipe, layout: Layout) -> list[OpenedModel]:
    """Put the sparsifier over each delta; random masks get a key of the model's own.

    Raises `ConfigError` for an update, which is sparsified already.
    """
    everything = (*layout.names, *layout.excluded, *layout.buffers)
    where = places(layout.names, everything)
    rates = [_rates_by_tensor(recipe.rate_of(m.number), where, str(m.given.path)) for m in opened]
    if all(rate is None for rate in rates):
        return opened
    for model, rate in zip(opened, rates, strict=True):
        if model.kind == "update" and rate is not None:
            raise ConfigError(
                f"{model.given.path} is sparsified already; dropping twice destroys it: leave "
                "out --drop-rate, or give the checkpoint it was made from"
            )
    keys = mask_keys(opened, recipe.seed)
    return [
        model
        if rate is None
        else replace(model, source=_dropped(model.source, rate, key, recipe, layout))
        for model, rate, key in zip(opened, rates, keys, strict=True)
    ]


def _rates_by_tensor(
    rate: Rate | None, where: Sequence[Place], what: str
) -> list[DropRate | None] | None:
    """The drop rate of each tensor, None where all is dropped; None if nothing is anywhere."""
    if rate is None:
        return None
    if isinstance(rate, str):
        exact = parse_drop_rate(rate)
        return None if exact.numerator == 1 else [exact] * len(where)
    values = by_tensor(rate, where, f"{what}: drop-rate")
    if not values.any():
        return None
    # Between the points of a gradient lie numbers of any length.
    keeps = [Fraction(1 - float(v)).limit_denominator(MAX_STRIDE) for v in values]
    return [DropRate(k.denominator, k.numerator) if k > 0 else None for k in keeps]


def _dropped(
    source: DeltaSource,
    rates: list[DropRate | None],
    key: bytes,
    recipe: Recipe,
    layout: Layout,
) -> DeltaSource:
    spans = [(entry.offset, entry.stop) for entry in layout.entries]
    if recipe.sparsifier == "magnitude":
        ranks = [
            hi - lo if r is None else (hi - lo) * (r.numerator - r.denominator) // r.numerator
            for (lo, hi), r in zip(spans, rates, strict=True)
        ]
        return TrimmedSource(source, spans, kth_smallest(source, spans, ranks, _TILE))
    rescale = recipe.sparsifier == "dare"
    masked: DeltaSource
    if len(set(rates)) == 1 and rates[0] is not None:
        mask = Mask(recipe.mask, layout.size, rates[0], key)
        masked = MaskedSource(source, mask, rescale=rescale)
    else:
        masked = _by_pieces(source, spans, rates, key, recipe.mask, rescale)
    if recipe.sparsifier in MERGEKIT_NORMS:
        norm = MERGEKIT_NORMS[recipe.sparsifier]
        return ScaledSource(masked, spans, norm_ratios(source, masked, spans, norm))
    return masked


def _by_pieces(
    source: DeltaSource,
    spans: Sequence[tuple[int, int]],
    rates: Sequence[DropRate | None],
    key: bytes,
    kind: str,
    rescale: bool,
) -> PiecewiseSource:
    """A mask over the whole layout for each rate, of which its tensors take their part."""
    size = spans[-1][1]
    masks = {
        rate: Mask(kind, size, rate, derive_key(key, "rate", rate.numerator, rate.denominator))
        for rate in set(rates)
        if rate is not None and rate.numerator > 1
    }
    pieces: list[tuple[int, int, DeltaSource | None]] = []
    survivors = 0
    for rate, run in groupby(zip(spans, rates, strict=True), key=lambda pair: pair[1]):
        parts = list(run)
        lo, hi = parts[0][0][0], parts[-1][0][1]
        if rate is None:
            pieces.append((lo, hi, None))
        elif rate.numerator == 1:
            pieces.append((lo, hi, source))
            survivors += hi - lo
        else:
            pieces.append((lo, hi, MaskedSource(source, masks[rate], rescale=rescale)))
            survivors += masks[rate].ordinal(hi) - masks[rate].ordinal(lo)
    return PiecewiseSource(pieces, survivors)


def mask_keys(opened: list[OpenedModel], seed: int) -> list[bytes]:
    """A mask key for each model, from its own seed or ``seed``, and its content.

    It is the key that ``dare-agg diff`` with that seed uses, so a merge of update files (in
    f32) equals that of the models. Models of equal content and seed get different keys,
    numbered in their order by weight.
    """
    seeds = [seed if m.given.seed is None else m.given.seed for m in opened]
    names = list(zip(seeds, (sketch(m.source) for m in opened), strict=True))
    keys = []
    for number, (own, content) in enumerate(names):
        twins = sorted(
            (order_key(opened[i].given.weight), i)
            for i, other in enumerate(names)
            if other == (own, content)
        )
        twin = [i for _, i in twins].index(number)
        key = derive_key(seed_secret(own), UPDATE_MASK, content)
        keys.append(key if not twin else derive_key(key, "twin", twin))
    return keys
