"""A federation with Byzantine clients, in this process: the real codec, plans, steps and merge.

Digits, label skew, f of n clients under one attack. Clients' deltas are encoded and checked as in
any round; the server's chain holds the rule. ``clean`` is the plain mean's accuracy at the same
drop rate and seed with n honest clients and the same shared mask, ``clean_rotated`` with masks of
their own, as the product does without a rule.

With ``groups`` the rule compares the means of so many groups, as over secure sums (their fixed
point aside): each liar has a group to itself, whose mean it makes what it likes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import NonFiniteError
from simulations.runs import digits
from simulations.runs.attacks import ATTACKS, Known
from simulations.runs.flower_rules import FLOWER_RULES, flower_merge

_LOCAL = ("drop_rate", "values", "rounds", "steps", "batch", "rate", "alpha")
_GROUPED = ("groups", "division")


def run_row(row: Any) -> dict[str, Any]:
    """Run one (cell, seed); returns accuracy, and that of the plain mean without an attack."""
    settings = row.settings
    local = tuple((key, settings[key]) for key in _LOCAL)
    grouped = tuple((key, settings[key]) for key in _GROUPED if key in settings)
    found = dict(_run(settings["rule"], settings["attack"], settings["n"], settings["f"], row.seed,
                      (*local, *grouped)))  # fmt: skip
    clean = _run("mean", "none", settings["n"], 0, row.seed, local)
    rotated = _run("mean-rotated", "none", settings["n"], 0, row.seed, local)
    return {
        "rule": settings["rule"],
        "attack": settings["attack"],
        "n": settings["n"],
        "f": settings["f"],
        "drop_rate": settings["drop_rate"],
        **dict(grouped),
        **found,
        "clean": clean["accuracy"],
        "clean_rotated": rotated["accuracy"],
        "parameters": 15_010,
    }


@lru_cache(maxsize=256)
def _run(
    rule: str, attack: str, n: int, f: int, seed: int, local: tuple[tuple[str, Any], ...]
) -> Mapping[str, Any]:
    from client.partition import dirichlet

    words = dict(local)
    parts = dirichlet(digits.load_digits().train_labels, n, words["alpha"], seed)
    bad = sorted(np.random.default_rng(np.random.SeedSequence([seed, 70])).permutation(n)[:f])
    row = ATTACKS[attack]
    poisons = [row.poison if client in bad else digits.Poison() for client in range(n)]
    weights = [float(part.size) for part in parts]
    most = max(weights)
    for client in bad:
        if row.weight > 1:
            weights[client] = row.weight * most
    make = FlowerServer if rule in FLOWER_RULES else DareServer
    # Of groups each counts alike, and the liars are in the first f.
    groups = words.get("groups", 0)
    server = make(rule, groups or n, f, seed, words)
    liars = range(f) if groups else bad
    division = _division(bad, n, groups, seed)
    ended: dict[str, int] = {}
    for number in range(1, words["rounds"] + 1):
        state = server.state()
        tuned = digits.train(
            state, parts, poisons, steps=words["steps"], batch=words["batch"],
            rate=words["rate"], seed=(seed, 61, number),
        )  # fmt: skip
        deltas = np.stack([server.flat(one) - server.flat(state) for one in tuned])
        if groups:
            if words["division"] == "redrawn":
                division = _division(bad, n, groups, seed, number)
            deltas = np.stack([deltas[group].mean(axis=0) for group in division])
            weights = [1.0] * groups
        server.begin(number)
        if f and attack != "none":
            honest = [client for client in range(len(deltas)) if client not in liars]
            known = Known(
                deltas[honest],
                deltas[liars],
                np.random.default_rng(np.random.SeedSequence([seed, 71, number])),
                partial(_distance, server, deltas, weights, liars, honest),
                partial(_loss, server, deltas, weights, liars),
            )
            deltas[liars] = row.send(known)
        try:
            server.finish(deltas, weights)
        except NonFiniteError:
            # The model is so far gone that nobody can write an update of it: it stays as it is.
            ended = {"ended": number}
            break
    state = server.state()
    told = {"accuracy": round(digits.accuracy(state), 4), **ended}
    if row.poison.stamp:
        told["backdoor"] = round(digits.backdoor_success(state), 4)
    return told


def _division(
    bad: Sequence[int], n: int, groups: int, seed: int, number: int = 0
) -> list[NDArray[np.int64]]:
    """The clients of each group, sizes one apart; each liar is in a group of its own."""
    draw = np.random.default_rng(np.random.SeedSequence([seed, 72, number]))
    others = draw.permutation([client for client in range(n) if client not in bad])
    order = np.array([*bad, *others])
    return [order[group::groups] for group in range(groups)]


def _distance(
    server: Any,
    deltas: NDArray[np.float32],
    weights: Sequence[float],
    bad: Sequence[int],
    honest: Sequence[int],
    candidate: NDArray[np.float32],
) -> float:
    """How far the rule's result is from that of honest clients alone, if this were sent."""
    tried = deltas.copy()
    tried[bad] = candidate
    result = server.result(tried, weights)
    fair = server.masked(deltas[honest].mean(axis=0))
    return float(np.linalg.norm(result.astype(np.float64) - fair))


