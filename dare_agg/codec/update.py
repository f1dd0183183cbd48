"""Updates: what a client sends. Header and quantised survivors, no index bytes.

`dare_agg/codec/UPDATE_FORMAT.md` is the normative text. Two forms share one body: inside a round
the receiver knows the `UpdateSpec` from the round plan, and the header of 120 bytes only
proves that the sender meant the same; as a file (`*.dare`) an envelope describes it.

The decoder never trusts: every size follows from the spec and is compared before anything
is allocated.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.hazmat.primitives.poly1305 import Poly1305
from numpy.typing import NDArray

from dare_agg.codec.buffers import borrowed
from dare_agg.codec.derive import derive_key
from dare_agg.codec.formats import find_values
from dare_agg.codec.kept_groups import DECODED
from dare_agg.codec.kernels import compiled, plain_float32
from dare_agg.codec.mask import MASK_KINDS, DropRate, Mask, take
from dare_agg.codec.payload import (
    check_payload,
    decode_values,
    encode_values,
    payload_bytes,
    regrouped,
)
from dare_agg.codec.rates import TensorRates
from dare_agg.codec.rotation import GROUP
from dare_agg.codec.value_format import MAX_UPDATE
from dare_agg.errors import ConfigError, UpdateError
from dare_agg.files.pages import Pages
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import DeltaSource

CODEC_VERSION = 1
# With keep rates by tensor.
BY_TENSOR_VERSION = 2
MAGIC = b"DARE"
HEADER = struct.Struct("<4sHBBB3xIIIQQQ8s8s8s32s16s")
HEADER_BYTES = HEADER.size
CHECKSUM_BYTES = 16
_CHECKSUM_AT = HEADER_BYTES - CHECKSUM_BYTES
_CHECKSUM_PIECE = 1 << 24
# Fewer groups of survivors are encoded sooner than a thread starts.
GROUPS_A_THREAD = 4
MAX_CONTEXT_BYTES = 32
_SURVIVORS_FIELD = 9
_FLAG_RESCALE = 1
_FLAG_TABLE = 2
# Why an update is refused whose header field is another one, worst first.
_HEADER_REASONS = {
    "base": "base",
    "layout": "layout",
    "parameters": "shape",
    "values": "values",
    "mask": "mask",
    "rank": "mask",
    "stride": "mask",
    "stride-of": "mask",
    "mask-digest": "mask",
    "survivors": "shape",
    "context": "context",
    "flags": "malformed",
    "payload": "shape",
}


@dataclass(frozen=True)
class UpdateSpec:
    """All that sender and receiver of an update agree on beforehand.

    ``base`` and ``layout`` are hex fingerprints; ``context`` binds the update to a run, a
    round and a client (at most 32 bytes). ``rescale`` tells the receiver to multiply the
    survivors by 1/(1−p); without it they are added as they are (DropOnly, error feedback).
    ``most`` is the largest magnitude of a survivor: that of a parameter's change, where the update
    holds no statistics. ``rates`` are keep rates by tensor, of at most as many survivors as
    ``drop_rate`` gives, and one a tensor.
    """

    size: int
    drop_rate: DropRate
    mask: str
    mask_key: bytes
    values_key: bytes
    rank: int
    values: str
    base: str
    layout: str
    rescale: bool = True
    context: bytes = b""
    most: np.float32 = MAX_UPDATE
    rates: TensorRates | None = None

    def __post_init__(self) -> None:
        find_values(self.values)
        for name in ("base", "layout"):
            text = getattr(self, name)
            try:
                good = len(bytes.fromhex(text)) == 32
            except (ValueError, TypeError):
                good = False
            if not good:
                raise ConfigError(f"{name} fingerprint {text!r:.80} is not 64 hex digits")
        if len(self.context) > MAX_CONTEXT_BYTES:
            raise ConfigError(
                f"context of {len(self.context)} bytes; at most {MAX_CONTEXT_BYTES} are allowed"
            )
        for name in ("mask_key", "values_key"):
            if len(getattr(self, name)) != 16:
                raise ConfigError(f"{name} has {len(getattr(self, name))} bytes; 16 are needed")

    def draw_mask(self) -> Mask:
        """Return the mask of this update."""
        return Mask(self.mask, self.size, self.drop_rate, self.mask_key, self.rank, self.rates)

    def mask_digest(self) -> bytes:
        """8 bytes that stand for mask kind, key, rank and values key, and rates told beforehand."""
        text = struct.pack("<BI", MASK_KINDS.index(self.mask), self.rank)
        text += self.mask_key + self.values_key
        if self.rates is None:
            return hashlib.sha256(b"dare-agg mask 1\0" + text).digest()[:8]
        told = self.rates.known.to_bytes() if self.rates.told else b""
        return hashlib.sha256(b"dare-agg mask 2\0" + text + told).digest()[:8]

    @property
    def version(self) -> int:
        """The version of the format that the update is written in."""
        return CODEC_VERSION if self.rates is None else BY_TENSOR_VERSION

    @property
    def table_bytes(self) -> int:
        """Bytes of keep rates in front of the values."""
        return 0 if self.rates is None else self.rates.table_bytes

    @property
    def most_coded(self) -> np.float32:
        """``most`` as it bounds the coded values, which are divided by their tensor's scale."""
        if self.rates is None:
            return self.most
        return np.float32(self.most / np.float32(max(1.0, self.rates.known.largest_scale)))

    @property
    def most_survivors(self) -> int:
        """The most survivors that the update may have, known before it arrives."""
        if self.mask == "bernoulli":
            return self.size
        uniform = self.drop_rate.survivors(self.size)
        return uniform if self.rates is None else self.rates.most_survivors(uniform)

    def scale(self, values: FloatVector, first: int, *, down: bool) -> None:
        """Divide survivors from number ``first`` on by their tensor's scale, or multiply by it."""
        if self.rates is not None:
            self.rates.scale(values, first, down=down)


