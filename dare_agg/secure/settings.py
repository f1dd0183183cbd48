"""What a run sets of its secure sums; unsafe settings are refused before anyone is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dare_agg.codec.fitted_rates import fitted_rates
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.codec.rates import TensorRates
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.merge.directions import check_rank
from dare_agg.privacy.sharing import SharedPrivacy
from dare_agg.secure.aggregate import MAX_BITS
from dare_agg.secure.aggregates import AGGREGATES, SECURE_METHODS
from dare_agg.secure.division import among, divided
from dare_agg.secure.guard import honest_parties
from dare_agg.secure.packing import Quantiser
from dare_agg.secure.private import PRIVATE_MEAN, fitting
from dare_agg.secure.roster import Roster
from dare_agg.secure.sketch import sketch_words
from dare_agg.secure.stream import MAX_WORD_BITS
from dare_agg.secure.terms import (
    MAX_GROUPS,
    MIN_PARTIES,
    NO_TRAINING,
    SecureTerms,
    secure_terms,
)
from dare_agg.vectors.layout import Layout

# Of each Linear's Gram matrix, where a party adds one: chosen by measurement (docs/SECURE.md).
DIRECTIONS = 8
# A weight of few examples beside max_weight shrinks its party's values: bits to make up for it.
WEIGHTED_BITS = MAX_BITS
# Those that all parties find alike.
KEEP_RATES = ("uniform", "last")


@dataclass(frozen=True)
class SecureSettings:
    """How a run sums securely; checked when made.

    Attributes
    ----------
    method
        a row of `SECURE_METHODS`: Σwx/Σw, λΣx, TIES, or WUDI.
    drop_rate
        of the one mask all parties share.
    bits
        of a value; 0 takes 16 (24 where values are weighed, and with WUDI), or what fits the word.
    clip
        largest magnitude of a value; more is cut off, and the share reported.
    min_parties
        fewest parties a sum is made of, at least 3; more than half of the roster in
        any case, since by default no party takes part in less.
    threshold
        parties that must stay to the end; 0 takes two thirds and one more.
    weighting
        "equal", or "examples" (a mean alone), whose numbers stay hidden. Fewer than
        ``min_weight`` examples count as that many, more than ``max_weight`` as those: the two
        bound by how much one dishonest weight can scale the mean.
    colluding
        share of parties assumed to collude, beyond 100 parties.
    directions
        leading directions of each Linear's change that a party adds, for WUDI.
    groups
        a mean of each of so many groups of the roster, for a robust rule over them.
    privacy
        what the members are promised (`SharedPrivacy`; a mean alone): their parties add
        noise, and no sum is without.
    keep_rates
        "uniform", or "last": of every tensor as its merged change of the round before says, which
        all know. The first round's are uniform.
    options
        merge options; a magnitude trim is refused.
    """

    method: str = "mean"
    drop_rate: DropRate | float | str = "0.9"
    bits: int = 0
    clip: float = 0.02
    min_parties: int = MIN_PARTIES
    threshold: int = 0
    weighting: str = "equal"
    min_weight: float = 10.0
    max_weight: float = 1000.0
    scaling: float = 1.0
    colluding: float = 0.20
    directions: int = DIRECTIONS
    groups: int = 1
    privacy: SharedPrivacy | None = None
    keep_rates: str = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in SECURE_METHODS:
            raise ConfigError(
                f"secure = {self.method!r}: no such secure sum"
                f"{did_you_mean(self.method, SECURE_METHODS)}"
            )
        if self.drop_rate == "auto":
            raise ConfigError(
                "drop rate 'auto' in a secure sum: it is chosen by the norms of single clients' "
                "changes, which the server of a sum never sees; give a number, for example 0.9"
            )
        if not isinstance(self.drop_rate, DropRate):
            object.__setattr__(self, "drop_rate", parse_drop_rate(self.drop_rate))
        for name in ("trim", "density"):
            if name in self.options:
                raise ConfigError(
                    f"{name} = {self.options[name]!r} in a secure sum: a magnitude trim keeps "
                    "other elements at each party, so that most sums hold one party's value; "
                    "leave it out and set drop-rate instead"
                )
        if self.options:
            raise ConfigError(
                f"option {next(iter(self.options))!r} has no meaning in a secure sum; leave it out"
            )
        if self.min_parties < MIN_PARTIES:
            raise ConfigError(
                f"secure-min-parties = {self.min_parties}; at least {MIN_PARTIES} are needed: a "
                "sum of two shows each the other's delta"
            )
        check_rank(self.directions)
        if self.privacy is not None and self.method != "mean":
            raise ConfigError(
                f"privacy of clients in a secure {self.method}: noise is counted for a mean, and "
                "one party moves another result by more than its norm, or counts show it; set "
                "secure = mean"
            )
        if self.privacy is not None and self.groups > 1:
            raise ConfigError(
                f"privacy of clients with secure-groups = {self.groups}: what a rule makes of sums "
                "is bounded by no norm; leave secure-groups and robust out"
            )
        if self.keep_rates not in KEEP_RATES:
            raise ConfigError(
                f"keep rates {self.keep_rates!r} in a secure sum, which needs the same elements of "
                f"all; {' or '.join(KEEP_RATES)} are possible"
            )
        if self.privacy is not None and self.keep_rates != "uniform":
            raise ConfigError(
                f"keep rates {self.keep_rates!r} with privacy of clients: the last merged change "
                "is noise for the most part, and rates would follow that; set them to uniform"
            )
        row = AGGREGATES[self.aggregate]
        least = row.least_bits
        if self.bits and not least <= self.bits <= MAX_BITS:
            raise ConfigError(
                f"secure-bits = {self.bits} for {self.method}; {least} to {MAX_BITS}, or 0 to "
                "have them chosen"
            )
        if self.weighting != "equal" and not row.weighable:
            raise ConfigError(
                f"weighting = {self.weighting!r} with secure {row.title}; set equal: {row.title} "
                "counts parties"
            )
        if not 1 <= self.groups <= MAX_GROUPS:
            raise ConfigError(f"secure-groups = {self.groups}; 1 to {MAX_GROUPS} are possible")
        if self.groups > 1 and self.method != "mean":
            raise ConfigError(
                f"secure-groups = {self.groups} with secure {self.method}: a rule over groups "
                "takes the place of the mean; set secure = mean"
            )
        if not 0 < self.scaling < float("inf"):
            raise ConfigError(f"scaling = {self.scaling}; a finite number above 0 is needed")
        self.check(self.min_parties)

    @property
    def aggregate(self) -> str:
        """What is summed: a row of `dare_agg.secure.aggregates.AGGREGATES`."""
        if self.privacy is not None:
            return PRIVATE_MEAN.name
        return SECURE_METHODS[self.method].aggregate

    @property
    def rule(self) -> str:
        """How the server reads the sums: one of the rules of the aggregate."""
        return SECURE_METHODS[self.method].rule

    def bits_for(self, parties: int) -> int:
        """Bits of a value among ``parties``. Raises `ConfigError` when none is left that fits."""
        if self.privacy is not None:
            return self.bits or PRIVATE_MEAN.usual_bits
        if self.bits:
            return Quantiser(self.aggregate, self.bits, self.clip, parties).bits
        row = AGGREGATES[self.aggregate]
        wanted = WEIGHTED_BITS if self.weighting == "examples" else row.usual_bits
        bits = min(wanted, row.most_bits(parties.bit_length()))
        if bits < row.least_bits:
            raise ConfigError(
                f"secure {self.method} of {parties} parties leaves {bits} bits a value in a word "
                f"of {MAX_WORD_BITS}; {row.least_bits} are needed: sum in smaller cohorts, or a "
                "mean"
            )
        return bits

    def fewest(self, roster: Roster, groups: int = 1) -> int:
        """The fewest parties of ``roster`` that a round is asked of: more than half of them.

        Where sums are of groups: of so many of the smallest ``groups``.
        """
        sizes = sorted(map(len, divided(roster, self.groups)))
        return sum(map(self._fewest_of, sizes[:groups]))

    def cohorts(
        self, groups: Sequence[Sequence[int]], parties: Iterable[int]
    ) -> dict[int, list[int]]:
        """Who of ``parties`` are summed, by the number of their group; of one, all who are here.

        Of several those are left out that no party would take part in.
        """
        found = among(groups, parties)
        if len(groups) == 1:
            return found
        return {
            number: cohort
            for number, cohort in found.items()
            if len(cohort) >= self._fewest_of(len(groups[number]))
        }

    def _fewest_of(self, members: int) -> int:
        return max(self.min_parties, members // 2 + 1)

    def check_groups(self, roster: Roster) -> None:
        """Raise `ConfigError` where a group of ``roster`` makes no safe sum."""
        members = len(roster.members)
        if members // self.groups < self.min_parties:
            raise ConfigError(
                f"secure-groups = {self.groups} of the {members} members of roster "
                f"{roster.name!r}: a group would have {members // self.groups}, and "
                f"secure-min-parties = {self.min_parties} are needed in each; set secure-groups = "
                f"{max(1, members // self.min_parties)} or fewer"
            )
        for group in divided(roster, self.groups):
            self.check(len(group))

    def check(self, parties: int) -> None:
        """Raise `ConfigError` where so many parties make no safe sum."""
        if parties < self.min_parties:
            raise ConfigError(
                f"{parties} parties; secure-min-parties = {self.min_parties} are needed"
            )
        if self.threshold and not max(MIN_PARTIES, parties // 2 + 1) <= self.threshold <= parties:
            raise ConfigError(
                f"secure-threshold = {self.threshold} of {parties} parties; more than half, at "
                f"least {MIN_PARTIES} and at most all: else two different sets could be unmasked"
            )
        if self.privacy is None:  # else its word follows its noise
            Quantiser(self.aggregate, self.bits_for(parties), self.clip, parties)

    def terms(
        self,
        *,
        run: str,
        round_number: int,
        roster: Roster,
        cohort: Sequence[int],
        base: str,
        layout: str,
        size: int,
        dense: int = 0,
        dense_patterns: Sequence[str] = (),
        exclude: Sequence[str] = (),
        training: bytes = NO_TRAINING,
        model: Layout | None = None,
        rho: float = 0.0,
        levels: bytes = b"",
    ) -> SecureTerms:
        """The terms of one sum among ``cohort``; ``model`` is the delta's layout, for sketches.

        ``levels`` say how much each tensor of ``model`` changed in the round before, for keep rates
        "last"; without them all tensors are kept alike.

        With privacy ``rho`` is what the sum may cost, by the noise of those who must stay less
        those who may collude. Raises `ConfigError`, for noise that cannot be drawn or carried too.
        """
        self.check(len(cohort))
        assert isinstance(self.drop_rate, DropRate)
        sketch = directions = 0
        if AGGREGATES[self.aggregate].sketches:
            if model is None:
                raise ConfigError(f"secure {self.method} needs the layout of the model: model=")
            directions = self.directions
            sketch = sketch_words(model, directions, len(cohort))
        rates: TensorRates | None = None
        if self.keep_rates == "last" and levels and model is not None:
            # A word a survivor, as of float32.
            rates = fitted_rates(model.sizes, levels, self.drop_rate, "f32", told=True)
        found = secure_terms(
            run=run,
            round_number=round_number,
            roster=roster.digest,
            cohort=cohort,
            base=base,
            layout=layout,
            size=size,
            drop_rate=self.drop_rate,
            aggregate=self.aggregate,
            bits=self.bits_for(len(cohort)),
            clip=self.clip if self.privacy is None else self.privacy.clip,
            threshold=self.threshold or None,
            colluding=self.colluding,
            weighting=self.weighting,
            min_weight=float(self.min_weight) if self.weighting == "examples" else 1.0,
            max_weight=float(self.max_weight) if self.weighting == "examples" else 1.0,
            dense=dense,
            dense_patterns=dense_patterns,
            exclude=exclude,
            training=training,
            directions=directions,
            sketch=sketch,
            groups=self.groups,
            rates=rates,
            **self._promise(len(roster.members)),
        )
        if self.privacy is None:
            return found
        if not rho > 0:
            raise ConfigError(
                "privacy of clients in a sum that says no ρ: it is for rounds of training "
                "(SecureStrategy); leave privacy out of a one-shot merge"
            )
        honest = honest_parties(found.threshold, len(roster.members), self.colluding)
        if honest < MIN_PARTIES:
            raise ConfigError(
                f"privacy of clients in sums of {len(cohort)} parties of whom {found.threshold} "
                f"must stay and {found.threshold - honest} may collude: noise of {honest} is left, "
                f"and {MIN_PARTIES} are needed; wait for more parties (min-clients), or raise "
                "secure-threshold"
            )
        bits, variance = fitting(rho, found.values, honest, self.bits)
        return replace(found, bits=bits, variance=variance)

    def _promise(self, members: int) -> dict[str, Any]:
        """What terms say of privacy; the noise itself follows from their size."""
        if self.privacy is None:
            return {}
        promised = self.privacy.among(members)
        return {"variance": 1, "epsilon": promised.epsilon, "delta": promised.delta}
