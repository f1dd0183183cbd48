"""The server's half of a job: rounds over sites, known to NVFlare by name, without NVFlare.

A round is opened for some sites, who are each given an order; they pull what they lack of the
version (`Run.piece`), and answer with an update or a reason; at its end what is accepted is
merged. As under Flower: the same clients, named alike and with the same seed, make the same bits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dare_agg.codec.derive import derive_key
from dare_agg.downlink.protocol import FullDownlink
from dare_agg.errors import ConfigError, DareError, RunError, UpdateError
from dare_agg.nvflare.payloads import Pieces
from dare_agg.nvflare.resume import KeptRun
from dare_agg.nvflare.words import CALLED, Words
from dare_agg.rounds.chain import StepContext, chain
from dare_agg.rounds.directions import linears_of_round, most_bytes
from dare_agg.rounds.draws import drawn_places, round_secret, run_secret
from dare_agg.rounds.messages import ASK_TRAIN, Hello, Order, Receipt, Refusal, one_line
from dare_agg.rounds.missed import Tally
from dare_agg.rounds.plan import RoundPlan, make_plans
from dare_agg.rounds.robust import check_one_mask, robust_step
from dare_agg.rounds.round_noise import RoundNoise
from dare_agg.rounds.server import (
    Accepted,
    Rejection,
    advance,
    check_reply,
    merge_round,
    most_payload,
    round_weights,
)
from dare_agg.rounds.settings import WEIGHTINGS
from dare_agg.rounds.statistics import StatisticsUpdate
from dare_agg.rounds.step import StepState
from dare_agg.rounds.weight_bound import bound_step, bound_weights
from dare_agg.vectors.model import Arrays, GlobalModel, global_model

# Payloads of an answer.
UPDATE, DENSE, DIRECTIONS = "update", "dense", "directions"


@dataclass(frozen=True)
class Answered:
    """A site's accepted update and what it measured of its own change."""

    accepted: Accepted
    receipt: Receipt
    update_bytes: int
    dense_bytes: int
    metrics: Mapping[str, Any]


@dataclass
class OpenRound:
    """A round that is going on: the plans by site, and what came of them so far."""

    number: int
    plans: Mapping[str, RoundPlan]
    started: float = field(default_factory=time.monotonic)
    answers: dict[str, Answered] = field(default_factory=dict)
    rejections: dict[str, Rejection] = field(default_factory=dict)
    download: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """What a round came to: the model's arrays, its measurements, and the answers merged."""

    arrays: Arrays
    moved: bool
    measurements: dict[str, Any]
    answers: Mapping[str, Answered]
    weights: tuple[float, ...] = ()


