"""Updates: what a client sends. Header and quantised survivors, no index bytes.

`dare_agg/codec/UPDATE_FORMAT.md` is the normative text. Two forms share one body: inside a round
the receiver knows the `UpdateSpec` from the round plan, and the header of 120 bytes only
proves that the sender meant the same; as a file (`*.dare`) an envelope describes it.

The decoder never trusts: every size follows from the spec and is compared before anything
is allocated.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from dare_agg.codec.buffers import borrowed
from dare_agg.codec.kernels import compiled, plain_float32
from dare_agg.codec.mask import Mask, take
from dare_agg.codec.payload import check_payload, encode_values, payload_bytes, regrouped
from dare_agg.codec.rotation import GROUP
from dare_agg.codec.update_header import (
    CHECKSUM_AT,
    CHECKSUM_BYTES,
    HEADER_BYTES,
    check_header,
    checksum_of,
    header_fields,
    pack_header,
    survivors_claimed,
)
from dare_agg.codec.update_source import Update
from dare_agg.codec.update_spec import UpdateSpec
from dare_agg.errors import ConfigError, UpdateError
from dare_agg.files.pages import Pages
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource

# Fewer groups of survivors are encoded sooner than a thread starts.
GROUPS_A_THREAD = 4


def update_bytes(spec: UpdateSpec) -> int:
    """Return the exact size of the update that ``spec`` describes, header included."""
    survivors = spec.draw_mask().survivors
    return HEADER_BYTES + spec.table_bytes + payload_bytes(spec.values, survivors)


def encode_update(
    spec: UpdateSpec,
    delta: FloatVector | tuple[FloatVector, FloatVector] | DeltaSource,
    threads: int = 1,
) -> bytes:
    """Encode a delta, or a pair (base, tuned), as the update that ``spec`` describes.

    Reads the survivors only; extra memory does not grow with the model. Keep rates by tensor
    must be known (`dare_agg.codec.fitted_rates`). The bits do not depend
    on ``threads``, which share the groups of survivors of vectors in memory; as many start as
    get `GROUPS_A_THREAD` each. Raises
    `NonFiniteError` for a survivor that is no number, `ConfigError` for another size.
    """
    # Its buffer becomes the result: the update is never there twice.
    stream = io.BytesIO(bytes(update_bytes(spec)))
    with stream.getbuffer() as buffer:
        encode_update_into(spec, delta, buffer, threads)
    return stream.getvalue()


def encode_update_into(
    spec: UpdateSpec,
    delta: FloatVector | tuple[FloatVector, FloatVector] | DeltaSource,
    out: memoryview,
    threads: int = 1,
    pages: Pages | None = None,
) -> None:
    """As `encode_update`, into ``out`` of `update_bytes` bytes (for example a mapped file).

    ``pages`` are those of ``out``, where it is mapped.

    Raises `ConfigError` for a delta or a source of another size.
    """
    for vector in delta if isinstance(delta, tuple) else (delta,):
        if vector.size != spec.size:
            raise ConfigError(f"delta of {vector.size} elements; the update needs {spec.size}")
    mask = spec.draw_mask()
    survivors = mask.survivors
    payload = out[HEADER_BYTES + spec.table_bytes :]
    most = spec.most_coded

    def encode(first: int, last: int) -> int:
        pieces = _survivors(spec, mask, delta, first * GROUP, min(survivors, last * GROUP))
        groups = regrouped(pieces)
        if spec.rates is not None:
            groups = _scaled(spec, groups, first)
        if pages is not None:
            groups = _passing(groups, pages, payload_bytes(spec.values, GROUP))
        key = spec.values_key
        return encode_values(spec.values, groups, survivors, key, payload, first, most)

    count = -(-survivors // GROUP)
    in_memory = isinstance(delta, tuple | np.ndarray)
    threads = max(1, min(threads, count // GROUPS_A_THREAD)) if in_memory else 1
    if threads == 1:
        written = encode(0, count)
    else:
        bounds = [count * part // threads for part in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            written = sum(pool.map(encode, bounds[:-1], bounds[1:]))
    if written != survivors:
        raise ConfigError(f"{written} values came; the mask has {survivors} survivors")
    seal_update(spec, out, pages)


def seal_update(spec: UpdateSpec, out: memoryview, pages: Pages | None = None) -> None:
    """Write header, checksum and keep rates in front of an encoded payload of `update_bytes`."""
    payload = out.nbytes - HEADER_BYTES
    if spec.table_bytes:
        assert spec.rates is not None
        out[HEADER_BYTES : HEADER_BYTES + spec.table_bytes] = spec.rates.known.to_bytes()
    out[:HEADER_BYTES] = pack_header(spec, spec.draw_mask().survivors, payload)
    out[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_BYTES] = checksum_of(spec, out, pages)


def _scaled(spec: UpdateSpec, groups: Iterator[FloatVector], number: int) -> Iterator[FloatVector]:
    for group in groups:
        spec.scale(group, number * GROUP, down=True)
        yield group
        number += 1


def _passing(groups: Iterator[FloatVector], pages: Pages, nbytes: int) -> Iterator[FloatVector]:
    for group in groups:
        yield group
        pages.passed(nbytes)


def _survivors(
    spec: UpdateSpec,
    mask: Mask,
    delta: FloatVector | tuple[FloatVector, FloatVector] | DeltaSource,
    first: int,
    last: int,
) -> Iterator[FloatVector]:
    """Yield the values of survivors number ``first`` to ``last``, in order.

    A source that only reads tiles yields all of them.
    """
    if isinstance(delta, tuple):
        base, tuned = delta
        plain = plain_float32(base) and plain_float32(tuned)
        for positions, _ in mask.blocks(first, last):
            loops = compiled()
            with borrowed(positions.size) as piece, borrowed(positions.size) as other:
                if loops is not None and plain:
                    loops.take_difference(positions, tuned, base, piece)
                else:
                    tuned.take(positions, out=piece, mode="clip")
                    base.take(positions, out=other, mode="clip")
                    piece -= other
                yield piece
    elif isinstance(delta, np.ndarray):
        for positions, _ in mask.blocks(first, last):
            with borrowed(positions.size) as piece:
                take(delta, positions, piece)
                yield piece
    elif hasattr(delta, "take"):
        for positions, _ in mask.blocks(first, last):
            yield delta.take(positions)
    else:
        tile = np.empty(1 << 18, np.float32)
        for lo in range(0, spec.size, tile.size):
            hi = min(spec.size, lo + tile.size)
            delta.read(lo, hi, tile[: hi - lo])
            positions = mask.indices(lo, hi)
            positions -= lo
            yield tile.take(positions)


def decode_update(blob: bytes | memoryview, spec: UpdateSpec) -> Update:
    """Check an update against what the receiver expects and return it.

    Raises `UpdateError` with the reason. Nothing is allocated beyond the blob before its length
    is found right.
    """
    view = memoryview(blob)
    spec = _settled(view, spec)
    return _decode(view, spec, spec.draw_mask().survivors)


def decode_described(blob: memoryview, spec: UpdateSpec, pages: Pages | None = None) -> Update:
    """As `decode_update`, for a spec that came with the update and is not trusted either.

    ``pages`` are those of ``blob``, where it is mapped.

    Counting the survivors of a Bernoulli mask takes time in proportion to the size that the
    spec claims, so the header's count is compared only when survivors are first read.
    """
    if spec.mask != "bernoulli" or blob.nbytes < HEADER_BYTES:
        spec = _settled(blob, spec)
        return _decode(blob, spec, spec.draw_mask().survivors, pages)
    return _decode(blob, spec, min(survivors_claimed(blob), spec.size), pages)


def _settled(view: memoryview, spec: UpdateSpec) -> UpdateSpec:
    """The specification with the keep rates that the update itself brings, where it does.

    Raises `UpdateError` for rates that are none, or that keep more than the plan allows.
    """
    if spec.rates is None or spec.rates.table is not None:
        return spec
    header_fields(view, spec)
    settled = replace(spec, rates=spec.rates.read(view[HEADER_BYTES:]))
    survivors = settled.draw_mask().survivors
    if survivors > spec.most_survivors:
        raise UpdateError(
            f"its keep rates leave {survivors} survivors; its plan allows {spec.most_survivors}: "
            "send the update made for this plan",
            reason="shape",
        )
    return settled


def _decode(
    view: memoryview, spec: UpdateSpec, survivors: int, pages: Pages | None = None
) -> Update:
    begin = HEADER_BYTES + spec.table_bytes
    expected = begin + payload_bytes(spec.values, survivors)
    check_header(view, spec, survivors, expected - HEADER_BYTES)
    if view.nbytes != expected:
        raise UpdateError(
            f"update of {view.nbytes} bytes; its plan says {expected}: send it again",
            reason="truncated" if view.nbytes < expected else "trailing",
        )
    if view[CHECKSUM_AT:HEADER_BYTES].tobytes() != checksum_of(spec, view, pages):
        raise UpdateError("the checksum does not fit the bytes: send it again", reason="checksum")
    payload_view = np.frombuffer(view, np.uint8, offset=begin)
    check_payload(spec.values, payload_view, survivors, pages, spec.most_coded)
    return Update(spec, spec.draw_mask(), payload_view, view.nbytes, survivors, pages)


__all__ = [
    "Update",
    "UpdateSpec",
    "decode_described",
    "decode_update",
    "encode_update",
    "encode_update_into",
    "seal_update",
    "update_bytes",
]
