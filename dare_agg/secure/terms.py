"""The terms of one secure sum: everything public that both sides must agree on.

Their digest, the session, goes into every key, signature and associated data, stage by
stage, so that parties who were shown different terms share no key: their masks do not cancel
and their signatures do not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from dare_agg.codec.derive import derive_key
from dare_agg.codec.directions import MAX_RANK
from dare_agg.codec.mask import DropRate, Mask
from dare_agg.codec.rates import TensorRates, read_table
from dare_agg.errors import ConfigError, ProtocolError, UpdateError
from dare_agg.privacy.shares import MOST_VARIANCE
from dare_agg.secure.aggregate import TRAILER_WORDS
from dare_agg.secure.aggregates import AGGREGATES
from dare_agg.secure.encoding import (
    DIGEST_BYTES,
    Reader,
    blob,
    f64,
    identifiers,
    texts,
    u8,
    u32,
    u64,
)
from dare_agg.secure.graph import COLLUDING, COMPLETE_UP_TO, degree_for, share_threshold_for
from dare_agg.secure.packing import Quantiser
from dare_agg.secure.roster import MAX_MEMBERS
from dare_agg.secure.sketch import SketchPlan, sketch_words
from dare_agg.vectors.layout import MAX_TENSORS, Layout

PROTOCOL_VERSION = 2
MIN_PARTIES = 3
MAX_WORDS = 1 << 28
MAX_GROUPS = MAX_MEMBERS // MIN_PARTIES
WEIGHTINGS = ("equal", "examples")
MAX_PATTERNS, MAX_PATTERN_BYTES = 64, 256
# Sums of models that parties already have: nothing is trained.
NO_TRAINING = bytes(32)
_MAX_TERMS_BYTES = (
    4 * MAX_MEMBERS + 1024 + 2 * MAX_PATTERNS * (MAX_PATTERN_BYTES + 4) + 9 * MAX_TENSORS
)


@dataclass(frozen=True)
class SecureTerms:
    """What is summed, by whom, under which bounds.

    ``cohort`` are roster ids, ascending. At least ``threshold`` parties must stay to the
    end; each secret is shared among ``degree`` neighbours and its owner, and
    ``share_threshold`` of those recover it. ``base`` and ``layout`` are fingerprints (hex).
    ``weighting`` "examples" weighs a mean by the examples, at least ``min_weight`` and at most
    ``max_weight``, summed in secret. ``dense`` values beside the survivors are summed whole (a
    common head); ``base`` and ``layout`` then name both parts. ``dense_patterns`` and
    ``exclude`` are the patterns that cut the model into these parts. ``training`` is the
    digest of everything that enters the training (`dare_agg.secure.training`), `NO_TRAINING`
    where nothing is trained. Where the aggregate sums sketches of Gram matrices
    (`dare_agg.secure.sketch`), each has so many ``directions`` a party, and ``sketch`` values.
    Where its parties add noise, each adds so much ``variance``, and the run promises its members
    ``epsilon`` at ``delta`` in all rounds together; ``clip`` is a vector's norm then.
    The cohort is of one of so many ``groups`` of the roster (`dare_agg.secure.groups`), whose sums
    of a round lie on one mask. With ``rates`` each tensor is kept at its own rate, and the drop
    rate bounds how much is kept in all.
    """

    run: str
    round: int
    roster: bytes
    cohort: tuple[int, ...]
    threshold: int
    degree: int
    share_threshold: int
    base: str
    layout: str
    size: int
    drop_rate: DropRate
    aggregate: str
    bits: int
    clip: float
    weighting: str = "equal"
    min_weight: float = 1.0
    max_weight: float = 1.0
    dense: int = 0
    dense_patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    training: bytes = NO_TRAINING
    directions: int = 0
    sketch: int = 0
    groups: int = 1
    variance: int = 0
    epsilon: float = 0.0
    delta: float = 0.0
    rates: TensorRates | None = None

    def __post_init__(self) -> None:
        n = len(self.cohort)
        _check(len(self.run.encode()) <= 128, f"run name of {len(self.run)} characters", "128")
        _check(0 <= self.round < 1 << 32, f"round {self.round}", "0 to 2**32 - 1")
        _check(len(self.roster) == DIGEST_BYTES, "roster digest", "32 bytes")
        _check(MIN_PARTIES <= n <= MAX_MEMBERS, f"{n} parties", f"{MIN_PARTIES} to {MAX_MEMBERS}")
        _check(
            all(a < b for a, b in pairwise(self.cohort)),
            "cohort",
            "strictly ascending ids",
        )
        _check(
            self.threshold >= MIN_PARTIES and n // 2 < self.threshold <= n,
            f"threshold {self.threshold} of {n} parties",
            f"more than half, at least {MIN_PARTIES}, at most all: else a server could unmask "
            "two different sets",
        )
        _check(
            self.degree == n - 1
            or (n > COMPLETE_UP_TO and 2 <= self.degree < n - 1 and self.degree % 2 == 0),
            f"degree {self.degree} of {n} parties",
            f"n - 1 up to {COMPLETE_UP_TO} parties, an even number below beyond",
        )
        least = self.threshold if self.degree == n - 1 else share_threshold_for(self.degree)
        _check(
            least <= self.share_threshold <= self.degree + 1,
            f"share threshold {self.share_threshold}",
            f"{least} to {self.degree + 1}",
        )
        for what, value in (("base", self.base), ("layout", self.layout)):
            _check(
                len(value) == 64 and not set(value) - set("0123456789abcdef"),
                f"{what} {value[:70]!r}",
                "64 hexadecimal digits",
            )
        _check(0 < self.size < 1 << 40, f"size {self.size}", "1 to 2**40 - 1")
        _check(0 <= self.dense < MAX_WORDS, f"dense {self.dense}", f"0 to {MAX_WORDS - 1}")
        _check(0 <= self.sketch < MAX_WORDS, f"sketch {self.sketch}", f"0 to {MAX_WORDS - 1}")
        if self.rates is not None:
            _check(
                sum(self.rates.sizes) == self.size,
                f"keep rates of {sum(self.rates.sizes)} elements",
                f"as many as the size, {self.size},",
            )
            uniform = self.drop_rate.survivors(self.size)
            _check(
                0 < self.survivors <= self.rates.most_survivors(uniform),
                f"keep rates of {self.survivors} survivors",
                f"1 to {self.rates.most_survivors(uniform)}, which the drop rate allows,",
            )
            _check(not self.variance, "keep rates by tensor with noise", "one rate for all")
        _check(self.words <= MAX_WORDS, f"{self.words} words", f"at most {MAX_WORDS}: raise p")
        row = AGGREGATES[self.quantiser.aggregate]  # with bounds of its own
        _check(self.weighting in WEIGHTINGS, f"weighting {self.weighting!r}", ", ".join(WEIGHTINGS))
        _check(
            self.weighting == "equal" or row.weighable,
            f"weighting by examples with {row.title}",
            f"equal: {row.title} counts parties",
        )
        _check(
            row.sketches == (self.sketch > 0) == (1 <= self.directions <= MAX_RANK),
            f"{self.directions} directions and a sketch of {self.sketch} with {row.title}",
            f"1 to {MAX_RANK} and a sketch above 0" if row.sketches else "none",
        )
        _check(
            0 <= self.variance <= MOST_VARIANCE,
            f"noise of variance {self.variance}",
            f"0 to {MOST_VARIANCE}",
        )
        _check(
            (0 < self.epsilon < float("inf") and 0 < self.delta < 1)
            if row.noised
            else self.epsilon == self.delta == 0,
            f"privacy of ε = {self.epsilon} at δ = {self.delta} with {row.title}",
            "numbers above 0, δ below 1" if row.noised else "none",
        )
        _check(
            0 < self.min_weight <= self.max_weight < 1 << 53,
            f"weights from {self.min_weight} to {self.max_weight}",
            "above 0, at most 2**53, and the lower one first",
        )
        _check(
            self.weighting == "examples" or self.min_weight == self.max_weight,
            f"equal weights from {self.min_weight} to {self.max_weight}",
            "one weight for all",
        )
        for patterns in (self.dense_patterns, self.exclude):
            _check(len(patterns) <= MAX_PATTERNS, f"{len(patterns)} patterns", f"{MAX_PATTERNS}")
            _check(
                all(0 < len(text.encode()) <= MAX_PATTERN_BYTES for text in patterns),
                "a pattern",
                f"1 to {MAX_PATTERN_BYTES} bytes",
            )
        _check(len(self.training) == DIGEST_BYTES, "training digest", "32 bytes")
        _check(1 <= self.groups <= MAX_GROUPS, f"{self.groups} groups", f"1 to {MAX_GROUPS}")
        _check(
            self.groups == 1 or (n <= COMPLETE_UP_TO and self.aggregate == "mean"),
            f"{row.title} over a group of {n} parties",
            f"the mean, and groups of at most {COMPLETE_UP_TO}",
        )

    @cached_property
    def members(self) -> frozenset[int]:
        """The cohort, to look parties up in."""
        return frozenset(self.cohort)

    @cached_property
    def quantiser(self) -> Quantiser:
        """The fixed point that these terms fix."""
        return Quantiser(self.aggregate, self.bits, self.clip, len(self.cohort), self.variance)

    @property
    def survivors(self) -> int:
        """Elements of the delta that are summed: one a stratum."""
        if self.rates is not None:
            return self.rates.survivors
        return self.drop_rate.survivors(self.size)

    def check_layout(self, layout: Layout) -> None:
        """Raise `ProtocolError` (reason "terms") for keep rates of other tensors than its own."""
        if self.rates is not None and self.rates.sizes != layout.sizes:
            raise ProtocolError(
                f"the terms have keep rates of {len(self.rates.sizes)} tensors, and this model's "
                f"{len(layout.sizes)} have other sizes; run the same dare-agg at every party",
                reason="terms",
            )

    @property
    def values(self) -> int:
        """Values a party contributes: the survivors, the dense part, then the sketch."""
        return self.survivors + self.dense + self.sketch

    def sketch_plan(self, layout: Layout) -> SketchPlan:
        """The sketches over ``layout``, the delta's.

        Raises `ConfigError` for a model without Linears, `ProtocolError` (reason "terms") where it
        has another sketch than these terms say.
        """
        plan = SketchPlan(layout, self.directions, len(self.cohort), self.clip, self.session)
        words = sketch_words(layout, self.directions, plan.parties)
        if words != self.sketch:
            raise ProtocolError(
                f"the terms have a sketch of {self.sketch} values, this model's has {words}; run "
                "the same dare-agg at every party",
                reason="terms",
            )
        return plan

    @property
    def words(self) -> int:
        """Words a party sends: its values, its weight and its clipped share."""
        return self.values + TRAILER_WORDS

    @property
    def weight_units(self) -> tuple[int, int]:
        """The least and the largest weight word of a party; the latter is ``max_weight``."""
        top = self.quantiser.top
        return max(1, round(self.min_weight / self.max_weight * top)), top

    def encode(self) -> bytes:
        """Canonical bytes; equal terms have equal bytes."""
        return b"".join(
            (
                u8(PROTOCOL_VERSION),
                blob(self.run.encode()),
                u32(self.round),
                self.roster,
                identifiers(self.cohort),
                u32(self.threshold),
                u32(self.degree),
                u32(self.share_threshold),
                bytes.fromhex(self.base),
                bytes.fromhex(self.layout),
                u64(self.size),
                u32(self.drop_rate.numerator),
                u32(self.drop_rate.denominator),
                u8(AGGREGATES[self.aggregate].code),
                u8(self.bits),
                f64(self.clip),
                u8(WEIGHTINGS.index(self.weighting)),
                f64(self.min_weight),
                f64(self.max_weight),
                u64(self.dense),
                texts(self.dense_patterns),
                texts(self.exclude),
                self.training,
                # Terms of other aggregates end here: their bytes are those of all versions.
                u32(self.directions) + u64(self.sketch) if self.sketch else b"",
                u32(self.groups) if self.groups > 1 or self.rates else b"",
                _rates_bytes(self.rates) if self.rates else b"",
                u64(self.variance) + f64(self.epsilon) + f64(self.delta) if self.variance else b"",
            )
        )

    @cached_property
    def session(self) -> bytes:
        """SHA-256 of the terms: the name of this sum."""
        return hashlib.sha256(b"dare-agg secure terms 2\0" + self.encode()).digest()

    def mask(self, shares_digest: bytes) -> Mask:
        """The one mask of the session, fixed by the nonces of all who shared keys.

        Sums of groups are compared, so theirs is that of the round, which all of them name alike.
        """
        key = derive_key(shares_digest, "secure mask")
        if self.groups > 1:
            key = derive_key(self._round_digest, "secure mask of groups")
        return Mask("stratified", self.size, self.drop_rate, key, rates=self.rates)

    @property
    def _round_digest(self) -> bytes:
        """Of what the groups of one round have in common."""
        parts = (
            blob(self.run.encode()),
            u32(self.round),
            self.roster,
            bytes.fromhex(self.base),
            bytes.fromhex(self.layout),
            u32(self.groups),
        )
        return hashlib.sha256(b"dare-agg round of groups 1\0" + b"".join(parts)).digest()


def secure_terms(
    *,
    run: str,
    round_number: int,
    roster: bytes,
    cohort: Sequence[int],
    base: str,
    layout: str,
    size: int,
    drop_rate: DropRate,
    aggregate: str = "mean",
    bits: int = 16,
    clip: float = 0.02,
    threshold: int | None = None,
    colluding: float = COLLUDING,
    weighting: str = "equal",
    min_weight: float = 1.0,
    max_weight: float = 1.0,
    dense: int = 0,
    dense_patterns: Sequence[str] = (),
    exclude: Sequence[str] = (),
    training: bytes = NO_TRAINING,
    directions: int = 0,
    sketch: int = 0,
    groups: int = 1,
    variance: int = 0,
    epsilon: float = 0.0,
    delta: float = 0.0,
    rates: TensorRates | None = None,
) -> SecureTerms:
    """Terms with the defaults that follow from the number of parties.

    The threshold is two thirds and one more; the graph is complete up to 100 parties.
    """
    ids = tuple(sorted(cohort))
    n = len(ids)
    needed = max(MIN_PARTIES, 2 * n // 3 + 1) if threshold is None else threshold
    degree = degree_for(n, colluding)
    return SecureTerms(
        run=run,
        round=round_number,
        roster=roster,
        cohort=ids,
        threshold=needed,
        degree=degree,
        share_threshold=needed if degree == n - 1 else share_threshold_for(degree),
        base=base,
        layout=layout,
        size=size,
        drop_rate=drop_rate,
        aggregate=aggregate,
        bits=bits,
        clip=clip,
        weighting=weighting,
        min_weight=min_weight,
        max_weight=max_weight,
        dense=dense,
        dense_patterns=tuple(dense_patterns),
        exclude=tuple(exclude),
        training=training,
        directions=directions,
        sketch=sketch,
        groups=groups,
        variance=variance,
        epsilon=epsilon,
        delta=delta,
        rates=rates,
    )


def decode_terms(data: bytes) -> SecureTerms:
    """Read terms; nothing in them is trusted. Raises `ProtocolError`."""
    if len(data) > _MAX_TERMS_BYTES:
        raise ProtocolError(
            f"terms of {len(data)} bytes; {_MAX_TERMS_BYTES} are the most", reason="malformed"
        )
    read = Reader(data, "terms")
    version = read.u8()
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"terms of protocol version {version}, this is {PROTOCOL_VERSION}; install the same "
            "dare-agg at every party",
            reason="version",
        )
    try:
        fields: dict[str, Any] = {
            "run": read.blob(128).decode(),
            "round": read.u32(),
            "roster": read.take(DIGEST_BYTES),
            "cohort": read.identifiers(MAX_MEMBERS),
            "threshold": read.u32(),
            "degree": read.u32(),
            "share_threshold": read.u32(),
            "base": read.take(32).hex(),
            "layout": read.take(32).hex(),
            "size": read.u64(),
            "drop_rate": DropRate(read.u32(), read.u32()),
            "aggregate": _row(tuple(AGGREGATES), read),
            "bits": read.u8(),
            "clip": read.f64(),
            "weighting": _row(WEIGHTINGS, read),
            "min_weight": read.f64(),
            "max_weight": read.f64(),
            "dense": read.u64(),
            "dense_patterns": read.texts(MAX_PATTERNS, MAX_PATTERN_BYTES),
            "exclude": read.texts(MAX_PATTERNS, MAX_PATTERN_BYTES),
            "training": read.take(DIGEST_BYTES),
        }
        if AGGREGATES[fields["aggregate"]].sketches:
            fields |= {"directions": read.u32(), "sketch": read.u64()}
        if AGGREGATES[fields["aggregate"]].noised:
            fields |= {"variance": read.u64(), "epsilon": read.f64(), "delta": read.f64()}
        if read.left >= 4:
            fields["groups"] = read.u32()
            if not read.left and fields["groups"] < 2:
                raise read.bad(f"{fields['groups']} groups written out; 2 or more are")
            if read.left:
                fields["rates"] = _read_rates(read)
        terms = SecureTerms(**fields)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ProtocolError(f"terms: {error}", reason="terms") from error
    read.done()
    return terms


def _rates_bytes(rates: TensorRates) -> bytes:
    sizes = b"".join(map(u64, rates.sizes))
    return u32(len(rates.sizes)) + sizes + rates.known.to_bytes()


def _read_rates(read: Reader) -> TensorRates:
    sizes = tuple(read.u64() for _ in range(read.count(9, MAX_TENSORS)))
    try:
        table = read_table(read.take(read.left), len(sizes))
    except UpdateError as error:
        raise read.bad(str(error)) from error
    return TensorRates(sizes, table, told=True)


def _row(table: tuple[str, ...], read: Reader) -> str:
    number = read.u8()
    if number >= len(table):
        raise read.bad(f"row {number} of a table of {len(table)}")
    return table[number]


def _check(holds: bool, what: str, bound: str) -> None:
    if not holds:
        raise ConfigError(f"secure sum: {what}; {bound} is needed")