class Run:
    """The rounds of one job; ``clients`` is how many of the sites take part in each."""

    def __init__(self, words: Words, clients: int, log: logging.Logger) -> None:
        self.words, self.clients, self.log = words, clients, log
        self.settings = words.settings()
        self.downlink = words.make_downlink()
        own_terms = words.own_terms(log)
        self._own_terms = own_terms
        self._noise = RoundNoise(CALLED, log, self.settings, own_terms)
        rule = self.settings.robust
        self._least = words.min_replies
        if rule is not None:
            rule.check_clients(clients, "raise min_clients")
            self._least = max(self._least, rule.least)
        self._steps = chain(bound_step, *([robust_step(rule)] if rule is not None else []))
        self.secret = run_secret(words.seed)
        self.tally = Tally()
        self._step_state = StepState()
        self._model: GlobalModel | None = None
        self._open: OpenRound | None = None
        self._kept = KeptRun(words.state, words.resume) if words.state else None
        # Sites pull while results come in; nobody does while the model moves.
        self._lock = threading.Lock()
        self._pieces: dict[str, Pieces] = {}

    # --- begin and go on -------------------------------------------------------------------

    def begin(self, arrays: Arrays) -> int:
        """Take the model that the job starts with, or where an earlier one of it stopped.

        Returns how many rounds are finished. Raises `LayoutError` for what is no model, and as
        `KeptRun.begin`.
        """
        terms = self.settings.terms
        given = global_model(arrays, dense=terms.dense, exclude=terms.exclude, by_form=True)
        if terms.directions:
            linears_of_round(given.groups.layout)
        self._model = self.downlink.start(given)
        if self._kept is None:
            return 0
        found = self._kept.begin(arrays, given, terms, self.downlink)
        if found is None:
            return 0
        self._model, self._step_state, self.secret = found.model, found.step_state, found.secret
        self.log.info("going on after round %d of %s", found.round, self.words.state)
        return found.round

    def finish(self) -> None:
        """Say how many rounds moved nothing; raises `RunError` where all did."""
        self.tally.check(self.log)

    @property
    def model(self) -> GlobalModel:
        """The newest version; raises `ConfigError` before `begin`."""
        if self._model is None:
            raise ConfigError("the run has no model yet; call begin first")
        return self._model

    @property
    def whole(self) -> bool:
        """Whether each task carries the whole model, instead of naming a version."""
        return self.downlink.name == FullDownlink.name

    def drawn(self, number: int, sites: Sequence[str], count: int) -> list[str]:
        """Draw so many of the sites for a round, in order, the same in every run of one seed."""
        ordered = sorted(sites, key=lambda site: Hello(name=site).order())
        key = derive_key(self.secret, "train", length=32)
        return [ordered[place] for place in drawn_places(len(ordered), count, key, number)]

    # --- a round ---------------------------------------------------------------------------

    def open(self, number: int, sites: Sequence[str]) -> OpenRound:
        """Open round ``number`` (from 1) for the sites, each with a plan of its own.

        Raises `RunError` for no sites.
        """
        if not sites:
            raise RunError(f"round {number}: no site is there to train", reason="nodes")
        model, terms = self.model, self.settings.terms
        ordered = sorted(sites, key=lambda site: Hello(name=site).order())
        auto = self._step_state.auto
        own = [self._own_terms.of(Hello(name=site), model, terms, auto) for site in ordered]
        plans = make_plans(
            round_secret(self.secret, number),
            number,
            own,
            terms,
            model.ref,
            shared_mask=self.settings.shared_mask,
            layout=model.groups.layout,
            levels=self._step_state.levels,
        )
        if self.settings.robust is not None and self.settings.robust.votes:
            check_one_mask(plans)
        self._open = OpenRound(number, dict(zip(ordered, plans, strict=True)))
        return self._open

    def order(self, site: str) -> dict[str, Any]:
        """What a site of the open round is asked, as plain values."""
        terms = self.settings.terms
        return Order(
            ask=ASK_TRAIN,
            version=self.model.ref.version,
            downlink=self.downlink.name,
            arrays_key="",
            dense=terms.dense,
            exclude=terms.exclude,
            by_form=True,
            facts=self.downlink.facts(),
            plan=self._opened().plans[site],
        ).to_record()

    def piece(self, site: str, version: object, have: object, at: object) -> dict[str, Any]:
        """A piece of what brings a site from the version it has to the one it is asked for.

        Nothing of a site's request is trusted. Raises `UpdateError` for one that is malformed
        (reason "malformed"), or of a version that is not the newest ("round").
        """
        if not isinstance(have, str) or not isinstance(version, str) or not isinstance(at, int):
            raise UpdateError("the request for a version is malformed", reason="malformed")
        with self._lock:
            if version != self.model.ref.version:
                raise UpdateError(
                    f"version {one_line(version, 16)} is not the newest any more; the round it "
                    "was asked in is over",
                    reason="round",
                )
            if have not in self._pieces:
                # Any text that names no version is answered as "" is, and kept under that.
                known = {"", self.downlink.facts().get("base-version", ""), version}
                have = have if have in known | set(self._parents()) else ""
                if have not in self._pieces:
                    sent = self.downlink.broadcast(self.model, have)
                    self._pieces[have] = Pieces(sent.payloads)
            found = self._pieces[have].cut(at)
            opened = self._open
            if opened is not None and site in opened.plans:
                size = len(found["piece"])
                opened.download[site] = opened.download.get(site, 0) + size
            return found

    def _parents(self) -> Sequence[str]:
        parents = getattr(self.downlink, "parents", None)
        return parents() if callable(parents) else ()

    def reject(self, site: str, reason: str, detail: str) -> None:
        """Note why a site's answer does not count, if it has not answered yet."""
        opened = self._open
        if opened is None or site not in opened.plans or site in opened.rejections:
            return
        rejection = Rejection(opened.plans[site].client, reason, one_line(detail))
        opened.answers.pop(site, None)
        opened.rejections[site] = rejection
        say = self.log.info if reason == "no-examples" else self.log.warning
        say("rejected %s: %s: %s", site, reason, rejection.detail)

    def take(
        self,
        site: str,
        record: Mapping[str, Any] | None,
        payloads: Mapping[str, Any],
        weight: object,
        metrics: Mapping[str, Any],
    ) -> bool:
        """Judge a site's answer; returns whether it counts. A bad one is noted with its reason."""
        opened = self._open
        if opened is None or site not in opened.plans:
            self.log.warning("rejected %s: unknown-node: it was asked nothing", site)
            return False
        if site in opened.answers or site in opened.rejections:
            # NVFlare drops second answers; whoever gets around that is not counted twice.
            self.reject(site, "duplicate", "two answers in one round; both dropped")
            return False
        try:
            found = self._judged(opened.plans[site], record, payloads, weight, metrics)
        except DareError as error:
            found = Rejection(opened.plans[site].client, error.reason, str(error))
        if isinstance(found, Rejection):
            self.reject(site, found.reason, found.detail)
            return False
        opened.answers[site] = found
        return True

    def _judged(
        self,
        plan: RoundPlan,
        record: Mapping[str, Any] | None,
        payloads: Mapping[str, Any],
        weight: object,
        metrics: Mapping[str, Any],
    ) -> Answered | Rejection:
        if record is None:
            raise UpdateError(
                "the reply holds whole weights or nothing of an update; put DareFilter into the "
                "site's filters of incoming tasks and of results (DareRecipe does)",
                reason="mod",
            )
        refusal = Refusal.read(record)
        if refusal is not None:
            return Rejection(plan.client, refusal.reason, refusal.detail)
        receipt = Receipt.read(record)
        receipt.check_answers(plan)
        layout = self.model.groups.layout
        dense_spec = plan.dense_spec()
        blob = _payload(payloads, UPDATE, most_payload(plan.spec(layout)))
        if blob is None:
            raise UpdateError("the reply holds no update payload", reason="truncated")
        dense = _payload(payloads, DENSE, most_payload(dense_spec) if dense_spec else 0)
        statistics = None
        if plan.terms.directions:
            found = _payload(payloads, DIRECTIONS, most_bytes(plan.terms, layout))
            statistics = None if found is None else StatisticsUpdate(found)
        if not WEIGHTINGS[self.settings.weighting]:
            weight = 1.0
        checked = check_reply(plan, blob, dense, weight, statistics=statistics, layout=layout)
        if isinstance(checked, Rejection):
            return checked
        return Answered(checked, receipt, len(blob), len(dense or b""), metrics)

    def close(self) -> Finished:
        """Merge what was accepted; the model stays where that is too little.

        Raises `RunError` where too many rounds in a row had too little.
        """
        opened = self._opened()
        for site, plan in opened.plans.items():
            if site not in opened.answers:
                self.reject(site, "late", f"no answer in time of client {plan.client}")
        self._open = None
        model = self.model
        names = {plan.client: site for site, plan in opened.plans.items()}
        context = StepContext(
            model,
            self.settings,
            opened.number,
            derive_key(round_secret(self.secret, opened.number), "steps", length=32),
            names,
            self._step_state.momenta,
        )
        answers = {site: opened.answers[site] for site in opened.plans if site in opened.answers}
        passed = self._steps([one.accepted for one in answers.values()], context)
        for one in passed.rejections:
            self.log.warning("rejected %s: %s: %s", names[one.client], one.reason, one.detail)
            answers.pop(names[one.client])
        rejections = [*opened.rejections.values(), *passed.rejections]
        taken = list(answers.values())
        measured = _measured(opened, answers, rejections, names)
        if len(taken) < self._least:
            why = f"round {opened.number}: {len(taken)} of {len(opened.plans)} updates count, "
            why += f"{self._least} are needed"
            if rejections:
                why += f"; {names[rejections[0].client]}: {rejections[0].detail}"
            error = RunError(why, reason="nobody-trained")
            self.tally.miss(error, rejections, self.words.max_empty_rounds)
            self.log.warning("%s; the global model stays as it is", why)
            return Finished(model.arrays(), False, measured, {})
        plans = [one.accepted.plan for one in taken]
        merged = merge_round(model, passed.accepted, self.settings)
        with self._lock:
            moved, step_state = advance(
                model, self._step_state, merged, self.settings, self.downlink, plans
            )
            self._pieces.clear()
            self._model = moved
        measured.update(merged.measurements)
        if passed.measurements:
            measured["steps"] = [dict(of_step) for of_step in passed.measurements]
        weights = round_weights(
            bound_weights([one.accepted for one in taken], self.settings), self.settings.weighting
        )
        auto = self._noise.look(measured, plans, weights, model, moved, self._step_state.auto)
        momenta = {**self._step_state.momenta, **passed.momenta}
        self._step_state = replace(step_state, auto=auto, momenta=momenta)
        self.tally.move()
        if self._kept is not None:
            self._kept.save(opened.number, moved, self._step_state, self.secret, self.downlink)
        return Finished(moved.arrays(), True, measured, answers, weights)

    def _opened(self) -> OpenRound:
        if self._open is None:
            raise ConfigError("no round is open; call open first")
        return self._open


