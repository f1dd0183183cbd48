"""One step of the global model as immutable bytes: what brings version u to version v.

A step names its parent and its child, the round, and how its positions are drawn again; no
index travels. Both ends decode the same values and round them to the same whole grid steps.

Layout of the head, little-endian, followed by the families of masks, the delta group's
payload and (apart, so that it can be counted apart) the dense group's payload::

    magic "DVST" · version u8 · form u8 · values u8 · dense values u8 · round u32
    parent 32 B · child 32 B · key 16 B · families u16 · flags u16
    survivors u64 · payload bytes u64 · dense bytes u64 · checksum 8 B (SHA-256 of all else)
    family: kind u8 · stride u32 · stride-of u32 · first rank u32 · ranks u32 · key 16 B

Version 2 is of masks with keep rates by tensor: the families are followed by u32 tensors, and the
rate table of each family whose kind has bit 7 set.

Forms are rows of `dare_agg.downlink.forms.STEP_FORMS`.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import MASK_KINDS, DropRate
from dare_agg.codec.rates import RateTable, read_table
from dare_agg.downlink.forms import STEP_FORMS
from dare_agg.downlink.grid import Counts, VersionGrid, add_steps
from dare_agg.downlink.lossless import LOSSLESS
from dare_agg.downlink.protocol import DrawnMask
from dare_agg.downlink.step_form import Family, StepHead
from dare_agg.errors import ConfigError, UpdateError

MAGIC = b"DVST"
STEP_VERSION = 1
BY_TENSOR_STEP_VERSION = 2
_HAS_TABLE = 0x80
_COUNT = struct.Struct("<I")
# In all families together, a client each; a small model draws so many in half a second.
MAX_MASKS = 1 << 14
# Strata of all masks together, of keep rates by tensor: some 300 bytes of whoever draws them each.
MAX_STRATA = 1 << 20
HEAD = struct.Struct("<4sBBBBI32s32s16sHHQQQ8s")
FAMILY = struct.Struct("<BIIII16s")
_VALUES = {row.code: row.name for row in VALUE_FORMATS.values()}
_FORMS = {row.code: row for row in STEP_FORMS.values()}


@dataclass(frozen=True)
class Step:
    """A step as it is stored and sent: ``body`` (head and delta payload) and ``dense``."""

    head: StepHead
    body: bytes
    dense: bytes

    @property
    def nbytes(self) -> int:
        """Bytes that travel and are stored: body and dense part."""
        return len(self.body) + len(self.dense)


def families_of(plans: Sequence[DrawnMask]) -> tuple[Family, ...]:
    """Return the masks of the plans, consecutive ranks of one key as one family."""
    groups: dict[tuple[str, DropRate, bytes, RateTable | None], set[int]] = {}
    for plan in plans:
        table = None if plan.rates is None else plan.rates.known
        groups.setdefault((plan.mask, plan.drop_rate, plan.mask_key, table), set()).add(plan.rank)
    found = []
    for (kind, rate, key, table), ranks in groups.items():
        ordered = sorted(ranks)
        first = 0
        for place in range(1, len(ordered) + 1):
            if place == len(ordered) or ordered[place] != ordered[place - 1] + 1:
                found.append(Family(kind, rate, ordered[first], place - first, key, table))
                first = place
    return tuple(sorted(found, key=lambda f: (f.key, f.first, f.kind)))


def write_step(head: StepHead, payload: bytes, dense: bytes) -> Step:
    """Put a step together: head, checksum and both payloads, as it is stored and sent.

    Raises `ConfigError` for more than `MAX_MASKS` masks or `MAX_STRATA` strata.
    """
    return Step(head, head_bytes(head, (payload,), len(payload), dense) + payload, dense)


def head_bytes(head: StepHead, payload: Iterable[bytes], nbytes: int, dense: bytes) -> bytes:
    """What stands before the payload of a step, which comes in pieces, ``nbytes`` in all.

    Raises `ConfigError` for more than `MAX_MASKS` masks or `MAX_STRATA` strata.
    """
    families = b"".join(
        FAMILY.pack(
            MASK_KINDS.index(f.kind) | (_HAS_TABLE if f.table else 0),
            f.drop_rate.numerator,
            f.drop_rate.denominator,
            f.first,
            f.ranks,
            f.key,
        )
        for f in head.families
    )
    tables = [family.table for family in head.families if family.table is not None]
    if tables:
        families += _COUNT.pack(len(tables[0].levels))
        families += b"".join(table.to_bytes() for table in tables)
    if too_many := _too_many(head.families):
        raise ConfigError(
            f"{too_many} make a step: sample fewer clients in a round, or choose the downlink "
            "'full' or one keep rate for all tensors"
        )

    def packed(checksum: bytes) -> bytes:
        return HEAD.pack(
            MAGIC,
            BY_TENSOR_STEP_VERSION if tables else STEP_VERSION,
            STEP_FORMS[head.form].code,
            VALUE_FORMATS[head.values].code,
            VALUE_FORMATS[head.dense_values].code,
            head.round,
            bytes.fromhex(head.parent),
            bytes.fromhex(head.child),
            head.key,
            len(head.families),
            0,
            head.survivors,
            nbytes,
            len(dense),
            checksum,
        )

    return packed(_checksum(packed(bytes(8)), families, *payload, dense)) + families


def chained_step(head: StepHead, payload: bytes, dense: bytes) -> Step:
    """As `write_step`; the child is named by the chain, `chain_name`."""
    return write_step(replace(head, child=chain_name(head, payload, dense)), payload, dense)


def chain_name(head: StepHead, payload: bytes, dense: bytes) -> str:
    """What the version after a step is called: SHA-256 over its parent's name and its bytes.

    Steps are whole numbers: equal chains over an equal base end in equal bits, and no version
    has to be read to be named.
    """
    digest = hashlib.sha256(b"dare-agg chain 1\0" + bytes.fromhex(head.parent))
    digest.update(head_bytes(replace(head, child="00" * 32), (payload,), len(payload), dense))
    digest.update(payload)
    digest.update(dense)
    return digest.hexdigest()


def check_chain(step: Step) -> None:
    """Raise `UpdateError` (reason "checksum") for a step that is not of the child it names.

    A lossless step may be the sum of others, whose name is not to be made again.
    """
    if step.head.form == LOSSLESS.name:
        return
    found = chain_name(step.head, payload_of(step), step.dense)
    if found != step.head.child:
        raise UpdateError(
            f"step to {step.head.child[:12]} leads to {found[:12]}; ask for the version again",
            reason="checksum",
        )


def read_steps(body: bytes, dense: bytes) -> list[Step]:
    """Cut joined steps apart; raises `UpdateError` for anything that is not whole."""
    steps = []
    at = dense_at = 0
    while at < len(body):
        step = _read_step(body, at, dense, dense_at)
        steps.append(step)
        at += len(step.body)
        dense_at += len(step.dense)
    if dense_at != len(dense):
        raise UpdateError(
            f"{len(dense) - dense_at} bytes follow the last step's dense payload",
            reason="trailing",
        )
    return steps


def _read_step(body: bytes, at: int, dense: bytes, dense_at: int) -> Step:
    if len(body) - at < HEAD.size:
        raise _broken(f"step of {len(body) - at} bytes, its head alone has {HEAD.size}")
    raw = HEAD.unpack_from(body, at)
    magic, version, form, values, dense_values, number, parent, child, key = raw[:9]
    families, flags, survivors, payload_size, dense_size, checksum = raw[9:]
    if magic != MAGIC or version not in (STEP_VERSION, BY_TENSOR_STEP_VERSION) or flags:
        raise UpdateError(
            f"step with magic {magic!r}, version {version}; {MAGIC!r}, {STEP_VERSION} and "
            f"{BY_TENSOR_STEP_VERSION} are known: run the same dare-agg on both ends",
            reason="version",
        )
    begin = at + HEAD.size
    rows_end = begin + families * FAMILY.size
    kinds = body[begin : min(rows_end, len(body)) : FAMILY.size]
    with_table = sum(kind >= _HAS_TABLE for kind in kinds)
    tensors = tables_size = 0
    if version == BY_TENSOR_STEP_VERSION:
        if len(body) - rows_end < _COUNT.size:
            raise _broken(f"step of {families} mask families ends before their keep rates")
        (tensors,) = _COUNT.unpack_from(body, rows_end)
        tables_size = _COUNT.size + with_table * (_COUNT.size + tensors)
    if bool(with_table) != (version == BY_TENSOR_STEP_VERSION):
        raise UpdateError(f"step of version {version} with {with_table} tables of keep rates")
    stop = rows_end + tables_size + payload_size
    if stop > len(body) or dense_at + dense_size > len(dense):
        raise _broken(
            f"step announces {stop - at} and {dense_size} bytes, {len(body) - at} and "
            f"{len(dense) - dense_at} came"
        )
    mine, my_dense = body[at:stop], dense[dense_at : dense_at + dense_size]
    rest = mine[HEAD.size :]
    if _checksum(mine[: HEAD.size - 8], bytes(8), rest, my_dense) != checksum:
        raise UpdateError("step's checksum does not fit its bytes", reason="checksum")
    if form not in _FORMS or values not in _VALUES or dense_values not in _VALUES:
        raise UpdateError(f"step of form {form}, values {values}", reason="malformed")
    found = []
    table_at = families * FAMILY.size + _COUNT.size
    for place in range(families):
        kind, num, den, first, ranks, mask_key = FAMILY.unpack_from(rest, place * FAMILY.size)
        table = None
        if kind >= _HAS_TABLE:
            kind -= _HAS_TABLE
            table = read_table(rest[table_at : table_at + _COUNT.size + tensors], tensors)
            table_at += table.nbytes
        if kind >= len(MASK_KINDS) or not ranks or (table and MASK_KINDS[kind] != "stratified"):
            raise UpdateError(f"mask family of kind {kind}, {ranks} ranks", reason="malformed")
        found.append(Family(MASK_KINDS[kind], DropRate(num, den), first, ranks, mask_key, table))
    # Each mask is drawn again: a head of 200 bytes could ask for billions.
    if too_many := _too_many(found):
        raise UpdateError(f"step of {too_many} can be drawn", reason="mask")
    if _FORMS[form].masked and not found:
        raise UpdateError("step without the masks it is made of", reason="malformed")
    head = StepHead(
        _FORMS[form].name,
        _VALUES[values],
        _VALUES[dense_values],
        number,
        parent.hex(),
        child.hex(),
        key,
        tuple(found),
        survivors,
    )
    return Step(head, mine, my_dense)


def _too_many(families: Sequence[Family]) -> str:
    """What is too much to be drawn again, and how much of it there may be; "" for nothing."""
    masks = sum(family.ranks for family in families)
    if masks > MAX_MASKS:
        return f"{masks} masks, at most {MAX_MASKS}"
    strata = sum(f.ranks * len(f.table.levels) for f in families if f.table is not None)
    if strata > MAX_STRATA:
        return f"masks of {strata} strata by tensor, at most {MAX_STRATA}"
    return ""


def _broken(what: str) -> UpdateError:
    return UpdateError(f"{what}; ask for the version again", reason="truncated")


def _checksum(*parts: bytes) -> bytes:
    digest = hashlib.sha256(b"dare-agg step 1\0")
    for part in parts:
        digest.update(part)
    return digest.digest()[:8]


def payload_of(step: Step) -> bytes:
    """The delta group's payload of a step."""
    families = step.head.families
    tables = [family.table.nbytes for family in families if family.table is not None]
    head = HEAD.size + len(families) * FAMILY.size + (_COUNT.size if tables else 0) + sum(tables)
    return step.body[head:]


