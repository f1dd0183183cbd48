"""Rounds and buffers on a virtual clock: how long until which accuracy, over which bytes.

Ten clients or so, some of them slower at everything. What they learn is real
(`simulations.runs.small_classifier`), and so are the updates, their checks, the merges and the
versions down; only time is made up: a turn lasts as long as its bytes take over the client's line
and its training takes the client's machine (`simulations.runs.machines`).

``way`` says who waits. ``rounds``: a round ends when ``wait`` of its replies have come (0: all);
later ones are lost. ``buffer``: whenever ``buffer`` updates are there they are merged, and whoever
sent them begins again with the newest version; nobody waits for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.protocol import Broadcast
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.rounds.buffer import Buffer, BufferSettings
from dare_agg.rounds.buffered import buffered_plan, check_buffered, has_ranks, merged_masks
from dare_agg.rounds.chain import StepContext, chain
from dare_agg.rounds.client import ClientUpdate, make_client_update
from dare_agg.rounds.draws import round_secret, run_secret
from dare_agg.rounds.plan import RoundPlan, make_plans
from dare_agg.rounds.server import Accepted, Rejection, advance, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.staleness import staleness_step
from dare_agg.rounds.step import StepState, server_step
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.rounds.weight_bound import bound_step
from dare_agg.vectors.model import GlobalModel, global_model
from simulations.runs.clock import Clock
from simulations.runs.machines import Machine, make_machines
from simulations.runs.small_classifier import (
    Arrays,
    Rows,
    accuracy,
    base_and_clients,
    rows_of,
    train,
)


@dataclass
class World:
    """The clients' rows and machines, and what was measured as time went on."""

    settings: Mapping[str, Any]
    seed: int
    base: Arrays
    dealt: Sequence[Rows]
    machines: Sequence[Machine]
    curve: list[dict[str, Any]] = field(default_factory=list)
    up: int = 0
    down: int = 0
    answers: int = 0
    accepted: int = 0

    @property
    def federated(self) -> FederatedSettings:
        """What the server is set to."""
        words = self.settings
        terms = UpdateTerms(drop_rate=parse_drop_rate(words["drop_rate"]), values=words["values"])
        step = server_step(words["server_step"])
        return FederatedSettings(terms, server_step=step, scaling=words["scaling"])

    def answer(self, client: int, turn: int, plan: RoundPlan, start: GlobalModel) -> ClientUpdate:
        """What the client makes of ``start`` in its ``turn``-th turn, encoded as planned."""
        words = (self.settings["steps"], self.settings["batch"], self.settings["learning_rate"])
        arrays = arrays_of(start)
        tuned = train(arrays, self.dealt[client], *words, [self.seed, 4, client, turn])
        return make_client_update(plan, arrays, tuned)

    def sent(self, broadcast: Broadcast, model: GlobalModel) -> int:
        """Bytes of the payloads of a broadcast."""
        if broadcast.full:
            return 4 * model.delta.size
        return sum(map(len, broadcast.payloads.values()))

    def note(self, seconds: float, merges: int, model: GlobalModel) -> None:
        """Measure the model on all test rows."""
        self.curve.append(
            {
                "seconds": round(seconds, 1),
                "merges": merges,
                "updates": self.accepted,
                "accuracy": round(accuracy(arrays_of(model), rows_of("t10k")), 4),
                "upload_bytes": self.up,
                "download_bytes": self.down,
            }
        )


def run_row(row: Any) -> dict[str, Any]:
    """Run one (cell, seed); returns the curve of accuracy over virtual seconds and bytes."""
    settings = row.settings
    way = settings["way"]
    if way not in WAYS:
        raise ConfigError(f"way {way!r} is unknown{did_you_mean(way, WAYS)}")
    clients = settings["clients"]
    base, dealt = base_and_clients(row.seed, clients, settings["alpha"], settings["hidden"])
    machines = make_machines(
        clients, settings["slow"], settings["times"], settings["train_seconds"],
        settings["link_kbit_s"], row.seed,
    )  # fmt: skip
    world = World(settings, row.seed, base, dealt, machines)
    told = WAYS[way](world)
    return {
        "way": way,
        "accuracy": world.curve[-1]["accuracy"],
        "parameters": sum(array.size for array in base.values()),
        "updates": world.accepted,
        "upload_bytes": world.up,
        "download_bytes": world.down,
        "bytes_an_update": round(world.up / world.answers, 1),
        "curve": world.curve,
        **told,
    }


