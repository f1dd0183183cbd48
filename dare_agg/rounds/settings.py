"""What a federated run is set to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.merge.methods import MEAN, MEANS, federated_methods, find_method
from dare_agg.merge.row import Method
from dare_agg.robust.rule import RobustRule
from dare_agg.rounds.directions import DIRECTIONS, check_directions
from dare_agg.rounds.step import ServerStep, server_step
from dare_agg.rounds.terms import UpdateTerms, check_choice, check_positive

# Whether a client's update weighs as much as the number it reports; else all weigh the same.
WEIGHTINGS: Mapping[str, bool] = {"examples": True, "equal": False}

# Merge methods that are a mean, which a robust rule takes the place of.
ROBUST_METHODS = MEANS


@dataclass(frozen=True)
class FederatedSettings:
    """What a federated run is set to; checked when made.

    Attributes
    ----------
    terms
        what the clients' updates must be.
    method
        merge method, one of `federated_methods`. Weights are normalised to sum 1, so
        "task-arithmetic" with scaling 1 is the weighted mean.
    scaling
        λ, the factor on the merged delta.
    options
        further options of the merge method.
    weighting
        "examples" (by the number each client reports) or "equal".
    weight_bound
        no client counts for more than so many times the round's median weight (0: no bound).
    server_step
        what the server does with the merged delta.
    shared_mask
        all clients of a round use one mask (secure sums need it; a method
        whose statistics are of survivors alone sets it, and a robust rule that compares
        clients).
    robust
        the rule that bears Byzantine clients (`dare_agg.robust`), in place of the merge
        method's mean; None for none.
    """

    terms: UpdateTerms = UpdateTerms()  # noqa: RUF009 (frozen)
    method: str = MEAN
    scaling: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    weighting: str = "examples"
    weight_bound: float = 100.0
    server_step: ServerStep = field(default_factory=server_step)
    shared_mask: bool = False
    robust: RobustRule | None = None
    tile: int = 1 << 16
    threads: int = 1

    def __post_init__(self) -> None:
        check_choice("merge method", self.method, federated_methods())
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_positive("scaling", self.scaling)
        check_weight_bound(self.weight_bound)
        terms = replace(self.terms, statistics=self.row.statistics or "")
        if self.row.own_grams:
            terms = replace(terms, directions=terms.directions or DIRECTIONS)
            check_directions(terms)
        elif terms.directions:
            raise ConfigError(
                f"directions = {terms.directions}, and {self.method} does not merge by them; set "
                "method='wudi', or leave them out"
            )
        object.__setattr__(self, "terms", terms)
        if terms.keep_rates != "uniform" and (self.row.shared_mask or self.row.statistics):
            raise ConfigError(
                f"{self.method} needs the same elements of all clients, and keep rates "
                f"{terms.keep_rates!r} keep others of each; set keep_rates='uniform'"
            )
        votes = self.robust is not None and self.robust.votes
        object.__setattr__(self, "shared_mask", self.shared_mask or self.row.shared_mask or votes)
        self._check_robust()

    def _check_robust(self) -> None:
        if self.robust is None:
            return
        if self.method not in ROBUST_METHODS and not self.robust.bounds_only:
            raise ConfigError(
                f"robust = {str(self.robust)!r} with method {self.method!r}: the rule takes the "
                f"place of a mean; set the method to {' or '.join(ROBUST_METHODS)}"
            )
        if self.robust.votes and self.terms.keep_rates != "uniform":
            raise ConfigError(
                f"robust = {str(self.robust)!r} compares the same elements of all clients, and "
                f"keep rates {self.terms.keep_rates!r} keep others of each; set "
                "keep_rates='uniform'"
            )

    @property
    def row(self) -> Method:
        """The merge method's row."""
        return find_method(self.method)


def check_weight_bound(bound: object) -> None:
    """Raise `ConfigError` where the value is neither 0 nor a finite number of at least 1."""
    if bound == 0 and not isinstance(bound, bool):
        return
    check_positive("weight_bound", bound)
    assert isinstance(bound, int | float)
    if bound < 1:
        raise ConfigError(f"weight_bound = {bound}; at least 1 is needed, or 0 for no bound")