@dataclass(frozen=True)
class Update:
    """A checked update; a `DeltaSource` of its (rescaled) sparse delta."""

    spec: UpdateSpec
    mask: Mask
    payload: NDArray[np.uint8] = field(repr=False)
    nbytes: int
    survivors: int
    # Of the payload, where it is mapped.
    pages: Pages | None = field(default=None, repr=False, compare=False)
    # Stands for this update among `DecodedGroups`.
    _token: object = field(
        default_factory=object, init=False, repr=False, compare=False, hash=False
    )

    @property
    def size(self) -> int:
        return self.spec.size

    def values(self, first: int, last: int) -> FloatVector:
        """Return the decoded, unscaled survivors number ``first`` to ``last``."""
        parts: list[FloatVector] = []
        while first < last:
            group = first // GROUP
            end = min((group + 1) * GROUP, self.survivors)
            stop = min(last, end)
            parts.append(self._group(group)[first - group * GROUP : stop - group * GROUP])
            if stop == end:
                DECODED.let_go(self._token, group)
            first = stop
        if not parts:
            return np.empty(0, np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _group(self, group: int) -> FloatVector:
        kept = DECODED.find(self._token, group)
        if kept is not None:
            return kept
        values = decode_values(
            self.spec.values, self.payload, self.survivors, self.spec.values_key, group
        )
        self.spec.scale(values, group * GROUP, down=False)
        DECODED.keep(self._token, group, values)
        if self.pages is not None:
            self.pages.passed(payload_bytes(self.spec.values, GROUP))
        return values

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[NDArray[np.int64], FloatVector]]:
        """Yield ``(positions, rescaled values)`` of the survivors in ``[lo, hi)``, in order.

        The arrays may be reused by the next step: do not keep them.
        """
        for positions, values, scale in self._unscaled(lo, hi):
            if not self.spec.rescale:
                yield positions, values
                continue
            with borrowed(values.size) as rescaled:
                np.multiply(values, scale, out=rescaled)
                yield positions, rescaled

    def _unscaled(
        self, lo: int, hi: int
    ) -> Iterator[tuple[NDArray[np.int64], FloatVector, FloatVector | np.float32]]:
        if self.mask.survivors != self.survivors:
            raise UpdateError(
                f"update of {self.survivors} survivors; its mask has {self.mask.survivors}",
                reason="shape",
            )
        for first, positions, scale in self.mask.within(lo, hi):
            yield positions, self.values(first, first + positions.size), scale

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the delta's elements ``lo`` to ``hi``."""
        out[:] = 0
        for positions, values in self.sparse(lo, hi):
            loops = compiled()
            if loops is not None and plain_float32(out):
                loops.put_at(positions, lo, values, out)
                continue
            positions -= lo
            out[positions] = values

    def add(self, lo: int, hi: int, out: FloatVector, weight: float = 1.0) -> None:
        """Add ``weight`` times the delta's elements ``lo`` to ``hi`` to ``out``."""
        factor = np.float32(weight)
        loops = compiled()
        if loops is not None and plain_float32(out):
            for positions, values, scale in self._unscaled(lo, hi):
                if not self.spec.rescale:
                    loops.add_at(positions, lo, values, np.float32(1), factor, out)
                elif isinstance(scale, np.ndarray):
                    loops.add_at(positions, lo, values * scale, np.float32(1), factor, out)
                else:
                    loops.add_at(positions, lo, values, scale, factor, out)
            return
        for positions, values in self.sparse(lo, hi):
            positions -= lo
            with borrowed(values.size) as sums, borrowed(values.size) as weighted:
                out.take(positions, out=sums, mode="clip")
                np.multiply(values, factor, out=weighted)
                sums += weighted
                # Positions are unique, so plain indexing puts each once.
                out[positions] = sums

    def present(self, lo: int, hi: int) -> NDArray[np.bool_]:
        """Which elements ``lo`` to ``hi`` survived."""
        kept = np.zeros(hi - lo, np.bool_)
        kept[self.mask.indices(lo, hi) - lo] = True
        return kept


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
    out[:HEADER_BYTES] = _header(spec, spec.draw_mask().survivors, payload)
    out[_CHECKSUM_AT : _CHECKSUM_AT + CHECKSUM_BYTES] = _checksum(spec, out, pages)


