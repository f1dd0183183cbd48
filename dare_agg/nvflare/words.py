"""DARE's words of a job, as the plain values that a job's configuration holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dare_agg.codec.budget import ClientTerms, UploadBudget, parse_bytes
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.protocol import Downlink
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.robust.rule import check_robust
from dare_agg.rounds import arguments
from dare_agg.rounds.auto import AUTO
from dare_agg.rounds.choosing import Chooser
from dare_agg.rounds.messages import Hello
from dare_agg.rounds.own_terms import OwnTerms
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import server_step
from dare_agg.rounds.terms import UpdateTerms, check_choice

# What its words are given to, for messages.
CALLED = "DareRecipe"


@dataclass(frozen=True)
class Words:
    """What a DARE job may be told besides NVFlare's own words; checked when made.

    Attributes
    ----------
    drop_rate, values
        of the clients' updates; "auto" has each round choose what the model bears. With a drop
        rate, ``values`` are "b1" unless said.
    mask, keep_rates, dense, dense_values, exclude, directions, direction_bits
        as of `dare_agg.flower.DareStrategy`: kind of mask, keep rates by tensor, patterns of
        tensors that travel whole and of those that never leave a site, directions for "wudi".
    method, scaling, options
        merge method, λ, and the method's own options; not those that need statistics of the
        training code (fisher, regmean).
    weighting, weight_bound, max_weight
        "examples" (``NUM_STEPS_CURRENT_ROUND`` of each reply, 1 where it says nothing, as in
        FedAvg) or "equal"; most that one client counts for; most that it may claim.
    server_step
        what the server does with the merged delta, as in "adam(tau=1e-4)".
    robust, byzantine
        the rule that bears so many Byzantine clients a round.
    seed
        makes masks, keys and samples the same in every run; None draws a secret.
    downlink
        a form of `dare_agg.downlink.ways.DOWNLINKS`: "auto" sends steps of the version that a
        client keeps in its folder, "full" the whole model every time.
    client_terms
        a site's own drop rate and value format: ``{"site-1": {"drop_rate": 0.99}}``.
    upload_budget
        most bytes of a client's upload a round ("300kB"); it chooses rate and format.
    deadline
        seconds after which a round closes with the replies that are there.
    min_replies, max_empty_rounds
        fewest accepted updates a round needs; how many rounds in a row may miss them before the
        job fails (None: any number; a job in which all miss fails in any case).
    state, resume
        a folder on the server in which finished rounds are kept, as an absolute path; whether to
        go on from the last of them.
    """

    drop_rate: float | str = AUTO
    values: str = AUTO
    mask: str = UpdateTerms.mask
    keep_rates: str = UpdateTerms.keep_rates
    dense: Sequence[str] = UpdateTerms.dense
    dense_values: str = UpdateTerms.dense_values
    exclude: Sequence[str] = UpdateTerms.exclude
    directions: int = UpdateTerms.directions
    direction_bits: int = UpdateTerms.direction_bits
    method: str = FederatedSettings.method
    scaling: float = FederatedSettings.scaling
    options: Mapping[str, Any] = field(default_factory=dict)
    weighting: str = FederatedSettings.weighting
    weight_bound: float = FederatedSettings.weight_bound
    max_weight: float = UpdateTerms.max_weight
    server_step: str = "plain"
    robust: str = ""
    byzantine: int = 0
    seed: int | None = None
    downlink: str = AUTO
    client_terms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    upload_budget: str | int | None = None
    deadline: float | None = None
    min_replies: int = 1
    max_empty_rounds: int | None = None
    state: str = ""
    resume: bool = False

    def __post_init__(self) -> None:
        self.settings()
        self.make_downlink()
        self.own_terms(logging.getLogger(__name__))
        arguments.seconds("deadline", self.deadline)
        arguments.count("min_replies", self.min_replies, least=1)
        if self.max_empty_rounds is not None:
            arguments.count("max_empty_rounds", self.max_empty_rounds)
        if self.state and not Path(self.state).is_absolute():
            raise ConfigError(
                f"state = {self.state!r}; an absolute path on the server is needed, since each "
                "job has a working folder of its own"
            )
        if self.resume and not self.state:
            raise ConfigError("resume without state; name the folder that the run was kept in")

    @property
    def chosen(self) -> bool:
        """Whether rounds choose the terms of updates."""
        return self.drop_rate == AUTO

    def settings(self) -> FederatedSettings:
        """What a federated run of these words is set to; raises `ConfigError`."""
        found = FederatedSettings(
            UpdateTerms(
                drop_rate=UpdateTerms.drop_rate if self.chosen else parse_drop_rate(self.drop_rate),
                values=UpdateTerms.values if self.values == AUTO else self.values,
                mask=self.mask,
                keep_rates=self.keep_rates,
                dense=self.dense,  # type: ignore[arg-type]
                dense_values=self.dense_values,
                exclude=self.exclude,  # type: ignore[arg-type]
                directions=self.directions,
                direction_bits=self.direction_bits,
                max_weight=self.max_weight,
            ),
            method=self.method,
            scaling=self.scaling,
            options=dict(self.options),
            weighting=self.weighting,
            weight_bound=self.weight_bound,
            server_step=server_step(self.server_step),
            robust=check_robust(self.robust, self.byzantine),
        )
        if found.terms.statistics:
            raise ConfigError(
                f"method {self.method!r} needs {found.terms.statistics} statistics of clients, "
                "which training scripts of NVFlare have no way to return; take another method, or "
                "dare_agg.flower.DareStrategy"
            )
        return found

    def make_downlink(self) -> Downlink:
        """The server's half of the downlink; raises `ConfigError`."""
        return make_downlink(self.downlink)

    def own_terms(self, log: logging.Logger) -> OwnTerms:
        """Who chooses a client's terms; raises `ConfigError`."""
        sites = {name: self._terms_of(name, own) for name, own in self.client_terms.items()}
        budget = None
        if self.upload_budget is not None:
            budget = UploadBudget(parse_bytes(self.upload_budget))
        chooser = Chooser(CALLED, log, self.values) if self.chosen else None

        def of_site(hello: Hello) -> ClientTerms | None:
            return sites.get(hello.name)

        return OwnTerms(of_site if sites else None, budget, chooser)

    def _terms_of(self, site: str, own: Mapping[str, Any]) -> ClientTerms:
        for word in own:
            if word not in ("drop_rate", "values"):
                raise ConfigError(
                    f"client_terms of {site!r} have {word!r}"
                    f"{did_you_mean(word, ('drop_rate', 'values'))}"
                )
        common = self.settings().terms
        values = own.get("values", common.values)
        check_choice(f"value format of {site!r}", values, VALUE_FORMATS)
        return ClientTerms(parse_drop_rate(own.get("drop_rate", common.drop_rate)), values)


WORDS = tuple(each.name for each in fields(Words))


# Words of a run under Flower that no job has → why.
ELSEWHERE: Mapping[str, str] = {
    "secure": "secure sums need their own rounds, and parties who check them",
    "privacy": "privacy of clients needs draws that no server sees undone",
    "identities": "sites are known by NVFlare's mutual TLS, and sign nothing",
    "base": "a base on the server's disk is not followed here; leave the model to the job",
}


def read_words(given: Mapping[str, Any]) -> Words:
    """The words of a job; raises `ConfigError` for one that is unknown or out of bounds."""
    for word in given:
        if word in ELSEWHERE:
            raise ConfigError(
                f"{word} is not offered under NVFlare: {ELSEWHERE[word]}; use dare_agg.flower"
            )
        if word not in WORDS:
            raise ConfigError(f"a DARE job has no word {word!r}{did_you_mean(word, WORDS)}")
    return Words(**given)
