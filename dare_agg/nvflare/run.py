"""The server's half of a job: rounds over sites, known to NVFlare by name, without NVFlare.

A round is opened for some sites, who are each given an order; they pull what they lack of the
version (`Run.piece`), and answer with an update or a reason; at its end what is accepted is
merged. As under Flower: the same clients, named alike and with the same seed, make the same bits.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dare_agg.codec.derive import derive_key
from dare_agg.downlink.base import BASE_VERSION
from dare_agg.downlink.protocol import FullDownlink
from dare_agg.errors import ConfigError, DareError, RunError, UpdateError
from dare_agg.nvflare.answers import judge
from dare_agg.nvflare.open_round import Finished, OpenRound, round_measured
from dare_agg.nvflare.payloads import Pieces
from dare_agg.nvflare.resume import KeptRun
from dare_agg.nvflare.words import CALLED, Words
from dare_agg.rounds.chain import StepContext, chain
from dare_agg.rounds.directions import linears_of_round
from dare_agg.rounds.draws import drawn_places, round_secret, run_secret
from dare_agg.rounds.messages import ASK_TRAIN, Hello, Order, one_line
from dare_agg.rounds.missed import Tally
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.robust import check_one_mask, robust_step
from dare_agg.rounds.round_noise import RoundNoise
from dare_agg.rounds.server import (
    Rejection,
    advance,
    merge_round,
    round_weights,
)
from dare_agg.rounds.step import StepState
from dare_agg.rounds.weight_bound import bound_step, bound_weights
from dare_agg.vectors.model import Arrays, GlobalModel, global_model


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
        if self._least > clients:
            raise ConfigError(
                f"min_replies = {self._least}, and {clients} sites take part in a round; raise "
                "min_clients, or lower it"
            )
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
                known = {self.downlink.facts().get(BASE_VERSION, ""), version, *self._parents()}
                have = have if have in known else ""
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
            layout, weighting = self.model.groups.layout, self.settings.weighting
            found = judge(opened.plans[site], layout, weighting, record, payloads, weight, metrics)
        except DareError as error:
            found = Rejection(opened.plans[site].client, error.reason, str(error))
        if isinstance(found, Rejection):
            self.reject(site, found.reason, found.detail)
            return False
        opened.answers[site] = found
        return True

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
        measured = round_measured(opened, answers, rejections, names)
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