def in_rounds(world: World) -> dict[str, Any]:
    """Synchronous rounds: each as long as the last of the replies it waits for."""
    settings, federated = world.settings, world.federated
    secret, clients = run_secret(world.seed), range(settings["clients"])
    downlink = make_downlink(settings["downlink"])
    model, state = downlink.start(global_model(world.base)), StepState()
    have, now = [""] * len(clients), 0.0
    for number in range(1, settings["rounds"] + 1):
        plans = make_plans(
            round_secret(secret, number), number, [None] * len(clients), federated.terms, model.ref
        )
        turns = []
        for client, plan in zip(clients, plans, strict=True):
            down = world.sent(downlink.broadcast(model, have[client]), model)
            have[client] = model.ref.version
            update = world.answer(client, number, plan, model)
            seconds = world.machines[client].turn_seconds(number, down, update.nbytes)
            world.down += down
            turns.append((seconds, client, update))
        turns = sorted(turns, key=lambda turn: turn[0])[: settings["wait"] or None]
        now += turns[-1][0]
        accepted = []
        for _, client, update in turns:
            reply = check_reply(plans[client], update.blob, None, len(world.dealt[client]))
            assert not isinstance(reply, Rejection), reply.detail
            world.up += update.nbytes
            world.answers += 1
            accepted.append(reply)
        world.accepted += len(accepted)
        context = StepContext(model, federated, number, round_secret(secret, number))
        passed = chain(bound_step)(accepted, context).accepted
        merged = merge_round(model, passed, federated)
        used = [reply.plan for reply in passed]
        model, state = advance(model, state, merged, federated, downlink, used)
        world.note(now, number, model)
    return {}


def in_buffers(world: World) -> dict[str, Any]:
    """Every K updates are merged, and their clients begin again with what came out of it."""
    settings, federated = world.settings, world.federated
    secret, clock = run_secret(world.seed), Clock[tuple[int, int, RoundPlan, ClientUpdate]]()
    told = BufferSettings(settings["buffer"], settings["staleness"], settings["max_staleness"])
    check_buffered(federated, told, drop_rate=federated.terms.drop_rate)
    buffer = Buffer[Accepted](told, secret, has_ranks(federated))
    passing, turns = chain(staleness_step(told.rule), bound_step), [0] * len(world.machines)
    downlink = make_downlink(settings["downlink"])
    model, state = downlink.start(global_model(world.base)), StepState()
    have, taus, lost = [""] * len(turns), list[int](), 0

    def begin(client: int) -> None:
        turns[client] += 1
        ticket = buffer.ask(str(client), federated.terms.drop_rate)
        plan = buffered_plan(secret, ticket, federated.terms, model.ref)
        down = world.sent(downlink.broadcast(model, have[client]), model)
        have[client] = model.ref.version
        update = world.answer(client, turns[client], plan, model)
        seconds = world.machines[client].turn_seconds(turns[client], down, update.nbytes)
        world.down += down
        clock.after(seconds, (client, ticket.number, plan, update))

    for client in range(len(turns)):
        begin(client)
    while clock.now < settings["hours"] * 3600:
        client, number, plan, update = clock.next()
        world.up += update.nbytes
        world.answers += 1
        reply = check_reply(plan, update.blob, None, len(world.dealt[client]))
        assert isinstance(reply, Accepted), reply.detail
        if buffer.answer(number, reply).reason:
            lost += 1
        if buffer.full:
            entries, late = buffer.flush()
            lost += len(late)
            world.accepted += len(entries)
            taus += [buffer.merges - 1 - entry.ticket.version for entry in entries]
            key = round_secret(secret, buffer.merges)
            context = StepContext(model, federated, buffer.merges, key)
            passed = passing([entry.update for entry in entries], context).accepted
            merged = merge_round(model, passed, federated)
            masks = merged_masks([entry.update.plan for entry in entries], buffer.merges)
            model, state = advance(model, state, merged, federated, downlink, masks)
            if buffer.merges % settings["evaluate_every"] == 0:
                world.note(clock.now, buffer.merges, model)
        for rested in sorted(c for c in range(len(turns)) if buffer.is_free(str(c))):
            begin(rested)
    return {
        "lost": lost,
        "staleness": {"mean": round(float(np.mean(taus)), 2), "largest": max(taus)},
    }


def arrays_of(model: GlobalModel) -> Arrays:
    """The model's tensors."""
    return {name: np.asarray(array, np.float32) for name, array in model.arrays().items()}


# Who waits.
WAYS: Mapping[str, Callable[[World], dict[str, Any]]] = {
    "rounds": in_rounds,
    "buffer": in_buffers,
}
