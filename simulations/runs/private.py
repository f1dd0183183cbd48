"""Federated training with privacy of clients: accuracy by ε, number of clients and drop rate.

Ways: ``central`` (`dare_agg.rounds.private`; with ``apart`` clients are not sampled but come so
many rounds apart), ``secure`` (noise of the parties inside a secure sum,
`simulations.runs.keyless`; all take part in every round), ``flower`` (Flower's own server-side
wrapper with fixed clipping around its FedAvg, dense), ``none`` (no privacy). All share base, data,
rounds and seeds; the network is `simulations.runs.small_classifier`. Poisson sampling, as the
accountant counts it; Flower's wrapper samples a fixed number, so that its ε is only what ours
would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.privacy.accountant import default_delta, noise_for
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.privacy.sharing import SharedPrivacy
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.private import private_round
from dare_agg.rounds.server import MergedRound, Rejection, advance, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.secure.result import merged_sum
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.model import GlobalModel, global_model
from simulations.runs.keyless import keyless_sum, keys_of, noised_terms, roster_of
from simulations.runs.quiet import quiet_flower
from simulations.runs.small_classifier import (
    Arrays,
    accuracy,
    base_and_clients,
    rows_of,
    train_each,
)

# Clients that train in one go.
_AT_ONCE = 50
Trainer = Callable[[Arrays, Sequence[int], int], list[Arrays]]


def run_row(row: Any) -> dict[str, Any]:
    """Train by one way and measure the accuracy on all test rows at the end."""
    settings = row.settings
    way = settings["way"]
    if way not in WAYS:
        raise ConfigError(f"way {way!r} is unknown{did_you_mean(way, WAYS)}")
    base, dealt = base_and_clients(row.seed, settings["clients"], settings["alpha"])

    def trained(arrays: Arrays, chosen: Sequence[int], number: int) -> list[Arrays]:
        words = (settings["steps"], settings["batch"], settings["learning_rate"])
        seeds = [[row.seed, 4, number, client] for client in chosen]
        return train_each(arrays, [dealt[client] for client in chosen], *words, seeds)

    found = WAYS[way](settings, row.seed, base, trained)
    test = rows_of("t10k")
    return {
        "way": way,
        "epsilon": settings["epsilon"],
        "clients": settings["clients"],
        "drop_rate": settings["drop_rate"],
        "accuracy": round(accuracy(found.pop("arrays"), test), 4),
        "base": round(accuracy(base, test), 4),
        "parameters": sum(array.size for array in base.values()),
        **found,
    }


def by_rounds(
    settings: Mapping[str, Any], seed: int, base: Arrays, trained: Trainer
) -> dict[str, Any]:
    """Our rounds, with and without privacy."""
    rate, clients = settings["rate"], settings["clients"]
    terms = UpdateTerms(
        drop_rate=parse_drop_rate(settings["drop_rate"]), values=settings["values"], dense=()
    )
    federated = FederatedSettings(terms, weighting="equal", shared_mask=True)
    private = settings["way"] == "central"
    keep = 1 - terms.drop_rate.p
    # A norm of the survivors as they are summed: the drop makes it longer.
    clip = settings["clip"] / keep**0.5
    run = ClientPrivacy(
        clients,
        settings["epsilon"] if private else 8.0,
        clip=clip,
        quantile=settings["quantile"],
        noise=0.0 if private else 1.0,
        apart=settings.get("apart", 0),
    ).begin(settings["rounds"], rate)
    names = [f"client {client}" for client in range(clients)]
    model, state = global_model(base, dense=(), exclude=()), StepState()
    sent: list[int] = []
    for number in range(1, settings["rounds"] + 1):
        drawn = np.random.default_rng([seed, 5, number]).random(clients) < rate
        if run.budget.apart:
            drawn = np.array(run.drawn(number, names))
        chosen = [int(client) for client in np.flatnonzero(drawn)]
        secret = derive_key(seed_secret(seed), "round", number, length=32)
        plans = make_plans(
            secret, number, [None] * max(1, len(chosen)), terms, model.ref, shared_mask=True
        )
        arrays = _arrays(model)
        accepted = []
        for tuned, plan in zip(trained(arrays, chosen, number), plans, strict=False):
            update = make_client_update(plan, arrays, tuned)
            sent.append(update.nbytes)
            reply = check_reply(plan, update.blob, update.dense_blob, 1)
            if isinstance(reply, Rejection):
                raise AssertionError(reply.detail)
            accepted.append(reply)
        if private:
            who = [names[client] for client in chosen]
            merged = private_round(model, plans[0], accepted, federated, run, who)
        elif accepted:
            merged = merge_round(model, accepted, federated)
        else:
            continue
        model, state = advance(model, state, merged, federated)
    return {
        "arrays": _arrays(model),
        "bytes": round(float(np.mean(sent))),
        "noise": run.budget.noise if private else 0.0,
        "delta": run.budget.delta,
        "spent": round(run.epsilon, 4) if private else None,
        "norm": run.budget.norm(settings["rounds"] + 1, clip) if private else None,
    }


def by_secure_sums(
    settings: Mapping[str, Any], seed: int, base: Arrays, trained: Trainer
) -> dict[str, Any]:
    """Rounds of secure sums of all clients, each with its share of the noise."""
    members, rounds, rate = settings["clients"], settings["rounds"], settings["drop_rate"]
    update = UpdateTerms(drop_rate=parse_drop_rate(rate), values="f32", dense=())
    federated = FederatedSettings(update, weighting="equal", shared_mask=True)
    clip = settings["clip"] / (1 - update.drop_rate.p) ** 0.5
    secure = SecureSettings(drop_rate=rate, privacy=SharedPrivacy(settings["epsilon"], clip=clip))
    assert secure.privacy is not None
    run, roster = secure.privacy.begin(rounds, members), roster_of(members)
    model, state = global_model(base, dense=(), exclude=()), StepState()
    groups = model.groups
    nbytes = 0
    for number in range(1, rounds + 1):
        terms = noised_terms(secure, roster, model, number, run.rho)
        run.charge(number, terms.session)
        mask = terms.mask(derive_key(seed_secret(seed), "round", number, length=32))
        arrays = _arrays(model)
        start = groups.layout.flatten(arrays)
        changes = (
            (client + 1, mask.gather(groups.layout.flatten(tuned) - start))
            for some in _in_parts(members)
            for client, tuned in zip(some, trained(arrays, some, number), strict=True)
        )
        sums = keyless_sum(terms, mask, changes, keys_of(seed, number))
        found = merged_sum(sums, terms, mask)
        model, state = advance(model, state, MergedRound(found.vector(), None, (), {}), federated)
        bits = terms.quantiser.word_bits
        nbytes = -(-(terms.values + 2) * bits // 8)
    return {
        "arrays": _arrays(model), "bytes": nbytes, "noise": run.budget.noise,
        "delta": run.budget.delta, "spent": round(run.epsilon, 4), "norm": clip,
    }  # fmt: skip


@quiet_flower()
def by_flower(
    settings: Mapping[str, Any], seed: int, base: Arrays, trained: Trainer
) -> dict[str, Any]:
    """Flower's FedAvg in its wrapper for privacy, with the noise that our accountant asks for."""
    from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

    from simulations.runs.memory_grid import MemoryGrid, pretend_task

    pretend_task()
    np.random.seed(seed)  # noqa: NPY002 (Flower's noise comes from it)
    clients, rounds, rate = settings["clients"], settings["rounds"], settings["rate"]
    sampled = max(1, int(clients * rate))
    delta = default_delta(clients)
    noise = noise_for(settings["epsilon"], delta, rounds, rate)
    app = ClientApp()

    @app.train()
    def training(message: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        number = int(message.content["config"]["server-round"])
        (tuned,) = trained(arrays, [int(context.node_config["partition-id"])], number)
        record = ArrayRecord({name: Array(array) for name, array in tuned.items()})
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    inner = FedAvg(
        fraction_train=rate, fraction_evaluate=0.0, min_train_nodes=sampled,
        min_available_nodes=clients,
    )  # fmt: skip
    strategy = DifferentialPrivacyServerSideFixedClipping(inner, noise, settings["clip"], sampled)
    record = ArrayRecord({name: Array(array) for name, array in base.items()})
    result = strategy.start(MemoryGrid(app, clients), record, num_rounds=rounds)
    arrays = {name: array.numpy().astype(np.float32) for name, array in result.arrays.items()}
    nbytes = sum(array.nbytes for array in base.values())
    return {
        "arrays": arrays, "bytes": nbytes, "noise": noise, "delta": delta,
        "spent": settings["epsilon"], "norm": settings["clip"],
    }  # fmt: skip


WAYS: Mapping[str, Callable[[Mapping[str, Any], int, Arrays, Trainer], dict[str, Any]]] = {
    "none": by_rounds,
    "central": by_rounds,
    "secure": by_secure_sums,
    "flower": by_flower,
}


def _in_parts(clients: int) -> list[range]:
    return [range(lo, min(lo + _AT_ONCE, clients)) for lo in range(0, clients, _AT_ONCE)]


def _arrays(model: GlobalModel) -> Arrays:
    return {name: np.asarray(array, np.float32) for name, array in model.arrays().items()}
