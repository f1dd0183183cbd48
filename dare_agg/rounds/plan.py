"""The round plan: everything the server asks of one client in one round.

The server draws one secret a round and derives every key from it, so no client can pick a
favourable mask or rotation. Clients with the same drop rate form a class: inside it, masks
are rotated by rank and disjoint for the first ⌊1/(1−p)⌋ clients; the next ones get another
key. The plan's digest is bound into the update, which therefore fits this plan alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.derive import derive_key
from dare_agg.codec.fitted_rates import fitted_rates
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.codec.rates import TensorRates, read_table
from dare_agg.codec.update import UpdateSpec
from dare_agg.codec.update_spec import CODEC_VERSION
from dare_agg.errors import ConfigError, LayoutError, UpdateError
from dare_agg.rounds.same_code import package_fingerprint
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.layout import MAX_TENSORS, Layout
from dare_agg.vectors.model import ModelRef

KEY_BYTES = 16
Plain = int | float | bool | str | bytes | list[str]


@dataclass(frozen=True)
class RoundPlan:
    """One client's orders for one round (see the module's text).

    ``client`` is its place in the round (0, 1, …), which fixes the order of merging;
    ``rank`` its offset in the mask family of ``mask_key``. ``terms`` are the round's, with the
    client's own drop rate and value format. ``told`` are keep rates by tensor as the client is
    told them. ``rates`` are those of the update, once it was read; no part of what is sent.
    """

    codec: int
    package: str
    run: str
    round: int
    client: int
    model: ModelRef
    terms: UpdateTerms
    mask_key: bytes
    rank: int
    values_key: bytes
    dense_values_key: bytes
    told: bytes = b""
    rates: TensorRates | None = field(default=None, compare=False)

    @property
    def drop_rate(self) -> DropRate:
        return self.terms.drop_rate

    @property
    def keep(self) -> float:
        """The share of elements that survive in the update, or may where it was not read."""
        if self.rates is None or self.rates.table is None or not self.model.size:
            return self.drop_rate.keep
        counts = self.rates.table.counts(np.array(self.rates.sizes, np.int64))
        return float(counts.sum()) / self.model.size

    @property
    def mask(self) -> str:
        return self.terms.mask

    def digest(self) -> bytes:
        """SHA-256 over the plan's canonical text; equal plans have equal digests."""
        record = {
            key: value.hex() if isinstance(value, bytes) else value
            for key, value in self.to_record().items()
        }
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"dare-agg plan 1\0" + text.encode()).digest()

    def spec(self, layout: Layout | None = None) -> UpdateSpec:
        """What the update of the delta group must be; ``layout`` is that group's.

        It is needed where each tensor has a keep rate of its own. Raises `LayoutError` without,
        and `UpdateError` for rates that do not fit it.
        """
        rates = None
        if self.terms.keep_rates != "uniform":
            if layout is None or layout.size != self.model.size:
                raise LayoutError(
                    "keep rates by tensor need the layout of the model's delta group: "
                    "plan.spec(layout)"
                )
            table = read_table(self.told, len(layout.sizes)) if self.told else None
            rates = TensorRates(layout.sizes, table, told=table is not None)
            if table is not None:
                kept = rates.survivors
                most = rates.most_survivors(self.drop_rate.survivors(self.model.size))
                if kept > most:
                    raise _bad_plan(
                        f"the keep rates told keep {kept} elements, its drop rate allows {most}"
                    )
        return UpdateSpec(
            size=self.model.size,
            drop_rate=self.drop_rate,
            mask=self.mask,
            mask_key=self.mask_key,
            values_key=self.values_key,
            rank=self.rank,
            values=self.terms.values,
            base=self.model.base,
            layout=self.model.layout,
            rescale=self.terms.rescale,
            context=self.digest(),
            rates=rates,
        )

    def dense_spec(self) -> UpdateSpec | None:
        """What the update of the dense group must be, or None where there is none."""
        if not self.model.dense_size:
            return None
        return UpdateSpec(
            size=self.model.dense_size,
            drop_rate=parse_drop_rate(0),
            mask="stratified",
            mask_key=bytes(KEY_BYTES),
            values_key=self.dense_values_key,
            rank=0,
            values=self.terms.dense_values,
            base=self.model.dense_base,
            layout=self.model.dense_layout,
            rescale=True,
            context=hashlib.sha256(b"dense\0" + self.digest()).digest(),
        )

    def to_record(self) -> dict[str, Plain]:
        """Return the plan as plain values; empty ones are left out."""
        record: dict[str, Plain] = {}
        for key, (_, path) in _FIELDS.items():
            value = attrgetter(path)(self)
            record[key] = list(value) if isinstance(value, tuple) else value
        if not self.terms.statistics:
            del record["statistics-values"]
        if self.terms.keep_rates == "uniform":
            del record["keep-rates"]
        if not self.terms.directions:
            del record["directions"], record["direction-bits"]
        # Flower's byte counters raise on empty strings and lists.
        return {key: value for key, value in record.items() if value not in ("", b"", [])}


