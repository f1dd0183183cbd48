"""What travels between clients and server: one channel a method, all with the same five calls.

A channel holds the global model. `begin` hands it to the clients (and counts the bytes down),
`send` takes one client's trained state (and counts the bytes up), `finish` merges.

- `DareChannel`: the product's own round (`dare_agg.rounds.server`), with any downlink.
- `VectorChannel`: dense FedAvg, and the compressors of `simulations.runs.baselines`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError
from dare_agg.robust.rule import check_robust
from dare_agg.rounds.adapters import merge_products
from dare_agg.rounds.chain import UpdateStep
from dare_agg.rounds.robust import robust_step
from dare_agg.vectors.layout import FloatVector, fingerprint, layout_of
from simulations.runs.feedback import unsent

# Steps before the merge by a cell's ``lora_merge``, as the run config's lora-merge.
STEPS: Mapping[str, tuple[UpdateStep, ...]] = {"factors": (), "product": (merge_products,)}
HEAD = r"(^|\.)(head|classifier)\."
State = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one message or one round: the delta group's and the small dense head's."""

    delta: int
    dense: int


class Channel(Protocol):
    """What a federated run needs of a method."""

    size: int
    head_size: int

    def begin(self, number: int, clients: Sequence[int]) -> Traffic: ...
    def state(self) -> State: ...
    def send(self, client: int, tuned: State, weight: float) -> Traffic: ...
    def finish(self) -> None: ...
    def fingerprint(self) -> str: ...
    def measurements(self) -> dict[str, Any]: ...


def make_channel(settings: Mapping[str, Any], state: State, seed: int, clients: int) -> Channel:
    """Make the channel of a cell's ``method``."""
    if settings["method"] == "dare":
        return DareChannel(settings, state, seed, clients)
    return VectorChannel(settings, state, seed)


class VectorChannel:
    """Flat vectors, a compressor for the encoder, the head dense in float32, weighted mean."""

    def __init__(self, settings: Mapping[str, Any], state: State, seed: int) -> None:
        from simulations.runs.baselines import make_compressor

        is_head = re.compile(HEAD).search
        self._body = layout_of({n: a.shape for n, a in state.items() if not is_head(n)})
        self._head = layout_of({n: a.shape for n, a in state.items() if is_head(n)})
        self._names = tuple(state)
        self.size, self.head_size = self._body.size, self._head.size
        self._body_vector = self._body.flatten(state)
        self._head_vector = self._head.flatten(state)
        method = settings["method"]
        self._compressor = (
            None
            if method in ("fedavg", "head-only", "untouched")
            else make_compressor(method, self.size, seed, settings)
        )
        self._number = 0

    def begin(self, number: int, clients: Sequence[int]) -> Traffic:
        self._number = number
        self._sum = np.zeros(self.size, np.float32)
        self._head_sum = np.zeros(self.head_size, np.float32)
        self._weight = 0.0
        down = 4 * self.size
        if self._compressor is not None and self._compressor.down_bytes is not None:
            down = self._compressor.down_bytes
        return Traffic(down * len(clients), 4 * self.head_size * len(clients))

    def state(self) -> State:
        named = dict(self._body.unflatten(self._body_vector))
        named.update(self._head.unflatten(self._head_vector))
        return {name: named[name] for name in self._names}

    def send(self, client: int, tuned: State, weight: float) -> Traffic:
        delta = self._body.flatten(tuned)
        delta -= self._body_vector
        nbytes = 4 * self.size
        if self._compressor is not None:
            delta, nbytes = self._compressor.send(client, self._number, delta)
        delta *= np.float32(weight)
        self._sum += delta
        self._head_sum += np.float32(weight) * (self._head.flatten(tuned) - self._head_vector)
        self._weight += weight
        return Traffic(nbytes, 4 * self.head_size)

    def finish(self) -> None:
        share = np.float32(1 / self._weight)
        step = self._sum * share
        if self._compressor is not None:
            step = self._compressor.merge(step)
        self._body_vector += step
        self._head_vector += self._head_sum * share

    def fingerprint(self) -> str:
        layout = self._body if self.size else self._head
        return fingerprint(layout, self._body_vector if self.size else self._head_vector)

    def measurements(self) -> dict[str, Any]:
        return {}


