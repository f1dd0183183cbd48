"""Accuracy by ε: its trainings keep what they say, and its tables put rows where they belong."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from simulations.pages import private as pages
from simulations.runs import private, private_records
from simulations.runs.scenario import KINDS


def toy(seed=0):
    """Clients that all learn the same, of norm 10."""
    rng = np.random.default_rng(seed)
    base = {"weight": rng.normal(size=(20, 20)).astype(np.float32)}
    change = rng.normal(size=(20, 20)).astype(np.float32)
    change *= 10 / np.linalg.norm(change)

    def trained(arrays, chosen, number):
        return [{"weight": arrays["weight"] + change} for _ in chosen]

    return base, trained, change


@pytest.mark.parametrize("apart", [0, 2])
def test_server_and_parties_noise_the_mean_of_clipped_clients(apart):
    base, trained, change = toy()
    settings = {**KINDS["private"][1], "rounds": 2, "clients": 30, "rate": 0.5, "quantile": 0.0}
    settings |= {"apart": apart} if apart else {"rate": 1.0}
    ways = {"central": private.by_rounds, "secure": private.by_secure_sums}
    for way in ("central",) if apart else ways:
        found = ways[way]({**settings, "way": way, "epsilon": 50.0}, 1, base, trained)
        moved = found["arrays"]["weight"] - base["weight"]
        share = float((moved * change).sum()) / np.linalg.norm(moved) / 10
        assert share > 0.8, way  # the direction of all, of norm ½ a client and round
        assert np.linalg.norm(moved) == pytest.approx(2 * 0.5, rel=0.35)
        assert 0 < found["spent"] <= 50.0
    louder = ways["central"]({**settings, "way": "central", "epsilon": 0.5}, 1, base, trained)
    # Of 400 values and two rounds, the second of which takes half of the first's noise off again.
    deviation = louder["noise"] * 0.5 / (15 if apart else 30)
    deviation *= math.sqrt(1.25 * (1 + 0.5**2)) if apart else math.sqrt(2)
    noise = np.linalg.norm(louder["arrays"]["weight"] - base["weight"] - change * 2 * 0.5 / 10)
    assert noise == pytest.approx(deviation * 20, rel=0.15)


def test_parties_keep_to_their_epsilon_and_learn_without_it(monkeypatch):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 700)
    rows = (rng.normal(size=(700, 6)) + 4 * np.eye(3, 6)[labels]).astype(np.float32)
    table = private_records.Table(rows[:600], labels[:600], rows[600:], labels[600:])
    monkeypatch.setattr(private_records, "_table", lambda data: table)
    settings = {
        **KINDS["private-records"][1], "rounds": 3, "steps": 6, "batch": 40, "drop_rate": "0",
        "values": "f32", "learning_rate": 0.1,
    }  # fmt: skip
    found = {
        epsilon: private_records.run_row(
            SimpleNamespace(seed=1, settings={**settings, "epsilon": epsilon})
        )
        for epsilon in (0.0, 8.0, 0.01)
    }
    assert found[0.0]["spent"] is None and found[0.0]["accuracy"] > 0.9
    assert 7.5 < found[8.0]["spent"] <= 8.0 and 0.008 < found[0.01]["spent"] <= 0.01
    assert found[8.0]["accuracy"] > 0.8 > found[0.01]["accuracy"]
    assert sum(found[8.0]["rows"]) == 600 and len(found[8.0]["rows"]) == 4


def row(accuracy, **words):
    quantile = words.pop("quantile", 0.0)
    given = {
        "way": "central", "clients": 100, "epsilon": 8.0, "drop_rate": "0.9", "base": 0.7,
        "bytes": 300, "accuracy": accuracy, **words,
    }  # fmt: skip
    return {**given, "settings": {"quantile": quantile, "apart": 3}}


def test_ways_stand_beside_each_other_and_seeds_are_averaged():
    rows = [
        row(0.5), row(0.6), row(0.4, quantile=0.5), row(0.3, way="secure", bytes=1832),
        row(0.2, way="flower", quantile=0.5, drop_rate="0"), row(0.8, way="none", quantile=0.5),
    ]  # fmt: skip
    lines = pages.private_table(rows).splitlines()
    assert "| 100 | 70.0 | none |  | – | 80.0 | – |" in lines
    assert "| 100 | 70.0 | ε = 8 | the server | – | 55.0 (2) | – |" in lines
    assert "| 100 | 70.0 | ε = 8 | the server, norm by median | – | 40.0 | – |" in lines
    assert "| 100 | 70.0 | ε = 8 | the parties, in a secure sum | – | 30.0 | – |" in lines
    assert "| 100 | 70.0 | ε = 8 | Flower's wrapper | 20.0 | – | – |" in lines
    assert "inside a secure sum –, 1,832, –" in lines[-1]
    apart = pages.apart_table([row(0.5)], [row(0.6), row(0.1, quantile=0.5)]).splitlines()
    assert apart[-1] == "| 100 | ε = 8 | p=0.9 | 3 | 50.0 | 60.0 |"


def test_tasks_of_parties_are_lines_and_epsilons_columns():
    rows = [
        {"epsilon": epsilon, "accuracy": accuracy, "bytes": 99,
         "settings": {"data": "reuters-r8", "drop_rate": "0.9"}}
        for epsilon, accuracy in ((0.0, 0.9), (8.0, 0.7), (8.0, 0.8), (1.0, 0.5))
    ]  # fmt: skip
    last = pages.records_table(rows).splitlines()[-1]
    assert last == ("| reuters-r8 | p=0.9 | 99 | 90.0 | 75.0 (2) | – | – | 50.0 |")
