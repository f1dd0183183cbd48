"""The budget of a run: kept before a release, never begun anew, and the end of the run."""

import os
from dataclasses import replace

import numpy as np
import pytest

from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.errors import ConfigError, PrivacyError
from dare_agg.privacy.accountant import Spent
from dare_agg.privacy.banded import Places
from dare_agg.privacy.central import Contribution
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.privacy.ledger import Budget, Charge, open_budget

TEN = Places(Mask("stratified", 8, parse_drop_rate(0), bytes(16)), dense=2)


def one(value=1.0):
    return Contribution(np.full(10, value, np.float32))


def test_a_budget_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "budget"
    budget = replace(Budget(8.0, 1e-3, 100, path), noise=1.5)
    for number in (1, 2):
        budget = budget.charged(Charge(number, bytes([number]) * 32, 1.5, 0.1, 2.0))
    found = open_budget(path, 8.0, 1e-3, 100)
    assert (found, found.seed) == (budget, budget.seed)
    assert found.spent == Spent().add(1.5, 0.1, 2)
    assert found.norm(2, 9.0) == 2.0
    assert found.norm(1, 9.0) == 9.0
    assert os.stat(path).st_mode & 0o077 == 0


def test_the_budget_is_on_disk_before_a_release_is_returned(tmp_path, monkeypatch):
    run = ClientPrivacy(100, 8.0, noise=2.0, ledger=tmp_path / "budget").begin(5, 0.5)
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    from dare_agg.errors import StateError

    with pytest.raises((StateError, OSError)):
        run.release(1, [one()], TEN, [])


def test_the_very_release_again_costs_nothing_and_another_one_does(tmp_path):
    words = {"members": 100, "noise": 2.0, "ledger": tmp_path / "budget"}
    first = ClientPrivacy(**words).begin(5, 1.0).release(1, [one()], TEN, [])
    resumed = ClientPrivacy(**words).begin(5, 1.0)
    again = resumed.release(1, [one()], TEN, [])
    assert again.mean.tobytes() == first.mean.tobytes()
    assert len(resumed.budget.charges) == 1
    resumed.release(2, [one()], TEN, [])
    resumed.release(1, [one()], TEN, [])  # a state of two rounds before was the last that was whole
    assert len(resumed.budget.charges) == 2
    other = resumed.release(1, [one(-1.0)], TEN, [])
    assert other.mean.tobytes() != first.mean.tobytes()
    assert len(resumed.budget.charges) == 3


def test_a_spent_budget_releases_nothing(tmp_path):
    run = ClientPrivacy(100, 4.0, ledger=tmp_path / "budget").begin(3, 0.5)
    for number in (1, 2, 3):
        assert run.may_go_on
        run.release(number, [one()], TEN, [])
    assert run.epsilon <= 4.0
    assert not run.may_go_on
    with pytest.raises(PrivacyError, match="more than ε = 4"):
        run.release(4, [one()], TEN, [])
    assert len(open_budget(tmp_path / "budget", 4.0, run.budget.delta, 100).charges) == 3


@pytest.mark.parametrize("words", [{"epsilon": 9.0}, {"delta": 1e-4}, {"members": 101}])
def test_another_budget_is_refused(tmp_path, words):
    given = {"members": 100, "epsilon": 8.0, "delta": 1e-3, "noise": 2.0}
    ClientPrivacy(**given, ledger=tmp_path / "budget").begin(3, 0.5)
    with pytest.raises(PrivacyError, match="was begun with"):
        ClientPrivacy(**{**given, **words}, ledger=tmp_path / "budget").begin(3, 0.5)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_budget_is_not_begun_anew(tmp_path, damage):
    path = tmp_path / "budget"
    run = ClientPrivacy(100, noise=2.0, ledger=path).begin(3, 0.5)
    run.release(1, [one()], TEN, [])
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-9], "flip": data[:40] + b"?" + data[41:], "empty": b"", "text": b"{}"}[
            damage
        ]
    )
    with pytest.raises(PrivacyError, match="cannot be read"):
        ClientPrivacy(100, noise=2.0, ledger=path).begin(3, 0.5)


def test_a_budget_rolled_back_or_lost_is_refused(tmp_path):
    path = tmp_path / "budget"
    run = ClientPrivacy(100, noise=2.0, ledger=path).begin(3, 0.5)
    run.release(1, [one()], TEN, [])
    old = path.read_bytes()
    run.release(2, [one()], TEN, [])
    run.budget.check_resumed(2)
    path.write_bytes(old)
    back = ClientPrivacy(100, noise=2.0, ledger=path).begin(3, 0.5)
    with pytest.raises(PrivacyError, match="had made 2 releases"):
        back.budget.check_resumed(2)
    path.unlink()
    lost = ClientPrivacy(100, noise=2.0, ledger=path).begin(3, 0.5)
    with pytest.raises(PrivacyError, match="knows 0"):
        lost.budget.check_resumed(2)
    with pytest.raises(PrivacyError, match="no releases"):
        lost.budget.check_resumed(None)


def test_sampling_has_its_rate_and_is_each_clients_own():
    run = ClientPrivacy(1000, noise=2.0).begin(10, 0.2)
    names = [str(number) for number in range(5000)]
    drawn = run.drawn(1, names)
    assert np.mean(drawn) == pytest.approx(0.2, abs=0.03)
    # Who else is there changes nobody's draw, and rounds and runs draw anew.
    assert run.drawn(1, names[1000:]) == drawn[1000:]
    assert run.drawn(2, names) != drawn
    assert ClientPrivacy(1000, noise=2.0).begin(10, 0.2).drawn(1, names) != drawn
    pairs = np.corrcoef(np.array(drawn, float), np.array(run.drawn(2, names), float))[0, 1]
    assert abs(pairs) < 0.06


@pytest.mark.parametrize(
    "words",
    [
        {"epsilon": 0},
        {"epsilon": 60.0},
        {"delta": 0.02},
        {"clip": 0.0},
        {"clip": float("nan")},
        {"quantile": 1.0},
        {"noise": -1.0},
        {"members": 1},
        {"members": True},
    ],
)
def test_nonsense_is_refused_before_anything_begins(words):
    with pytest.raises(ConfigError):
        ClientPrivacy(**{"members": 100, **words})


def test_the_statement_names_unit_neighbours_sampling_and_delta():
    said = ClientPrivacy(100, noise=2.0).begin(3, 0.5).statement()
    assert said["unit"].startswith("a client")
    assert "add or remove" in said["neighbours"]
    assert said["sampling"] == "Poisson, rate 0.5"
    assert said["epsilon"] == 0.0
    assert said["delta"] == pytest.approx(0.001)