# Key of the record → its type, and where it stands in a plan.
_FIELDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "codec": (int, "codec"),
    "package": (str, "package"),
    "run": (str, "run"),
    "round": (int, "round"),
    "client": (int, "client"),
    "base": (str, "model.base"),
    "layout": (str, "model.layout"),
    "size": (int, "model.size"),
    "dense-base": (str, "model.dense_base"),
    "dense-layout": (str, "model.dense_layout"),
    "dense-size": (int, "model.dense_size"),
    "stride": (int, "terms.drop_rate.numerator"),
    "stride-of": (int, "terms.drop_rate.denominator"),
    "mask": (str, "terms.mask"),
    "mask-key": (bytes, "mask_key"),
    "rank": (int, "rank"),
    "values": (str, "terms.values"),
    "values-key": (bytes, "values_key"),
    "dense-values": (str, "terms.dense_values"),
    "dense-values-key": (bytes, "dense_values_key"),
    "max-weight": ((int, float), "terms.max_weight"),
    "rescale": (bool, "terms.rescale"),
    "dense": (list, "terms.dense"),
    "exclude": (list, "terms.exclude"),
    "statistics": (str, "terms.statistics"),
    "statistics-values": (str, "terms.statistics_values"),
    "keep-rates": (str, "terms.keep_rates"),
    "told-rates": (bytes, "told"),
    "directions": (int, "terms.directions"),
    "direction-bits": (int, "terms.direction_bits"),
}
# Bytes of the keep rates of the most tensors.
_MAX_TOLD = 4 + MAX_TENSORS
# What an absent field means; the others are needed.
_ABSENT: Mapping[str, str | bytes | int | list[str]] = {
    "run": "", "dense-base": "", "dense-layout": "", "dense": [], "exclude": [],
    "statistics": "", "statistics-values": UpdateTerms.statistics_values,
    "keep-rates": UpdateTerms.keep_rates, "told-rates": b"",
    "directions": 0, "direction-bits": UpdateTerms.direction_bits,
}  # fmt: skip


def plan_from_record(record: Mapping[str, object]) -> RoundPlan:
    """Read a plan back from `RoundPlan.to_record`; nothing in it is trusted.

    Raises `UpdateError` (reason "plan") naming the first field that is missing, of another
    type or out of bounds.
    """
    parts: dict[str, dict[str, Any]] = {"": {}, "model": {}, "terms": {}, "terms.drop_rate": {}}
    for key, (kind, path) in _FIELDS.items():
        if key not in record and key not in _ABSENT:
            raise _bad_plan(f"field {key!r} is missing")
        value = record.get(key, _ABSENT.get(key))
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise _bad_plan(f"field {key!r} is a {type(value).__name__}")
        most = _MAX_TOLD if key == "told-rates" else 4096
        if isinstance(value, str | bytes | list) and len(value) > most:
            raise _bad_plan(f"field {key!r} has length {len(value)}, at most {most} are allowed")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise _bad_plan(f"field {key!r} must hold text only")
        if isinstance(value, int) and value < 0:
            raise _bad_plan(f"field {key!r} is {value}, at least 0 is allowed")
        if isinstance(value, bytes) and len(value) != KEY_BYTES and key != "told-rates":
            raise _bad_plan(f"field {key!r} needs {KEY_BYTES} bytes")
        part, _, name = path.rpartition(".")
        parts[part][name] = value
    try:
        drop_rate = DropRate(**parts["terms.drop_rate"])
        terms = UpdateTerms(drop_rate=drop_rate, **parts["terms"])
    except ConfigError as error:
        raise _bad_plan(str(error)) from error
    return RoundPlan(model=ModelRef(**parts["model"]), terms=terms, **parts[""])


def _bad_plan(what: str) -> UpdateError:
    return UpdateError(
        f"round plan: {what}; run the same dare-agg on server and clients", reason="plan"
    )


def make_plans(
    round_secret: bytes,
    round_number: int,
    clients: Sequence[ClientTerms | None],
    terms: UpdateTerms,
    model: ModelRef,
    *,
    run: str = "",
    shared_mask: bool = False,
    layout: Layout | None = None,
    levels: bytes = b"",
) -> list[RoundPlan]:
    """Make the plans of one round, one per client, in the order of merging.

    ``clients`` gives each client's own terms, or None for those of the round. Same secret,
    round and clients → same plans. With ``shared_mask`` every client of a class has rank 0
    (secure sums need it). ``levels`` say how much each tensor of ``layout``, the delta group's,
    changed in the round before, for keep rates "last"; without them clients find their own.

    Raises `ConfigError` for no client.
    """
    if not clients:
        raise ConfigError("a round needs at least one client")
    blank = RoundPlan(
        codec=CODEC_VERSION,
        package=package_fingerprint(),
        run=run,
        round=round_number,
        client=0,
        model=model,
        terms=terms,
        mask_key=bytes(KEY_BYTES),
        rank=0,
        values_key=bytes(KEY_BYTES),
        dense_values_key=bytes(KEY_BYTES),
    )
    met: dict[tuple[int, int], int] = {}
    tables: dict[tuple[DropRate, str], bytes] = {}
    plans = []
    for client, own in enumerate(clients):
        agreed = (
            terms if own is None else replace(terms, drop_rate=own.drop_rate, values=own.values)
        )
        stride = (agreed.drop_rate.numerator, agreed.drop_rate.denominator)
        place = met.get(stride, 0)
        met[stride] = place + 1
        ranks = stride[0] // stride[1]
        family, offset = (0, 0) if shared_mask else divmod(place, ranks)
        told = b""
        if agreed.keep_rates != "uniform":
            # Each tensor has families of its own: ranks are counted through.
            family, offset = 0, 0 if shared_mask else place
        if agreed.keep_rates == "last" and layout is not None and len(levels) == len(layout.sizes):
            kind = (agreed.drop_rate, agreed.values)
            if kind not in tables:
                rates = fitted_rates(layout.sizes, levels, *kind, told=True)
                tables[kind] = rates.known.to_bytes()
            told = tables[kind]
        plans.append(
            replace(
                blank,
                client=client,
                told=told,
                terms=agreed,
                mask_key=derive_key(round_secret, "mask", round_number, *stride, family),
                rank=offset,
                values_key=derive_key(round_secret, "values", round_number, client),
                dense_values_key=derive_key(round_secret, "dense-values", round_number, client),
            )
        )
    return plans
