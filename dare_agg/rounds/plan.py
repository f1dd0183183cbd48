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
from dataclasses import dataclass, fields, replace

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.codec.update import CODEC_VERSION, UpdateSpec
from dare_agg.errors import ConfigError, UpdateError
from dare_agg.rounds.same_code import package_fingerprint
from dare_agg.vectors.model import ModelRef

KEY_BYTES = 16


@dataclass(frozen=True)
class RoundPlan:
    """One client's orders for one round (see the module's text).

    ``client`` is its place in the round (0, 1, …), which fixes the order of merging;
    ``rank`` its offset in the mask family of ``mask_key``. ``max_weight`` bounds the weight
    it may claim. ``dense`` and ``exclude`` are the patterns of the two other groups.
    ``statistics`` is the kind to be sent along ("fisher", "gram" or none) in the value format
    ``statistics_values``.
    """

    codec: int
    package: str
    run: str
    round: int
    client: int
    model: ModelRef
    drop_rate: DropRate
    mask: str
    mask_key: bytes
    rank: int
    values: str
    values_key: bytes
    dense_values: str
    dense_values_key: bytes
    max_weight: float
    rescale: bool = True
    dense: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    statistics: str = ""
    statistics_values: str = ""

    def digest(self) -> bytes:
        """SHA-256 over the plan's canonical text; equal plans have equal digests."""
        record = {
            key: value.hex() if isinstance(value, bytes) else value
            for key, value in self.to_record().items()
        }
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(b"dare-agg plan 1\0" + text.encode()).digest()

    def spec(self) -> UpdateSpec:
        """What the update of the delta group must be."""
        return UpdateSpec(
            size=self.model.size,
            drop_rate=self.drop_rate,
            mask=self.mask,
            mask_key=self.mask_key,
            values_key=self.values_key,
            rank=self.rank,
            values=self.values,
            base=self.model.base,
            layout=self.model.layout,
            rescale=self.rescale,
            context=self.digest(),
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
            values=self.dense_values,
            base=self.model.dense_base,
            layout=self.model.dense_layout,
            rescale=True,
            context=hashlib.sha256(b"dense\0" + self.digest()).digest(),
        )

    def to_record(self) -> dict[str, int | float | bool | str | bytes | list[str]]:
        """Return the plan as plain values; empty ones are left out."""
        record: dict[str, int | float | bool | str | bytes | list[str]] = {
            "codec": self.codec,
            "package": self.package,
            "run": self.run,
            "round": self.round,
            "client": self.client,
            "base": self.model.base,
            "layout": self.model.layout,
            "size": self.model.size,
            "dense-base": self.model.dense_base,
            "dense-layout": self.model.dense_layout,
            "dense-size": self.model.dense_size,
            "stride": self.drop_rate.numerator,
            "stride-of": self.drop_rate.denominator,
            "mask": self.mask,
            "mask-key": self.mask_key,
            "rank": self.rank,
            "values": self.values,
            "values-key": self.values_key,
            "dense-values": self.dense_values,
            "dense-values-key": self.dense_values_key,
            "max-weight": self.max_weight,
            "rescale": self.rescale,
            "dense": list(self.dense),
            "exclude": list(self.exclude),
            "statistics": self.statistics,
            "statistics-values": self.statistics_values,
        }
        # Flower's byte counters raise on empty strings and lists.
        return {key: value for key, value in record.items() if value != "" and value != []}


_RECORD_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "codec": int,
    "package": str,
    "run": str,
    "round": int,
    "client": int,
    "base": str,
    "layout": str,
    "size": int,
    "dense-base": str,
    "dense-layout": str,
    "dense-size": int,
    "stride": int,
    "stride-of": int,
    "mask": str,
    "mask-key": bytes,
    "rank": int,
    "values": str,
    "values-key": bytes,
    "dense-values": str,
    "dense-values-key": bytes,
    "max-weight": (int, float),
    "rescale": bool,
    "dense": list,
    "exclude": list,
    "statistics": str,
    "statistics-values": str,
}
_OPTIONAL: Mapping[str, str | list[str]] = {
    "run": "", "dense-base": "", "dense-layout": "", "dense": [], "exclude": [],
    "statistics": "", "statistics-values": "",
}  # fmt: skip


