"""Updates between checkpoints on disk: make one, look into one, apply one.

Everything streams: a pass reads the mapped tensors tile by tile and hands their pages back,
so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import (
    Carried,
    Checkpoint,
    CheckpointWriter,
    open_checkpoint,
    parse_dtype,
    plan_like,
)
from dare_agg.checkpoint.fingerprints import remember
from dare_agg.checkpoint.hub import located
from dare_agg.checkpoint.tied import followers_in, names_of
from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.directions import gram_values
from dare_agg.codec.file_header import FileHeader
from dare_agg.codec.fitted_rates import fitted_rates, levels_of, tensor_squares
from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.codec.rotation import GROUP
from dare_agg.codec.update import Update, UpdateSpec
from dare_agg.codec.update_file import read_update_file, write_update_file
from dare_agg.errors import BaseMismatchError, ConfigError, LayoutError, did_you_mean
from dare_agg.merge.directions import check_rank, directions_of
from dare_agg.merge.linears import model_linears
from dare_agg.offline.base import open_base
from dare_agg.offline.model_words import model_words
from dare_agg.offline.opening import open_models
from dare_agg.offline.recipe import ModelInput, located_models
from dare_agg.offline.sparsify import UPDATE_MASK
from dare_agg.offline.tokenizer_choice import carry_model, chosen_tokenizer
from dare_agg.vectors.contents import sketch
from dare_agg.vectors.layout import FingerprintStream, FloatVector, Layout
from dare_agg.vectors.sources import CachedSource, DeltaSource, take

TILE = 1 << 18
QUANTILES = (0.5, 0.9, 0.99, 0.999)
# Parameters whose pages may be mapped at a time, of each model.
_MAPPED = 1 << 24
_SAMPLED_GROUPS = 16
KEEP_RATES = ("uniform", "own")


@dataclass(frozen=True)
class _Releasing:
    """A source that hands mapped pages back on its way through the model."""

    source: DeltaSource
    models: tuple[Checkpoint, ...]

    @property
    def size(self) -> int:
        return self.source.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        self.source.read(lo, hi, out)
        self._release(lo, hi)

    def take(self, positions: NDArray[np.int64]) -> FloatVector:
        step = max(1, positions.size)
        if positions.size and int(positions[-1] - positions[0]) > _MAPPED:
            step = positions.size * _MAPPED // int(positions[-1] - positions[0]) + 1
        parts = []
        for at in range(0, positions.size, step):
            part = positions[at : at + step]
            parts.append(take(self.source, part))
            self._release(int(part[0]), int(part[-1]) + 1)
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def _release(self, lo: int, hi: int) -> None:
        if lo // _MAPPED != hi // _MAPPED:
            for model in self.models:
                model.release()


def write_diff(
    base_path: Path,
    tuned_path: Path,
    out: Path,
    *,
    drop_rate: DropRate | str | float = "0.9",
    values: str = "b1",
    mask: str = "stratified",
    seed: int = 0,
    rank: int | None = None,
    exclude: tuple[str, ...] = (),
    rescale: bool = True,
    keep_rates: str = "uniform",
    gram: int | None = None,
    gram_bits: int = 2,
    overwrite: bool = False,
) -> FileHeader:
    """Write the update that leads from ``base_path`` to ``tuned_path``.

    Mask and value keys follow from ``seed`` and the delta's contents, so that updates of
    several models have independent masks. With ``rank`` they follow from ``seed`` alone:
    parties that use one seed and base and the ranks 0, 1, … keep disjoint elements. ``keep_rates``
    "own" keeps each tensor in proportion to its change, in as many bytes. ``gram`` puts so many
    directions of each Linear's whole delta behind it, ``gram_bits`` an element, for merges that go
    by Gram matrices.

    Raises `LayoutError` where the models do not fit, `NonFiniteError` naming the tensor.
    """
    rate = parse_drop_rate(drop_rate)
    find_values(values)
    _check_keep_rates(keep_rates, mask, rank)
    gram_format = gram_values(gram_bits)
    if gram is not None:
        check_rank(gram)
    secret = seed_secret(seed)
    base_path, (tuned_input,) = located_models(base_path, [ModelInput(**model_words(tuned_path))])
    ground = open_base(base_path, [tuned_input.path], exclude)
    base, layout = ground.checkpoint, ground.layout
    if not layout.size:
        raise LayoutError(f"{base_path} has no parameter left; exclude less")
    (model,) = open_models([tuned_input], ground, CachedSource(base.reader(layout)), exclude)
    if model.kind == "update":
        raise LayoutError(f"{tuned_path} is an update already; give the tuned model")
    tuned = model.checkpoint
    content = sketch(model.source) if rank is None else b""
    spec = UpdateSpec(
        size=layout.size,
        drop_rate=rate,
        mask=mask,
        mask_key=derive_key(secret, UPDATE_MASK, content),
        values_key=derive_key(secret, "update file values", content, rank or 0),
        rank=rank or 0,
        values=values,
        base=checked_fingerprint(base, layout),
        layout=layout.fingerprint,
        rescale=rescale,
    )
    if keep_rates == "own":
        squares = tensor_squares(layout.sizes, _Releasing(model.source, _open(base, tuned)))
        levels = levels_of(layout.sizes, squares)
        spec = replace(spec, rates=fitted_rates(layout.sizes, levels, rate, values))
    spec.draw_mask()
    if tuned is not None:
        for _ in _finite_tiles(tuned, layout):
            pass
    source = _Releasing(model.source, _open(base, tuned))
    dtypes = (tuned or base).dtypes
    return write_update_file(
        out,
        spec,
        layout,
        source,
        seed=seed,
        dtypes={name: dtypes[name] for name in layout.names},
        overwrite=overwrite,
        directions=None if gram is None else _directions(source, layout, gram),
        directions_values=gram_format,
    )


def _directions(
    source: DeltaSource, layout: Layout, rank: int
) -> dict[str, tuple[NDArray[np.floating], int]]:
    """The leading directions of each Linear that changed; raises `LayoutError` for none."""
    linears = model_linears(layout)
    found = {name: (rows, axis) for name, rows, axis in directions_of(source, linears, rank)}
    if not found:
        raise LayoutError(
            f"no Linear of the model changed ({len(linears)} are known by their names and shapes), "
            "so there are no directions; leave out --gram"
        )
    return found


def _check_keep_rates(keep_rates: str, mask: str, rank: int | None) -> None:
    if keep_rates not in KEEP_RATES:
        raise ConfigError(
            f"keep rates {keep_rates!r} are unknown{did_you_mean(keep_rates, KEEP_RATES)}"
        )
    if keep_rates == "own" and rank is not None:
        raise ConfigError(
            f"rank {rank} keeps what no other rank keeps, and keep rates of each model's own break "
            "that; leave out one of them"
        )
    if keep_rates == "own" and mask != "stratified":
        raise ConfigError(f"keep rates 'own' need mask 'stratified', not {mask!r}")


def _open(base: Checkpoint, tuned: Checkpoint | None) -> tuple[Checkpoint, ...]:
    return (base,) if tuned is None else (base, tuned)


def checked_fingerprint(model: Checkpoint, layout: Layout) -> str:
    """Return the fingerprint of a model over ``layout``; refuse one that is not finite."""
    stream = FingerprintStream(layout)
    for piece in _finite_tiles(model, layout):
        stream.update(piece)
    found = stream.hexdigest()
    remember(model.files, layout.fingerprint, found)
    return found


def _finite_tiles(model: Checkpoint, layout: Layout) -> Iterator[FloatVector]:
    reader = model.reader(layout)
    tile = np.empty(TILE, np.float32)
    for lo in range(0, layout.size, TILE):
        hi = min(layout.size, lo + TILE)
        reader.read(lo, hi, tile[: hi - lo])
        if not np.isfinite(tile[: hi - lo]).all():
            # Looks again, slower, to name the tensor and the index.
            model.check_finite(layout)
        yield tile[: hi - lo]
        if lo // _MAPPED != hi // _MAPPED:
            model.release()


def apply_update(
    base_path: Path,
    update_path: Path,
    out: Path,
    *,
    scaling: float = 1.0,
    dtype: str | None = None,
    overwrite: bool = False,
    carry_code: bool = False,
    tokenizer: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[FileHeader, Carried]:
    """Write base + ``scaling`` × rescaled survivors, with the base's dtypes and other files.

    ``tokenizer`` is a folder whose tokenizer goes along in place of the base's.
    Returns the update's header and which of the base's files went along. Raises
    `BaseMismatchError` for another base than the update was made from.
    """
    update, header = read_update_file(update_path)
    layout = header.layout
    base = open_checkpoint(located(base_path))
    base.check_layout(layout)
    found = checked_fingerprint(base, layout)
    if found != header.base:
        raise BaseMismatchError(
            f"{update_path} was made from base {header.base[:16]}, {base_path} is {found[:16]}; "
            "give the base it was made from"
        )
    reader = base.reader(layout)
    followers = followers_in(base, set(layout.names))
    written = names_of(layout, followers)
    merged = {*layout.names, *followers}
    plans = plan_like(base, out, merged, parse_dtype(dtype) if dtype else None)
    chosen = chosen_tokenizer(tokenizer, out, plans)
    with CheckpointWriter(out, plans, {"format": "pt"}, overwrite) as writer:
        tile = np.empty(TILE, np.float32)
        for lo in range(0, layout.size, TILE):
            hi = min(layout.size, lo + TILE)
            piece = tile[: hi - lo]
            reader.read(lo, hi, piece)
            update.add(lo, hi, piece, scaling)
            for entry, first, last in layout.pieces(lo, hi):
                at = entry.offset - lo
                for name in written[entry.name]:
                    writer.write(name, first, piece[at + first : at + last])
            if lo // _MAPPED != hi // _MAPPED:
                base.release()
            if on_progress is not None:
                on_progress(hi, layout.size)
        for name in base.names:
            if name not in merged:
                writer.write_raw(name, 0, base.raw(name))
        carried = Carried()
        if not writer.single:
            carried = carry_model(
                base.folder, chosen, writer.folder, plans, code=carry_code, skip=base.weights
            )
    return header, carried


def describe_update(update: Update, header: FileHeader, nbytes: int) -> dict[str, Any]:
    """What `dare-agg inspect` shows, as plain values.

    The survivors are a sample of the delta, each standing for as many elements as it is rescaled
    by, so its quantiles and norm come for nothing. Formats of few bits add noise of known size
    (``values_nmse``): it is taken out of the spread, but what is far out in the tails cannot be
    seen in 1 or 2 bits.
    """
    sample, weights = _sample(update)
    magnitudes = np.abs(sample) / np.float32((1 + find_values(header.values).nmse) ** 0.5)
    parameters = header.layout.size
    quantiles, rms = [0.0] * len(QUANTILES), 0.0
    if magnitudes.size:
        squares = np.square(magnitudes, dtype=np.float64)
        rms = float(np.sqrt(np.average(squares, weights=weights)))
        if weights is None:
            quantiles = np.quantile(magnitudes, QUANTILES).tolist()
        else:
            quantiles = np.quantile(
                magnitudes, QUANTILES, weights=weights, method="inverted_cdf"
            ).tolist()
    return {
        "parameters": parameters,
        "tensors": len(header.layout.entries),
        "survivors": update.survivors,
        "bytes": nbytes,
        "bits_per_parameter": 8 * nbytes / max(1, parameters),
        "payload_bits_per_parameter": 8 * update.payload.size / max(1, parameters),
        "drop_rate": header.drop_rate.p,
        "values": header.values,
        **({"keep_rates": "own"} if header.by_tensor else {}),
        "mask": header.mask,
        "rank": header.rank,
        "rescale": header.rescale,
        "seed": header.seed,
        "base_fingerprint": header.base,
        "layout_fingerprint": header.layout.fingerprint,
        "dtypes": sorted(set(header.dtypes.values())),
        "delta_quantiles": {f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
        "delta_rms": rms,
        "delta_norm": rms * parameters**0.5,
        "sampled_survivors": len(magnitudes),
        "values_nmse": find_values(header.values).nmse,
        **_described(header),
    }


def _described(header: FileHeader) -> dict[str, Any]:
    """Number, format and size of an update's directions, under that name; nothing without any."""
    plan = header.directions
    if plan is None:
        return {}
    nbytes = plan.nbytes(header.layout)
    found = {
        "tensors": len(plan.tensors),
        "rank": max(tensor.rank for tensor in plan.tensors),
        "values": plan.values,
        "bytes": nbytes,
        "bits_per_parameter": 8 * nbytes / max(1, header.layout.size),
    }
    return {"directions": found}


def _sample(update: Update) -> tuple[FloatVector, FloatVector | None]:
    """Decoded, unscaled survivors: all, or evenly spaced groups of a large update.

    And how many elements each stands for, where that is not the same for all.
    """
    groups = -(-update.survivors // GROUP)
    chosen = sorted(
        {i * groups // _SAMPLED_GROUPS for i in range(_SAMPLED_GROUPS)} if groups else ()
    )
    parts, factors = [np.empty(0, np.float32)], [np.empty(0, np.float32)]
    for group in chosen:
        first, last = group * GROUP, min(update.survivors, (group + 1) * GROUP)
        parts.append(update.values(first, last).copy())
        if update.spec.rates is not None:
            blocks = update.mask.blocks(first, last)
            factors += [np.broadcast_to(f, p.shape).astype(np.float32) for p, f in blocks]
    weights = None if update.spec.rates is None else np.concatenate(factors)
    return np.concatenate(parts), weights
