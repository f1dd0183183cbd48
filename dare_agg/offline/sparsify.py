"""Putting a sparsifier over each delta of a merge, with a mask key of the model's own."""

from __future__ import annotations

from dataclasses import replace

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.errors import ConfigError
from dare_agg.merge.norms import norm_ratios
from dare_agg.merge.thresholds import kth_smallest
from dare_agg.merge.wrapped import MaskedSource, ScaledSource, TrimmedSource
from dare_agg.offline.opening import OpenedModel
from dare_agg.offline.recipe import MERGEKIT_NORMS, Recipe
from dare_agg.vectors.contents import sketch
from dare_agg.vectors.layout import Layout

# The label of mask keys that follow from a seed and a delta's contents.
UPDATE_MASK = "update file mask"
_TILE = 1 << 17


def sparsified(opened: list[OpenedModel], recipe: Recipe, layout: Layout) -> list[OpenedModel]:
    """Put the sparsifier over each delta; random masks get a key of the model's own.

    Raises `ConfigError` for an update, which is sparsified already.
    """
    rate = parse_drop_rate(recipe.drop_rate) if recipe.drop_rate is not None else None
    if rate is None or rate.numerator == 1:
        return opened
    for model in opened:
        if model.kind == "update":
            raise ConfigError(
                f"{model.given.path} is sparsified already; dropping twice destroys it: leave "
                "out --drop-rate, or give the checkpoint it was made from"
            )
    spans = [(entry.offset, entry.stop) for entry in layout.entries]
    if recipe.sparsifier == "magnitude":
        ranks = [
            (hi - lo) * (rate.numerator - rate.denominator) // rate.numerator for lo, hi in spans
        ]
        return [
            replace(
                m,
                source=TrimmedSource(m.source, spans, kth_smallest(m.source, spans, ranks, _TILE)),
            )
            for m in opened
        ]
    keys = mask_keys(opened, recipe.seed)
    masked = [
        replace(
            m,
            source=MaskedSource(
                m.source,
                Mask(recipe.mask, layout.size, rate, key),
                rescale=recipe.sparsifier == "dare",
            ),
        )
        for m, key in zip(opened, keys, strict=True)
    ]
    if recipe.sparsifier in MERGEKIT_NORMS:
        norm = MERGEKIT_NORMS[recipe.sparsifier]
        masked = [
            replace(
                m,
                source=ScaledSource(m.source, spans, norm_ratios(o.source, m.source, spans, norm)),
            )
            for o, m in zip(opened, masked, strict=True)
        ]
    return masked


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
            (opened[i].given.weight or 0.0, i)
            for i, other in enumerate(names)
            if other == (own, content)
        )
        twin = [i for _, i in twins].index(number)
        key = derive_key(seed_secret(own), UPDATE_MASK, content)
        keys.append(key if not twin else derive_key(key, "twin", twin))
    return keys