def _loss(
    server: Any,
    deltas: NDArray[np.float32],
    weights: Sequence[float],
    bad: Sequence[int],
    candidate: NDArray[np.float32],
) -> float:
    """The loss of the model that the rule would leave, if this were sent."""
    tried = deltas.copy()
    tried[bad] = candidate
    return digits.loss(server.moved(server.result(tried, weights)))


class FlowerServer:
    """One of Flower's own strategies: whole models in float32."""

    def __init__(self, rule: str, n: int, f: int, seed: int, words: Mapping[str, Any]) -> None:
        from dare_agg.vectors.layout import layout_of

        self._rule, self._f = rule, f
        state = digits.initial_state(seed)
        self._layout = layout_of({name: array.shape for name, array in state.items()})
        self._vector = self.flat(state)

    def flat(self, state: digits.State) -> NDArray[np.float32]:
        return self._layout.flatten(state)

    def state(self) -> digits.State:
        return self._layout.unflatten(self._vector)

    def begin(self, number: int) -> None:
        pass

    def masked(self, delta: NDArray[np.float32]) -> NDArray[np.float32]:
        return delta

    def result(self, deltas: NDArray[np.float32], weights: Sequence[float]) -> Any:
        models = [self._layout.unflatten(self._vector + delta) for delta in deltas]
        return self.flat(flower_merge(self._rule, models, weights, self._f)) - self._vector

    def moved(self, result: NDArray[np.float32]) -> digits.State:
        return self._layout.unflatten(self._vector + result)

    def finish(self, deltas: NDArray[np.float32], weights: Sequence[float]) -> None:
        self._vector = self._vector + self.result(deltas, weights)