def _payload(payloads: Mapping[str, Any], name: str, limit: int) -> bytes | None:
    """A payload of an answer, None where there is none; raises `UpdateError` for another kind."""
    found = payloads.get(name)
    if found is None:
        return None
    if not isinstance(found, bytes):
        raise UpdateError(
            f"payload {name!r} is a {type(found).__name__}; bytes are needed", reason="transport"
        )
    if len(found) > limit:
        raise UpdateError(
            f"payload {name!r} has {len(found)} bytes, the plan allows {limit}", reason="oversized"
        )
    return found


def _measured(
    opened: OpenRound,
    answers: Mapping[str, Answered],
    rejections: Sequence[Rejection],
    names: Mapping[int, str],
) -> dict[str, Any]:
    """What a round measured, as plain values; lists follow the accepted sites' order."""
    taken = list(answers.values())
    return {
        "round": opened.number,
        "seconds": time.monotonic() - opened.started,
        "sampled": len(opened.plans),
        "accepted": len(taken),
        "clients": list(answers),
        "update_bytes": [one.update_bytes for one in taken],
        "dense_bytes": [one.dense_bytes for one in taken],
        "download_bytes": [opened.download.get(site, 0) for site in opened.plans],
        "examples": [one.accepted.weight for one in taken],
        "drop_rates": [
            one.accepted.plan.drop_rate.p
            if one.accepted.plan.rates is None
            else 1 - one.accepted.plan.keep
            for one in taken
        ],
        "values": [one.accepted.plan.terms.values for one in taken],
        "delta_norms": [one.receipt.delta_norm for one in taken],
        "rejected": [{**asdict(one), "name": names[one.client]} for one in rejections],
    }