class DareChannel:
    """The product's round: plans, encoded updates, checked replies, merge, server step."""

    def __init__(self, settings: Mapping[str, Any], state: State, seed: int, clients: int) -> None:
        from dare_agg.codec.derive import seed_secret
        from dare_agg.codec.mask import parse_drop_rate
        from dare_agg.downlink.ways import make_downlink
        from dare_agg.rounds.auto import AUTO, choices
        from dare_agg.rounds.settings import FederatedSettings
        from dare_agg.rounds.step import StepState, server_step
        from dare_agg.rounds.terms import UpdateTerms
        from dare_agg.vectors.model import global_model

        chosen = settings["drop_rate"] == AUTO
        rule = settings.get("robust", "")
        self._settings = FederatedSettings(
            UpdateTerms(
                drop_rate=parse_drop_rate("0.9" if chosen else str(settings["drop_rate"])),
                values=settings["values"],
                mask=settings["mask"],
                dense=(HEAD,),
                dense_values=settings["dense_values"],
                rescale=not settings["feedback"],
            ),
            method=settings["merge"],
            scaling=settings["scaling"],
            weighting=settings["weighting"],
            server_step=server_step(settings["server_step"], **settings["server_step_numbers"]),
            options=settings["merge_options"],
            shared_mask=settings["masks"] == "shared",
            robust=check_robust(rule, settings["byzantine"]) if rule else None,
        )
        self._independent = settings["masks"] == "independent"
        self._secret = seed_secret(seed)
        self._downlink = make_downlink(settings["downlink"], **settings["downlink_options"])
        self._model = self._downlink.start(global_model(state, dense=(HEAD,)))
        self._step_state = StepState()
        self._choices = choices(self._model.groups.layout) if chosen else None
        self._wanted = self._choices.first if self._choices else None
        self._norms: list[float] = []
        self.size = self._model.delta.size
        self.head_size = self._model.dense.size
        self._have = [self._model.ref.version] * clients
        self._fed = settings["feedback"]
        self._steps = STEPS[settings.get("lora_merge", "factors")]
        if self._settings.robust is not None:
            self._steps = (*self._steps, robust_step(self._settings.robust))
        self._attack = settings.get("attack", "none")
        draw = np.random.default_rng(np.random.SeedSequence([seed, 70]))
        liars = draw.permutation(clients)[: settings.get("byzantine", 0)]
        self._liars = set() if self._attack == "none" else set(map(int, liars))
        self._seed = seed
        # What each client of a round learned, while some of them lie, and what they claim.
        self._learned: dict[int, tuple[dict[str, FloatVector], float]] = {}
        self._residual: dict[int, FloatVector] = {}
        self._measured: list[dict[str, Any]] = []
        self._first = True

    def begin(self, number: int, clients: Sequence[int]) -> Traffic:
        from dare_agg.codec.derive import derive_key
        from dare_agg.rounds.plan import make_plans

        plans = make_plans(
            derive_key(self._secret, "round", number),
            number,
            [self._wanted] * len(clients),
            self._settings.terms,
            self._model.ref,
            shared_mask=self._settings.shared_mask,
        )
        if self._independent:
            plans = [
                replace(p, rank=0, mask_key=derive_key(self._secret, "own", number, p.client))
                for p in plans
            ]
        self._number = number
        self._plans = dict(zip(clients, plans, strict=True))
        self._accepted: list[Any] = []
        down = head = 0
        for client in clients:
            sent = self._downlink.broadcast(self._model, self._have[client])
            if sent.full:
                down += 4 * self.size
                head += 4 * self.head_size
            else:
                dense = sum(len(v) for k, v in sent.payloads.items() if "dense" in k)
                down += sum(len(v) for v in sent.payloads.values()) - dense
                head += dense
            self._have[client] = self._model.ref.version
        self._arrays = self._model.arrays()
        return Traffic(down, head)

    def state(self) -> State:
        return self._model.arrays()

    def send(self, client: int, tuned: State, weight: float) -> Traffic:
        from dare_agg.rounds.client import make_client_update
        from dare_agg.rounds.server import Rejection, check_reply

        plan = self._plans[client]
        if self._fed:
            tuned = self._with_residual(client, tuned)
        sent = make_client_update(plan, self._arrays, tuned)
        reply = check_reply(plan, sent.blob, sent.dense_blob, weight)
        if isinstance(reply, Rejection):
            raise ConfigError(f"client {client} rejected: {reply.reason}: {reply.detail}")
        if self._fed:
            self._keep_residual(client, tuned, reply.update)
        if self._liars:
            groups = self._model.groups
            whole = {
                "delta": groups.layout.flatten(tuned),
                "dense": groups.dense_layout.flatten(tuned),
            }
            whole["delta"] -= self._model.delta
            whole["dense"] -= self._model.dense
            self._learned[client] = whole, weight
        if client not in self._liars:
            self._accepted.append(reply)
        self._norms.append(sent.delta_norm)
        return Traffic(len(sent.blob), len(sent.dense_blob or b""))

    def _with_residual(self, client: int, tuned: State) -> State:
        if client not in self._residual:
            return tuned
        layout = self._model.groups.layout
        vector = layout.flatten(tuned)
        vector += self._residual[client]
        return {**tuned, **layout.unflatten(vector)}

    def _keep_residual(self, client: int, tuned: State, update: Any) -> None:
        wanted = self._model.groups.layout.flatten(tuned)
        wanted -= self._model.delta
        self._residual[client] = unsent(update, wanted)

    def _lie(self) -> None:
        """Let the round's liars answer, now that they have seen what all others learned."""
        from dare_agg.rounds.client import make_client_update
        from dare_agg.rounds.server import Accepted, check_reply
        from simulations.runs.attacks import ATTACKS, Known

        liars = [client for client in self._learned if client in self._liars]
        honest = [client for client in self._learned if client not in self._liars]
        groups, row = self._model.groups, ATTACKS[self._attack]
        sent: dict[int, dict[str, NDArray[Any]]] = {client: {} for client in liars}
        for name, layout in (("delta", groups.layout), ("dense", groups.dense_layout)):
            known = Known(
                np.stack([self._learned[client][0][name] for client in honest]),
                np.stack([self._learned[client][0][name] for client in liars]),
                np.random.default_rng(np.random.SeedSequence([self._seed, 71, self._number])),
                lambda delta: 0.0,
                lambda delta: 0.0,
            )
            base = self._model.delta[:] if name == "delta" else self._model.dense
            for client, delta in zip(liars, row.send(known), strict=True):
                sent[client].update(layout.unflatten(base + delta))
        for client in liars:
            update = make_client_update(
                self._plans[client], self._arrays, {**self._arrays, **sent[client]}
            )
            weight = self._learned[client][1] * row.weight
            reply = check_reply(self._plans[client], update.blob, update.dense_blob, weight)
            assert isinstance(reply, Accepted)
            self._accepted.append(reply)
        self._accepted.sort(key=lambda accepted: accepted.plan.client)
        self._learned.clear()

    def finish(self) -> None:
        from dare_agg.rounds.chain import StepContext, chain
        from dare_agg.rounds.server import advance, merge_round

        if self._liars:
            self._lie()
        names = {plan.client: str(client) for client, plan in self._plans.items()}
        momenta = self._step_state.momenta
        context = StepContext(
            self._model, self._settings, self._number, self._secret, names, momenta
        )
        passed = chain(*self._steps)(self._accepted, context)
        merged = merge_round(self._model, passed.accepted, self._settings)
        plans = [reply.plan for reply in self._accepted]
        noise = self._judge(merged, plans)
        self._model, self._step_state = advance(
            self._model, self._step_state, merged, self._settings, self._downlink, plans
        )
        momenta = {**momenta, **passed.momenta}
        self._step_state = replace(self._step_state, momenta=momenta)
        kept = ("survivors_per_element", "merged_norm")
        measured = {k: round(merged.measurements[k], 6) for k in kept}
        self._measured.append(measured | noise)
        self._accepted, self._norms = [], []

    def _judge(self, merged: Any, plans: Sequence[Any]) -> dict[str, Any]:
        """The noise of the round, and what was sent; the next round's terms where it chooses."""
        from dare_agg.rounds.auto import judge, next_terms
        from dare_agg.rounds.noise import error_of_plan, is_held_by_weights, norm_of
        from dare_agg.rounds.server import round_weights

        held = is_held_by_weights(self._settings, self._model.groups)
        judged = judge(
            self._norms,
            # Of the clients: a step may have made one update of several.
            round_weights(self._accepted, self._settings.weighting),
            [error_of_plan(plan) for plan in plans],
            self._settings,
            norm_of(self._model.delta) if held else None,
            merged.measurements["merged_norm"],
        )
        if judged is None:
            return {}
        noise = {
            "noise": judged.of_weights(judged.error),
            "noise_of_change": judged.of_change(judged.error),
        }
        found: dict[str, Any] = {k: round(v, 5) for k, v in noise.items() if v is not None}
        if self._choices is not None and self._wanted is not None:
            found["sent"] = f"{self._wanted.drop_rate} {self._wanted.values}"
            self._wanted = next_terms(self._choices, self._wanted, judged)
        return found

    def fingerprint(self) -> str:
        return self._model.ref.version

    def measurements(self) -> dict[str, Any]:
        return {"rounds": self._measured}