def dense_head(head: StepHead, size: int) -> StepHead:
    """The head as it stands for the dense group: all its values, in its own format and key."""
    key = hashlib.sha256(b"dare-agg dense step\0" + head.key).digest()[:16]
    return replace(head, values=head.dense_values, key=key, families=(), survivors=size)


def apply_step(
    step: Step, grid: VersionGrid, counts: Counts, dense_grid: VersionGrid, dense_counts: Counts
) -> None:
    """Add a step's integers to both groups' counts, in place.

    Raises `UpdateError` for a step that does not fit the model, `StateError` beyond int32.
    """
    head = step.head
    form = STEP_FORMS[head.form]
    for positions, steps in form.decode(head, payload_of(step), grid):
        # Counts that stay need not be touched: they may lie in a file.
        moving = np.flatnonzero(steps)
        add_steps(counts, positions[moving], steps[moving])
    apply_dense(step, dense_grid, dense_counts)


def apply_dense(step: Step, grid: VersionGrid, counts: Counts) -> None:
    """As `apply_step`, of the dense group alone."""
    if grid.size and step.dense:
        form, own = STEP_FORMS[step.head.form].of_dense, dense_head(step.head, grid.size)
        for positions, steps in form.decode(own, step.dense, grid):
            add_steps(counts, positions, steps)
