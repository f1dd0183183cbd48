"""Attacks, digits, crossed cells, and the page of robust rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from simulations.pages.robust import DEFAULT, tables
from simulations.runs import digits
from simulations.runs.attacks import ATTACKS, SEARCHED, Known
from simulations.runs.flower_rules import FLOWER_RULES, flower_merge
from simulations.runs.scenario import read_scenario

PIXELS, ROWS = 64, 300


@pytest.fixture(autouse=True)
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten kinds of made-up images in place of scikit-learn's, which need not be here."""
    rng = np.random.default_rng(0)
    labels = np.arange(ROWS) % digits.CLASSES
    kinds = rng.random((digits.CLASSES, PIXELS))
    pixels = (kinds[labels] + rng.normal(0, 0.1, (ROWS, PIXELS))).clip(0, 1).astype(np.float32)
    made = digits.Digits(pixels[100:], labels[100:], pixels[:100], labels[:100])
    monkeypatch.setattr(digits, "load_digits", lambda: made)


def far(delta: np.ndarray) -> float:
    return float(np.linalg.norm(delta))


def row(rule: str, attack: str, **words):
    from simulations.runs.robust import _run

    local = {"drop_rate": "0.9", "values": "f32", "rounds": 8, "steps": 3, "batch": 8,
             "rate": 0.2, "alpha": 5.0, **words}  # fmt: skip
    _run.cache_clear()
    return _run(rule, attack, 7, 2, 0, tuple(local.items()))


def test_ten_times_the_opposite_ruins_the_mean_and_not_the_rule():
    clean = row("mean", "none")["accuracy"]
    assert clean > 0.8
    assert row("mean", "flip-10")["accuracy"] < clean - 0.3
    assert row(DEFAULT, "flip-10")["accuracy"] > clean - 0.15


def test_a_run_repeats_to_the_digit():
    assert row(DEFAULT, "ipm-best") == row(DEFAULT, "ipm-best")


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_sends_a_delta_for_each_of_its_clients(attack):
    rng = np.random.default_rng(1)
    honest = rng.normal(0.1, 1, (5, 40)).astype(np.float32)
    own = rng.normal(0.1, 1, (2, 40)).astype(np.float32)
    known = Known(honest, own, rng, far, far)
    sent = ATTACKS[attack].send(known)
    assert sent.shape == own.shape
    assert sent.dtype == np.float32
    assert np.isfinite(sent).all()


@pytest.mark.parametrize("attack", SEARCHED)
def test_a_search_takes_the_scale_that_goes_farthest(attack):
    rng = np.random.default_rng(1)
    honest = rng.normal(0.1, 1, (5, 40)).astype(np.float32)
    nearest = Known(honest, honest[:2], rng, lambda delta: -far(delta), far)
    farthest = Known(honest, honest[:2], rng, far, far)
    send = ATTACKS[attack].send
    assert np.linalg.norm(send(nearest)) < np.linalg.norm(send(farthest))


def test_the_greedy_attack_takes_what_raises_the_loss_most():
    rng = np.random.default_rng(1)
    honest = rng.normal(0.1, 1, (5, 40)).astype(np.float32)
    for wanted in (honest[3], -honest[0], -2 * honest.mean(axis=0)):
        known = Known(honest, honest[:2], rng, far, lambda sent, at=wanted: -far(sent - at))
        sent = ATTACKS["greedy"].send(known)
        assert np.abs(sent - wanted).max() < 1e-5


def test_the_loss_is_that_of_the_model_the_rule_would_leave():
    from simulations.runs.robust import DareServer, FlowerServer

    rng = np.random.default_rng(0)
    words = {"drop_rate": "0", "values": "f32"}
    servers = [DareServer("mean", 5, 1, 0, words), FlowerServer("flower:FedMedian", 5, 1, 0, words)]
    for server in servers:
        size = server.flat(server.state()).size
        deltas = rng.normal(0, 0.01, (5, size)).astype(np.float32)
        server.begin(1)
        guessed = digits.loss(server.moved(server.result(deltas, [1.0] * 5)))
        before = digits.loss(server.state())
        server.finish(deltas, [1.0] * 5)
        assert abs(digits.loss(server.state()) - guessed) < 1e-5
        assert abs(before - guessed) > 1e-4


def test_liars_have_a_group_each_whose_mean_they_make():
    grouped = {"groups": 5, "division": "fixed"}
    from simulations.runs.robust import _division

    division = _division([2, 5], 7, 5, 0)
    assert sorted(map(len, division)) == [1, 1, 1, 2, 2]
    assert sorted(client for group in division for client in group) == list(range(7))
    assert [sum(c in (2, 5) for c in group) for group in division] == [1, 1, 0, 0, 0]
    assert row("mean", "flip-10", **grouped)["accuracy"] < 0.5
    honest = row("nnm+median", "none", **grouped)["accuracy"]
    assert honest > 0.8
    assert row("nnm+median", "none", **{**grouped, "division": "redrawn"})["accuracy"] > 0.8