def _scaled(spec: UpdateSpec, groups: Iterator[FloatVector], number: int) -> Iterator[FloatVector]:
    for group in groups:
        spec.scale(group, number * GROUP, down=True)
        yield group
        number += 1


def _passing(groups: Iterator[FloatVector], pages: Pages, nbytes: int) -> Iterator[FloatVector]:
    for group in groups:
        yield group
        pages.passed(nbytes)


def _header(spec: UpdateSpec, survivors: int, payload: int) -> bytes:
    return HEADER.pack(
        MAGIC,
        spec.version,
        MASK_KINDS.index(spec.mask),
        find_values(spec.values).code,
        _FLAG_RESCALE * spec.rescale | (_FLAG_TABLE if spec.table_bytes else 0),
        spec.rank,
        spec.drop_rate.numerator,
        spec.drop_rate.denominator,
        spec.size,
        survivors,
        payload,
        bytes.fromhex(spec.base)[:8],
        bytes.fromhex(spec.layout)[:8],
        spec.mask_digest(),
        spec.context.ljust(MAX_CONTEXT_BYTES, b"\0"),
        bytes(CHECKSUM_BYTES),
    )


def _checksum(spec: UpdateSpec, blob: memoryview, pages: Pages | None = None) -> bytes:
    """Poly1305 over the update with its checksum field left out, under a key of its own.

    Twenty times as fast as SHA-256. Inside a round, who does not have the plan cannot forge it.
    """
    digest = Poly1305(derive_key(spec.values_key, "update checksum", length=32))
    digest.update(blob[:_CHECKSUM_AT])
    for at in range(HEADER_BYTES, blob.nbytes, _CHECKSUM_PIECE):
        piece = blob[at : at + _CHECKSUM_PIECE]
        digest.update(piece)
        if pages is not None:
            pages.passed(piece.nbytes)
    return digest.finalize()


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
    claimed = HEADER.unpack(blob[:HEADER_BYTES])[_SURVIVORS_FIELD]
    return _decode(blob, spec, min(claimed, spec.size), pages)


def _header_fields(view: memoryview, spec: UpdateSpec) -> tuple:
    """The header's fields; raises `UpdateError` where it is none, or of another version."""
    if view.nbytes < HEADER_BYTES:
        raise UpdateError(
            f"update of {view.nbytes} bytes; the header alone has {HEADER_BYTES}: send it again",
            reason="truncated",
        )
    fields = HEADER.unpack(view[:HEADER_BYTES])
    magic, version = fields[0], fields[1]
    if magic != MAGIC:
        raise UpdateError(f"update begins with {magic!r}, not {MAGIC!r}", reason="malformed")
    if version != spec.version:
        raise UpdateError(
            f"update of codec version {version}; this is {spec.version}: install the same "
            "dare-agg on both ends",
            reason="version",
        )
    return fields


def _settled(view: memoryview, spec: UpdateSpec) -> UpdateSpec:
    """The specification with the keep rates that the update itself brings, where it does.

    Raises `UpdateError` for rates that are none, or that keep more than the plan allows.
    """
    if spec.rates is None or spec.rates.table is not None:
        return spec
    _header_fields(view, spec)
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
    fields = _header_fields(view, spec)
    checksum = fields[-1]
    wanted = _header(spec, survivors, expected - HEADER_BYTES)
    if view[:_CHECKSUM_AT].tobytes() != wanted[:_CHECKSUM_AT]:
        _refuse_header(spec, fields, HEADER.unpack(wanted))
    if view.nbytes != expected:
        raise UpdateError(
            f"update of {view.nbytes} bytes; its plan says {expected}: send it again",
            reason="truncated" if view.nbytes < expected else "trailing",
        )
    if checksum != _checksum(spec, view, pages):
        raise UpdateError("the checksum does not fit the bytes: send it again", reason="checksum")
    payload_view = np.frombuffer(view, np.uint8, offset=begin)
    check_payload(spec.values, payload_view, survivors, pages, spec.most_coded)
    return Update(spec, spec.draw_mask(), payload_view, view.nbytes, survivors, pages)


def _refuse_header(spec: UpdateSpec, fields: tuple, known: tuple) -> None:
    """Say which header field differs from the expected one, worst first."""
    names = (
        "magic", "version", "mask", "values", "flags", "rank", "stride", "stride-of",
        "parameters", "survivors", "payload", "base", "layout", "mask-digest", "context",
    )  # fmt: skip
    theirs, ours = dict(zip(names, fields, strict=False)), dict(zip(names, known, strict=False))
    for name, reason in _HEADER_REASONS.items():
        if theirs[name] != ours[name]:
            raise UpdateError(
                f"update has {name} {_shown(theirs[name])}, its plan says {_shown(ours[name])}; "
                "send the update made for this plan",
                reason=reason,
            )
    raise UpdateError("reserved header bytes are not 0", reason="malformed")


def _shown(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else str(value)
