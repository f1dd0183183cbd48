"""Abilities absorbed in rounds: every client learns one of them, the global model all.

    python -m simulations.run simulations/scenarios/abilities-federated.toml --workers 1

What travels is the library's own round (`simulations.runs.channels`); clients count alike, since
rows of different abilities cannot be counted against each other. All train in one network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.partition import iid
from client.training import FineTuning
from dare_agg.vectors.layout import FloatVector
from simulations.runs.ability_data import find_ability, training_data
from simulations.runs.ability_models import Decoder, Measures, ability_config
from simulations.runs.channels import State, make_channel


def run_row(row: Any) -> dict[str, Any]:
    """Run one (cell, seed); returns every ability's scores by round and the bytes moved."""
    settings = row.settings
    abilities = settings["abilities"]
    decoder = Decoder(settings["task"], row.seed)
    measures = Measures(decoder, settings["task"], abilities, row.seed, ("test",))
    learners = {name: _learner(name, settings, decoder, row.seed) for name in abilities}
    start = decoder.layout.unflatten(decoder.start)
    # Client number c learns ability c mod their count, on a share of its rows of its own.
    names = [name for _ in range(settings["each"]) for name in abilities]
    parts = [
        iid(len(learners[name].train_rows), settings["each"], row.seed)[number // len(abilities)]
        for number, name in enumerate(names)
    ]
    channel = make_channel(settings, start, row.seed, len(names))
    curve: list[dict[str, Any]] = []
    up = down = 0

    def note(number: int) -> None:
        delta = _flat(channel.state(), decoder)
        delta -= decoder.start
        scores = measures.score(delta, list(abilities), "test")
        curve.append(
            {"round": number, "scores": scores, "upload_bytes": up, "download_bytes": down}
        )

    note(0)
    for number in range(1, settings["rounds"] + 1):
        everyone = list(range(len(names)))
        down += channel.begin(number, everyone).delta
        for client in everyone:
            tuned, _, _ = learners[names[client]].train(
                channel.state(), parts[client], seed=(row.seed, number, client)
            )
            up += channel.send(client, tuned, 1.0).delta
        channel.finish()
        if number == settings["rounds"] or number % settings["evaluate_every"] == 0:
            note(number)
    return {
        "method": settings["method"],
        "clients": len(names),
        "rounds": settings["rounds"],
        "parameters": channel.size,
        "upload_bytes_per_client_round": up // (len(names) * settings["rounds"]),
        "curve": curve,
        "fingerprint": channel.fingerprint(),
        "measurements": channel.measurements(),
    }


def _learner(name: str, settings: Any, decoder: Decoder, seed: int) -> FineTuning:
    """What trains one ability, in the network that all share."""
    config = ability_config(settings["task"], settings["abilities"][name], seed)
    kind = replace(find_ability(name)[0], network=lambda config, labels: decoder.network)
    return FineTuning(config, training_data(name, config), kind)


def _flat(state: State, decoder: Decoder) -> FloatVector:
    named: dict[str, NDArray[np.float32]] = {n: np.asarray(a) for n, a in state.items()}
    return decoder.layout.flatten(named)
