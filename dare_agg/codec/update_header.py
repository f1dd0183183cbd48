"""The header in front of an update: how it is written, compared and sealed by a checksum.

It proves that the sender meant the spec that the receiver has.
"""

from __future__ import annotations

import struct

from cryptography.hazmat.primitives.poly1305 import Poly1305

from dare_agg.codec.derive import derive_key
from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import MASK_KINDS
from dare_agg.codec.update_spec import MAX_CONTEXT_BYTES, UpdateSpec
from dare_agg.errors import UpdateError
from dare_agg.files.pages import Pages

MAGIC = b"DARE"
HEADER = struct.Struct("<4sHBBB3xIIIQQQ8s8s8s32s16s")
HEADER_BYTES = HEADER.size
CHECKSUM_BYTES = 16
CHECKSUM_AT = HEADER_BYTES - CHECKSUM_BYTES
_CHECKSUM_PIECE = 1 << 24
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


def survivors_claimed(view: memoryview) -> int:
    """How many survivors a whole header claims, unchecked."""
    claimed: int = HEADER.unpack(view[:HEADER_BYTES])[_SURVIVORS_FIELD]
    return claimed


def pack_header(spec: UpdateSpec, survivors: int, payload: int) -> bytes:
    """The header of an update of ``payload`` bytes behind it, its checksum not yet there."""
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


def checksum_of(spec: UpdateSpec, blob: memoryview, pages: Pages | None = None) -> bytes:
    """Poly1305 over the update with its checksum field left out, under a key of its own.

    Twenty times as fast as SHA-256. Inside a round, who does not have the plan cannot forge it.
    """
    digest = Poly1305(derive_key(spec.values_key, "update checksum", length=32))
    digest.update(blob[:CHECKSUM_AT])
    for at in range(HEADER_BYTES, blob.nbytes, _CHECKSUM_PIECE):
        piece = blob[at : at + _CHECKSUM_PIECE]
        digest.update(piece)
        if pages is not None:
            pages.passed(piece.nbytes)
    return digest.finalize()


def header_fields(view: memoryview, spec: UpdateSpec) -> tuple:
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


def check_header(view: memoryview, spec: UpdateSpec, survivors: int, payload: int) -> None:
    """Raise `UpdateError` for a header that is not `pack_header`'s, but for its checksum.

    It says which field differs from the expected one, worst first.
    """
    fields = header_fields(view, spec)
    wanted = pack_header(spec, survivors, payload)
    if view[:CHECKSUM_AT].tobytes() == wanted[:CHECKSUM_AT]:
        return
    known = HEADER.unpack(wanted)
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