@dataclass
class DareServer:
    """The product's round, with a rule or (``mean``) without."""

    rule: str
    n: int
    f: int
    seed: int
    words: Mapping[str, Any]

    def __post_init__(self) -> None:
        from dare_agg.codec.derive import seed_secret
        from dare_agg.robust.rule import robust_rule
        from dare_agg.rounds.chain import chain
        from dare_agg.rounds.robust import robust_step
        from dare_agg.rounds.settings import FederatedSettings
        from dare_agg.rounds.step import StepState
        from dare_agg.rounds.terms import UpdateTerms
        from dare_agg.rounds.weight_bound import bound_step
        from dare_agg.vectors.model import global_model

        robust = None if self.rule.startswith("mean") else robust_rule(self.rule, self.f)
        terms = UpdateTerms(drop_rate=self.words["drop_rate"], values=self.words["values"])
        shared = self.rule != "mean-rotated"
        self._settings = FederatedSettings(terms, robust=robust, shared_mask=shared)
        self._chain = chain(bound_step, *([robust_step(robust)] if robust else []))
        self._secret = seed_secret(self.seed)
        self._model = global_model(digits.initial_state(self.seed))
        self._step_state = StepState()
        self._momenta: dict[str, Any] = {}

    def flat(self, state: digits.State) -> NDArray[np.float32]:
        return self._model.groups.layout.flatten(state)

    def state(self) -> digits.State:
        return self._model.arrays()

    def begin(self, number: int) -> None:
        from dare_agg.codec.derive import derive_key
        from dare_agg.rounds.plan import make_plans

        self._number = number
        self._plans = make_plans(
            derive_key(self._secret, "round", number),
            number,
            [None] * self.n,
            self._settings.terms,
            self._model.ref,
            shared_mask=self._settings.shared_mask,
        )
        self._mask = self._plans[0].spec().draw_mask()
        self._at = self._mask.indices(0, self._mask.size)

    def masked(self, delta: NDArray[np.float32]) -> NDArray[np.float32]:
        """A delta as `result` is of: its survivors, or all of it where momentum is."""
        if self._settings.robust is not None and self._settings.robust.beta:
            return delta
        return self._kept(delta[None])[0]

    def _kept(self, deltas: NDArray[np.float32], scale: float = 0) -> NDArray[np.float32]:
        """The survivors of deltas under the round's shared mask, rescaled by 1/(1−p), or not."""
        keep = self._settings.terms.drop_rate.keep
        return np.ascontiguousarray(deltas[:, self._at] * np.float32(scale or 1 / keep))

    def result(self, deltas: NDArray[np.float32], weights: Sequence[float]) -> Any:
        """What the rule would make of these, before they are coded."""
        from dare_agg.codec.masked import MaskedSource
        from dare_agg.robust.aggregate import aggregate
        from dare_agg.vectors.sources import DeltaSource, array_source

        sources: list[DeltaSource]
        robust = self._settings.robust
        if robust is None:
            return np.average(self._kept(deltas), axis=0, weights=weights)
        momenta = [self._momenta.get(str(client)) for client in range(self.n)]
        # Without momentum a rule looks at survivors alone.
        sources = [array_source(one) for one in self._kept(deltas)]
        if robust.beta:
            sources = [MaskedSource(self._mask, one) for one in self._kept(deltas, 1)]
        found = aggregate(sources, weights, robust, (0,), momenta if robust.beta else None)
        whole = np.empty(found.delta.size, np.float32)
        found.delta.read(0, whole.size, whole)
        return whole

    def moved(self, result: NDArray[np.float32]) -> digits.State:
        """The model after a ``result``: of survivors, or of all elements."""
        layout = self._model.groups.layout
        vector = layout.flatten(self.state())
        if result.size == vector.size:
            vector += result
        else:
            vector[self._at] += result
        return layout.unflatten(vector)

    def finish(self, deltas: NDArray[np.float32], weights: Sequence[float]) -> None:
        from dare_agg.codec.update import encode_update
        from dare_agg.rounds.chain import StepContext
        from dare_agg.rounds.server import advance, check_reply, merge_round

        accepted = [
            check_reply(plan, encode_update(plan.spec(), delta), None, weight)
            for plan, delta, weight in zip(self._plans, deltas, weights, strict=True)
        ]
        context = StepContext(
            self._model, self._settings, self._number, self._secret,
            {plan.client: str(plan.client) for plan in self._plans}, self._momenta,
        )  # fmt: skip
        passed = self._chain(accepted, context)  # type: ignore[arg-type]
        merged = merge_round(self._model, passed.accepted, self._settings)
        self._model, self._step_state = advance(
            self._model, self._step_state, merged, self._settings, plans=self._plans
        )
        self._momenta = {**self._momenta, **passed.momenta}


__all__ = ["run_row"]