def test_a_model_that_nobody_can_write_any_more_stays_as_it_is():
    found = row("mean", "flip-10", rounds=60, rate=2.0)
    assert found["accuracy"] < 0.4 and found.get("ended", 60) < 60


def test_momentum_is_attacked_with_its_state():
    assert row("momentum+trimmed-mean", "ipm-best")["accuracy"] > 0.2


@pytest.mark.parametrize("name", [n for n in FLOWER_RULES if n != "flower:Bulyan"])
def test_flowers_rules_are_flowers_own(name):
    rng = np.random.default_rng(2)
    models = [{"w": rng.normal(size=(3, 4)).astype(np.float32)} for _ in range(7)]
    merged = flower_merge(name, models, [1.0] * 7, 2)["w"]
    stack = np.stack([model["w"] for model in models])
    expected = {
        "flower:FedMedian": np.median(stack, axis=0),
        "flower:FedTrimmedAvg": np.sort(stack, axis=0)[2:5].mean(axis=0),
    }
    if name in expected:
        assert np.allclose(merged, expected[name], atol=1e-6)
    if name == "flower:Krum":
        assert any(np.array_equal(merged, one) for one in stack)


def test_a_grid_is_crossed_and_names_a_cell_once(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'kind = "robust"\nseeds = [1]\n'
        '[[grids]]\nname = "{rule} {attack}"\nsettings = { f = 1 }\n'
        '[grids.cross]\nrule = ["median", "krum"]\nattack = ["none", "flip"]\n'
        '[[grids]]\nname = "{rule} {attack}"\n'
        '[grids.cross]\nrule = ["krum"]\nattack = ["flip", "ipm"]\n'
    )
    cells = read_scenario(path).cells
    assert list(cells) == ["median none", "median flip", "krum none", "krum flip", "krum ipm"]
    assert cells["krum flip"]["f"] == 1
    path.write_text('kind = "robust"\n[[grids]]\nname = "a"\ncros = { f = [1] }\n')
    with pytest.raises(ConfigError, match="did you mean 'cross'"):
        read_scenario(path)


def test_the_page_tells_what_was_lost_and_the_worst():
    told = {"n": 10, "f": 2, "drop_rate": "0.9", "clean": 0.9, "clean_rotated": 0.92}
    text = tables(
        [
            {**told, "rule": DEFAULT, "attack": "none", "seed": 0, "accuracy": 0.9},
            {**told, "rule": DEFAULT, "attack": "flip", "seed": 0, "accuracy": 0.88},
            {**told, "rule": DEFAULT, "attack": "flip", "seed": 1, "accuracy": 0.86},
            {**told, "rule": "mean", "attack": "flip", "seed": 0, "accuracy": 0.1},
        ]
    )
    assert text.endswith("4 runs.")
    assert (
        f"| 10, 2 | 0.9 | `{DEFAULT}` | 1 to 2 | 90.0 | 92.0 | 0.0 | 3.0 | **3.0 ± 12.7** |" in text
    )
    assert "| 10, 2 | 0.9 | `mean` | 1 | 90.0 | 92.0 | – | 80.0 | **80.0** |" in text


def test_liars_answer_in_the_real_channel_once_they_have_seen_the_others():
    from simulations.runs.channels import make_channel
    from simulations.runs.scenario import KINDS

    rng = np.random.default_rng(0)
    base = {
        "encoder.w": rng.standard_normal((40, 50)).astype(np.float32),
        "head.weight": np.zeros((2, 3), np.float32),
    }

    def moved(**words) -> tuple[float, float]:
        cell = {**KINDS["federated-robust"][1], "values": "f32", "drop_rate": "0.5", **words}
        channel = make_channel(cell, base, 0, 7)
        for number in (1, 2):
            channel.begin(number, range(7))
            for client in range(7):
                tuned = {
                    name: array + rng.normal(0.01, 0.001, array.shape).astype(np.float32)
                    for name, array in channel.state().items()
                }
                channel.send(client, tuned, 1.0)
            channel.finish()
        step = {name: channel.state()[name] - base[name] for name in base}
        return float(step["encoder.w"].mean()), float(step["head.weight"].mean())

    assert moved(attack="flip-10", byzantine=2)[0] < -0.01
    for attack in ("flip-10", "ipm", "alie", "mimic", "gaussian"):
        body, head = moved(attack=attack, byzantine=2, robust=DEFAULT)
        assert 0.01 < body < 0.03
        assert 0.01 < head < 0.03