def plan_from_record(record: Mapping[str, object]) -> RoundPlan:
    """Read a plan back from `RoundPlan.to_record`; nothing in it is trusted.

    Raises `UpdateError` (reason "plan") naming the first field that is missing, of another
    type or out of bounds.
    """
    values: dict[str, object] = {}
    for key, kind in _RECORD_TYPES.items():
        if key not in record:
            if key not in _OPTIONAL:
                raise _bad_plan(f"field {key!r} is missing")
            values[key] = _OPTIONAL[key]
            continue
        value = record[key]
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise _bad_plan(f"field {key!r} is a {type(value).__name__}")
        if isinstance(value, str | bytes | list) and len(value) > 4096:
            raise _bad_plan(f"field {key!r} has length {len(value)}, at most 4096 are allowed")
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise _bad_plan(f"field {key!r} must hold text only")
        if isinstance(value, int) and value < 0:
            raise _bad_plan(f"field {key!r} is {value}, at least 0 is allowed")
        values[key] = value
    for key in ("mask-key", "values-key", "dense-values-key"):
        if len(values[key]) != KEY_BYTES:  # type: ignore[arg-type]
            raise _bad_plan(f"field {key!r} needs {KEY_BYTES} bytes")
    try:
        drop_rate = DropRate(values["stride"], values["stride-of"])  # type: ignore[arg-type]
    except ConfigError as error:
        raise _bad_plan(str(error)) from error
    model = ModelRef(
        *(
            values[key]  # type: ignore[arg-type]
            for key in ("base", "layout", "size", "dense-base", "dense-layout", "dense-size")
        )
    )
    rest = {
        field.name: values[field.name.replace("_", "-")]
        for field in fields(RoundPlan)
        if field.name not in ("model", "drop_rate", "dense", "exclude", "max_weight")
    }
    return RoundPlan(
        model=model,
        drop_rate=drop_rate,
        max_weight=float(values["max-weight"]),  # type: ignore[arg-type]
        dense=tuple(values["dense"]),  # type: ignore[arg-type]
        exclude=tuple(values["exclude"]),  # type: ignore[arg-type]
        **rest,  # type: ignore[arg-type]
    )


def _bad_plan(what: str) -> UpdateError:
    return UpdateError(
        f"round plan: {what}; run the same dare-agg on server and clients", reason="plan"
    )


@dataclass(frozen=True)
class PlanSettings:
    """The part of a run's settings that plans carry."""

    drop_rate: DropRate
    values: str = "b1"
    mask: str = "stratified"
    dense_values: str = "f16"
    max_weight: float = 1e7
    rescale: bool = True
    shared_mask: bool = False
    dense: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    statistics: str = ""
    statistics_values: str = ""


def make_plans(
    round_secret: bytes,
    round_number: int,
    clients: Sequence[ClientTerms | None],
    settings: PlanSettings,
    model: ModelRef,
    *,
    run: str = "",
) -> list[RoundPlan]:
    """Make the plans of one round, one per client, in the order of merging.

    ``clients`` gives each client's own terms, or None for the settings' drop rate and value
    format. Same secret, round and clients → same plans. With ``shared_mask`` every client
    of a class has rank 0 (secure sums need it).
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
        drop_rate=settings.drop_rate,
        mask=settings.mask,
        mask_key=bytes(KEY_BYTES),
        rank=0,
        values=settings.values,
        values_key=bytes(KEY_BYTES),
        dense_values=settings.dense_values,
        dense_values_key=bytes(KEY_BYTES),
        max_weight=settings.max_weight,
        rescale=settings.rescale,
        dense=settings.dense,
        exclude=settings.exclude,
        statistics=settings.statistics,
        statistics_values=settings.statistics_values,
    )
    met: dict[tuple[int, int], int] = {}
    plans = []
    for client, own in enumerate(clients):
        terms = own or ClientTerms(settings.drop_rate, settings.values)
        stride = (terms.drop_rate.numerator, terms.drop_rate.denominator)
        place = met.get(stride, 0)
        met[stride] = place + 1
        ranks = stride[0] // stride[1]
        family, offset = (0, 0) if settings.shared_mask else divmod(place, ranks)
        plans.append(
            replace(
                blank,
                client=client,
                drop_rate=terms.drop_rate,
                values=terms.values,
                mask_key=derive_key(round_secret, "mask", round_number, *stride, family),
                rank=offset,
                values_key=derive_key(round_secret, "values", round_number, client),
                dense_values_key=derive_key(round_secret, "dense-values", round_number, client),
            )
        )
    return plans
