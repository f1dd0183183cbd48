"""Thousands of clients over a day: they come and go, some lie about their weight, a buffer merges.

The server is the product's own (`dare_agg.rounds`, the version downlink), its time is measured; the
clients' day is made up (`simulations.runs.crowd`). All learn `simulations.runs.small_classifier`
from rows of their own: 5 to 200 pictures by a mixture of labels, drawn anew from the client's seed
at each turn, so that a client takes no memory. ``liars`` is the share of clients who report
``lie`` times the rows they have; with ``flip`` they learn wrong labels, too.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.server import VersionDownlink
from dare_agg.robust.rule import check_robust
from dare_agg.rounds.buffer import Buffer, BufferSettings
from dare_agg.rounds.buffered import buffered_plan, check_buffered, has_ranks, merged_masks
from dare_agg.rounds.chain import StepContext, chain
from dare_agg.rounds.client import ClientUpdate, make_client_update
from dare_agg.rounds.draws import round_secret, run_secret
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.robust import robust_step
from dare_agg.rounds.server import Accepted, advance, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.staleness import staleness_step
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.rounds.weight_bound import bound_step
from dare_agg.vectors.model import global_model
from simulations.runs.asynchronous import arrays_of
from simulations.runs.clock import Clock
from simulations.runs.crowd import Crowd
from simulations.runs.machines import MESSAGE_BYTES
from simulations.runs.memory import memory_of
from simulations.runs.small_classifier import (
    CLASSES,
    PUBLIC_ROWS,
    Arrays,
    Rows,
    accuracy,
    new_arrays,
    rows_of,
    train,
)

HOUR = 3600.0
FEWEST_ROWS, MOST_ROWS = 5, 200


def run_row(row: Any) -> dict[str, Any]:
    """One day of one (cell, seed): accuracy, memory and time of the server by the hour."""
    settings = row.settings
    server, crowd = Server(settings, row.seed), Clients(settings, row.seed)
    people = Crowd(settings["clients"], HOUR * settings["stay"], HOUR * settings["away"], row.seed)
    clock: Clock[tuple[str, int, int, tuple[RoundPlan, ClientUpdate] | None]] = Clock()
    for seconds, client, comes in people.first():
        clock.after(seconds, ("come" if comes else "leave", client, 0, None))
    for hour in range(1, settings["hours"] + 1):
        clock.after(HOUR * hour, ("hour", 0, hour, None))
    hours: list[dict[str, Any]] = []
    open_plans: dict[int, int] = {}
    have: dict[int, str] = {}
    met: set[int] = set()
    answers = visits = 0

    while len(hours) < settings["hours"]:
        kind, client, number, work = clock.next()
        if kind == "hour":
            hours.append(server.measured(number))
        elif kind == "come":
            seconds, came = people.come(client, clock.now)
            visits += came
            clock.after(seconds, ("leave" if came else "come", client, 0, None))
        elif kind == "leave":
            clock.after(people.leave(client), ("come", client, 0, None))
            if client in open_plans:
                server.lose(open_plans.pop(client))
        elif open_plans.get(client) == number and work is not None:
            del open_plans[client]
            answers += 1
            met.add(client)
            server.take(number, *work, crowd.claimed(client))
        tries = 0
        while len(open_plans) < settings["at_once"] and people.present and tries < 20:
            tries += 1
            asked = people.drawn()
            if not server.buffer.is_free(str(asked)):
                continue
            plan, down = server.plan(asked, have.get(asked, ""))
            have[asked] = server.model.ref.version
            open_plans[asked] = plan.client
            update = crowd.answer(asked, plan, server.arrays)
            seconds = crowd.turn_seconds(asked, plan.client, down + update.nbytes)
            clock.after(seconds, ("answer", asked, plan.client, (plan, update)))
    return {
        "accuracy": hours[-1]["accuracy"],
        "base": server.base_accuracy,
        "parameters": server.model.delta.size,
        "clients_met": len(met),
        "visits": visits,
        "answers": answers,
        "merges": server.buffer.merges,
        "merges_a_minute": round(server.buffer.merges / (60 * settings["hours"]), 3),
        "counts": dict(server.counts),
        "bytes_an_update": round(server.up / answers, 1),
        "bytes_down_a_plan": round(server.down / server.plans, 1),
        "seconds_a_merge": [
            round(float(q), 4) for q in np.quantile(server.merging, (0.5, 0.95, 1))
        ],
        "server_seconds_a_merge": round(server.seconds / server.buffer.merges, 4),
        "most_open": server.most_open,
        "hours": hours,
    }


class Clients:
    """What clients have, how fast they are, and what they answer and claim."""

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        self._words, self._seed = settings, seed
        every = rows_of("train")
        order = np.random.default_rng([seed, 2]).permutation(len(every))[PUBLIC_ROWS:]
        self._pools = [order[every.labels[order] == label] for label in range(CLASSES)]

    def _own(self, client: int) -> tuple[np.random.Generator, int]:
        draw = np.random.default_rng([self._seed, 31, client])
        return draw, int(np.clip(draw.lognormal(np.log(20), 1.0), FEWEST_ROWS, MOST_ROWS))

    def is_liar(self, client: int) -> bool:
        """Whether a client reports more than it has."""
        return bool(np.random.default_rng([self._seed, 32, client]).random() < self._words["liars"])

    def claimed(self, client: int) -> float:
        """The rows that a client says it learned from."""
        return self._own(client)[1] * (self._words["lie"] if self.is_liar(client) else 1)

    def rows(self, client: int) -> Rows:
        """The rows of a client, the same each time."""
        draw, count = self._own(client)
        mixture = draw.dirichlet(np.full(CLASSES, self._words["alpha"]))
        labels = draw.choice(CLASSES, count, p=mixture)
        rows = rows_of("train").take(
            np.array([draw.choice(self._pools[label]) for label in labels], np.int64)
        )
        if self._words["flip"] and self.is_liar(client):
            return Rows(rows.inputs, CLASSES - 1 - rows.labels)
        return rows

    def answer(self, client: int, plan: RoundPlan, start: Arrays) -> ClientUpdate:
        """What a client makes of ``start``, as planned."""
        words = (self._words["steps"], self._words["batch"], self._words["learning_rate"])
        tuned = train(start, self.rows(client), *words, [self._seed, 33, plan.client])
        return make_client_update(plan, start, tuned)

    def turn_seconds(self, client: int, number: int, nbytes: int) -> float:
        """Seconds of a turn: machines and lines differ about tenfold, turns of one a little."""
        own = np.random.default_rng([self._seed, 34, client])
        slowness, line = own.lognormal(0, 0.8), own.lognormal(np.log(50_000), 0.8)
        spread = np.random.default_rng([self._seed, 35, number]).lognormal(0, 0.1)
        training = 60 * self._words["minutes"] * slowness * spread
        return float(training + (nbytes + MESSAGE_BYTES) / line)


class Server:
    """The product's server with a buffer; ``seconds`` of CPU time and bytes are counted."""

    def __init__(self, settings: Mapping[str, Any], seed: int) -> None:
        robust = settings["robust"]
        self._federated = FederatedSettings(
            UpdateTerms(drop_rate=parse_drop_rate(settings["drop_rate"]), values="b1"),
            weighting=settings["weighting"],
            weight_bound=settings["weight_bound"],
            scaling=settings["scaling"],
            robust=check_robust(robust, settings["byzantine"]) if robust else None,
        )
        told = BufferSettings(settings["buffer"], settings["staleness"], settings["max_staleness"])
        terms, rule = self._federated.terms, self._federated.robust
        check_buffered(self._federated, told, drop_rate=terms.drop_rate)
        self._secret = run_secret(seed)
        self.buffer = Buffer[Accepted](told, self._secret, has_ranks(self._federated))
        steps = (robust_step(rule),) if rule is not None else ()
        self._passing = chain(staleness_step(told.rule), bound_step, *steps)
        self._downlink = VersionDownlink(keep_bytes=settings["keep_bytes"])
        base = _base(seed)
        self.model, self._state = self._downlink.start(global_model(base)), StepState()
        self.arrays = arrays_of(self.model)
        self.base_accuracy = round(accuracy(base, rows_of("t10k")), 4)
        self.counts: Counter[str] = Counter()
        self.merging: list[float] = []
        self.seconds = 0.0
        self.up = self.down = self.plans = self.most_open = 0

    def plan(self, client: int, have: str) -> tuple[RoundPlan, int]:
        """Ask a client that holds version ``have``; its plan, and the bytes it is sent."""
        began = time.thread_time()
        ticket = self.buffer.ask(str(client), self._federated.terms.drop_rate)
        plan = buffered_plan(self._secret, ticket, self._federated.terms, self.model.ref)
        payloads = self._downlink.broadcast(self.model, have).payloads
        self.seconds += time.thread_time() - began
        down = sum(map(len, payloads.values()))
        self.down += down
        self.plans += 1
        self.most_open = max(self.most_open, len(self.buffer.in_flight) + len(self.buffer.held))
        return plan, down

    def lose(self, number: int) -> None:
        """A client left before it answered."""
        self.buffer.lose(number, rest=False)
        self.counts["left"] += 1

    def take(self, number: int, plan: RoundPlan, update: ClientUpdate, claimed: float) -> None:
        """Check an answer, and merge where that fills the buffer."""
        began = time.thread_time()
        reply = check_reply(plan, update.blob, update.dense_blob, claimed)
        self.up += update.nbytes
        if isinstance(reply, Accepted):
            self.counts[self.buffer.answer(number, reply).reason or "kept"] += 1
        else:
            self.buffer.lose(number, reply.reason)
            self.counts[reply.reason] += 1
        if self.buffer.full:
            self._merge()
        self.seconds += time.thread_time() - began

    def _merge(self) -> None:
        began = time.thread_time()
        entries, late = self.buffer.flush()
        self.counts["stale"] += len(late)
        number = self.buffer.merges
        key = derive_key(round_secret(self._secret, number), "steps", length=32)
        context = StepContext(self.model, self._federated, number, key)
        passed = self._passing([entry.update for entry in entries], context)
        merged = merge_round(self.model, passed.accepted, self._federated)
        masks = merged_masks([entry.update.plan for entry in entries], number)
        self.model, self._state = advance(
            self.model, self._state, merged, self._federated, self._downlink, masks
        )
        self.arrays = arrays_of(self.model)
        self.merging.append(time.thread_time() - began)

    def measured(self, hour: int) -> dict[str, Any]:
        """What is to be told at an hour's end."""
        return {
            "hour": hour,
            "accuracy": round(accuracy(self.arrays, rows_of("t10k")), 4),
            "merges": self.buffer.merges,
            "own_mib": round(memory_of()[0] / 2**20, 1),
            "kept_steps_bytes": sum(step.nbytes for step in self._downlink.steps),
        }


def _base(seed: int) -> Arrays:
    every = rows_of("train")
    order = np.random.default_rng([seed, 2]).permutation(len(every))
    public = every.take(order[:PUBLIC_ROWS])
    return train(new_arrays(seed), public, 300, 32, 0.1, [seed, 3])
