"""A party's own budget: charged before it trains, never more than it bears, never an older one."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from dare_agg.errors import ConfigError, PrivacyError, StateError
from dare_agg.privacy.accountant import Spent
from dare_agg.privacy.record_ledger import open_ledger
from dare_agg.privacy.records import RecordPrivacy, Sitting, permit, permit_anew

TERMS = RecordPrivacy(epsilon=4.0, noise=1.5)


def sitting(number=1, run="a", **words):
    return Sitting(run, bytes([number]), **{"rows": 500, "batch": 50, "steps": 5, **words},
                   steps_left=5 * (4 - number))  # fmt: skip


def ledger(tmp_path, party="north", delta=1e-4, given=False):
    return open_ledger(tmp_path / "mine" / "budget", tmp_path / "marks", party, delta, given)


def test_a_training_is_charged_on_disk_before_it_begins(tmp_path):
    first = permit(ledger(tmp_path), TERMS, sitting())
    kept = ledger(tmp_path)
    assert kept.charges == (first.charge,)
    assert kept.spent == Spent().add(1.5, 0.1, 5)
    assert first.measured()["privacy-epsilon"] == kept.spent.epsilon(1e-4) > 0
    assert os.stat(kept.path).st_mode & 0o077 == 0


def test_nothing_is_trained_where_the_charge_cannot_be_written(tmp_path, monkeypatch):
    opened = ledger(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises((StateError, OSError)):
        permit(opened, TERMS, sitting())


def test_a_crash_before_sending_costs_nothing_twice(tmp_path):
    first = permit(ledger(tmp_path), TERMS, sitting())
    again = permit(ledger(tmp_path), TERMS, sitting())
    assert (again.key, len(ledger(tmp_path).charges)) == (first.key, 1)


def test_the_same_training_again_is_no_release_and_another_result_is_one(tmp_path):
    first = permit(ledger(tmp_path), TERMS, sitting())
    assert first.settle(b"r" * 32)
    again = permit(ledger(tmp_path), TERMS, sitting())
    assert again.settle(b"r" * 32)
    assert not again.settle(b"s" * 32)  # other rows under the same draws: not to be sent
    anew = permit_anew(again)
    assert anew.key != again.key
    assert anew.settle(b"s" * 32)
    assert ledger(tmp_path).spent == Spent().add(1.5, 0.1, 10)


@pytest.mark.parametrize("other", [{"rows": 499}, {"batch": 49}, {"steps": 4}, {"run": "b"}])
def test_another_training_is_charged_and_draws_otherwise(tmp_path, other):
    first = permit(ledger(tmp_path), TERMS, sitting())
    second = permit(ledger(tmp_path), TERMS, sitting(**other))
    assert second.key != first.key
    assert len(ledger(tmp_path).charges) == 2


def test_draws_of_two_parties_differ(tmp_path):
    keys = {permit(ledger(tmp_path / name), TERMS, sitting()).key for name in "ab"}
    assert len(keys) == 2


def test_the_budget_ends_the_party(tmp_path):
    terms = RecordPrivacy(epsilon=2.0)
    for number in (1, 2, 3):
        made = permit(ledger(tmp_path), terms, sitting(number))
        made.settle(bytes([number]) * 32)
    told = made.measured()["privacy-epsilon"]
    assert 1.99 < told <= 2.0
    with pytest.raises(PrivacyError, match="nothing is trained"):
        permit(ledger(tmp_path), terms, sitting(4))
    with pytest.raises(PrivacyError, match="is spent"):
        permit(ledger(tmp_path), terms, sitting(1, run="another run"))
    assert len(ledger(tmp_path).charges) == 3


def test_a_party_that_allows_more_serves_a_second_run(tmp_path):
    for run in ("a", "b"):
        terms = RecordPrivacy(epsilon=2.0, most=2.4)
        for number in (1, 2, 3):
            permit(ledger(tmp_path), terms, sitting(number, run)).settle(bytes([number]) * 32)
    kept = ledger(tmp_path)
    assert 2.39 < kept.spent.epsilon(1e-4) <= 2.4
    assert kept.noises["b"] > kept.noises["a"]


def test_noise_of_the_run_that_is_too_small_is_refused_before_anything(tmp_path):
    with pytest.raises(PrivacyError, match="nothing is trained"):
        permit(ledger(tmp_path), RecordPrivacy(epsilon=1.0, noise=0.3), sitting())
    assert not (tmp_path / "mine" / "budget").exists()


def test_other_noise_in_the_midst_of_a_run_is_refused(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting())
    with pytest.raises(ConfigError, match="dp-noise"):
        permit(ledger(tmp_path), replace(TERMS, noise=2.0), sitting(2))


def test_a_ledger_rolled_back_is_refused(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting(1))
    old = (tmp_path / "mine" / "budget").read_bytes()
    permit(ledger(tmp_path), TERMS, sitting(2))
    (tmp_path / "mine" / "budget").write_bytes(old)
    with pytest.raises(PrivacyError, match="rolled back"):
        ledger(tmp_path)


def test_a_ledger_rolled_back_between_opening_and_charging_is_refused(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting(1))
    old = (tmp_path / "mine" / "budget").read_bytes()
    opened = ledger(tmp_path)
    permit(opened, TERMS, sitting(2))
    (tmp_path / "mine" / "budget").write_bytes(old)
    with pytest.raises(PrivacyError, match="rolled back"):
        permit(opened, TERMS, sitting(3))


def test_a_ledger_that_went_on_otherwise_is_refused(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting(1))
    old = (tmp_path / "mine" / "budget").read_bytes()
    permit(ledger(tmp_path), TERMS, sitting(2))
    mark = next((tmp_path / "marks").iterdir())
    seen = mark.read_bytes()
    (tmp_path / "mine" / "budget").write_bytes(old)
    mark.unlink()
    permit(ledger(tmp_path), TERMS, sitting(3))
    mark.write_bytes(seen)
    with pytest.raises(PrivacyError, match="rolled back"):
        ledger(tmp_path)


def test_a_ledger_that_is_gone_is_not_begun_anew(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting())
    (tmp_path / "mine" / "budget").unlink()
    with pytest.raises(PrivacyError, match="is gone"):
        ledger(tmp_path)


def test_another_ledger_in_its_place_is_refused(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting())
    other = open_ledger(tmp_path / "other" / "budget", tmp_path / "marks-2", "north", 1e-4, False)
    permit(other, TERMS, sitting())
    shutil.copy(other.path, tmp_path / "mine" / "budget")
    with pytest.raises(PrivacyError, match="another one"):
        ledger(tmp_path)


def test_a_ledger_of_another_party_is_refused(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting())
    with pytest.raises(PrivacyError, match="'north''s, and this is 'south'"):
        ledger(tmp_path, party="south")


def test_another_delta_is_refused_and_none_goes_on(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting())
    assert ledger(tmp_path, delta=1e-5).delta == 1e-4
    with pytest.raises(PrivacyError, match="begun with δ"):
        ledger(tmp_path, delta=1e-5, given=True)


def test_a_damaged_ledger_is_refused_wherever_it_is_damaged(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting())
    whole = (tmp_path / "mine" / "budget").read_bytes()
    for at in range(0, len(whole), 37):
        bad = bytearray(whole)
        bad[at] ^= 1
        (tmp_path / "mine" / "budget").write_bytes(bad)
        with pytest.raises(PrivacyError, match="cannot be read"):
            ledger(tmp_path)
    for size in (0, 7, len(whole) - 1):
        (tmp_path / "mine" / "budget").write_bytes(whole[:size])
        with pytest.raises(PrivacyError, match="cannot be read"):
            ledger(tmp_path)


def test_a_ledger_that_others_may_read_is_refused(tmp_path):
    permit(ledger(tmp_path), TERMS, sitting())
    (tmp_path / "mine" / "budget").chmod(0o644)
    with pytest.raises((PrivacyError, ConfigError), match="mode"):
        ledger(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"epsilon": 0.0}, "above 0"),
        ({"epsilon": float("nan")}, "above 0"),
        ({"epsilon": 70333.0}, "dp-weak"),
        ({"clip": 0.0}, "clip"),
        ({"noise": -1.0}, "noise"),
        ({"noise": 1e4}, "noise"),
        ({"most": -1.0}, "dp-epsilon"),
    ],
)
def test_a_promise_of_nothing_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        RecordPrivacy(**words)


def test_delta_is_below_one_over_the_rows():
    assert RecordPrivacy().settled_delta(1000) == pytest.approx(1e-4)
    with pytest.raises(ConfigError, match="less than 1/1000"):
        RecordPrivacy(delta=1e-3).settled_delta(1000)
    with pytest.raises(ConfigError, match="at least 2"):
        RecordPrivacy().settled_delta(1)


def test_a_batch_of_all_rows_is_no_sampling():
    assert sitting(batch=500).rate == sitting(batch=900).rate == 1.0
    assert sitting(batch=50).rate == 0.1


def test_the_noise_of_a_run_is_that_of_its_rounds(tmp_path):
    made = permit(ledger(tmp_path), RecordPrivacy(epsilon=2.0), sitting(1))
    assert Spent().add(made.charge.noise, 0.1, 15).epsilon(1e-4) <= 2.0
    assert Spent().add(made.charge.noise * 0.99, 0.1, 15).epsilon(1e-4) > 2.0
    assert np.isclose(made.charge.rate, 0.1)
