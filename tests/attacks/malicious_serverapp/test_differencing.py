"""The server has nearly the same data summed twice, over parties that differ by one."""

import numpy as np
import pytest
from guarded import Parties, base_arrays, digest_of, learner, quick_keys
from parties import consortium

from dare_agg.errors import ProtocolError
from dare_agg.secure.ledger import FileLedger, MemoryLedger
from dare_agg.secure.packing import merge_sums

DELTA = np.linspace(-1, 1, 300, dtype=np.float32)
TRAINED, ALMOST = b"t" * 32, b"u" * 32


@pytest.fixture(params=["memory", "file"])
def ledger(request, tmp_path):
    return MemoryLedger() if request.param == "memory" else FileLedger(tmp_path / "a.ledger")


def terms(cohort=(1, 2, 3, 4, 5), training=TRAINED, **settings):
    return consortium(5, cohort=list(cohort), training=training, **settings).terms


def refused(step) -> str:
    with pytest.raises(ProtocolError, match="refused") as caught:
        step()
    return caught.value.reason


def test_another_run_and_a_learning_rate_changed_by_a_millionth(ledger):
    """The delta's bits differ, the run's name and round too: the base version is the same."""
    ledger.claim(terms(), DELTA)
    other = terms((1, 2, 3, 4), training=ALMOST, run="another", round_number=7)
    assert refused(lambda: ledger.claim(other, DELTA * np.float32(1.000001))) == "second-cohort"
    # Another version of the base is another round of training.
    ledger.claim(terms((1, 2, 3, 4), run="another", base="12" * 32), DELTA + 1)


def test_the_same_cohort_may_try_again_after_a_sum_that_came_to_nothing(ledger):
    ledger.claim(terms(), DELTA)
    ledger.claim(terms(run="again"), DELTA + 1)


def test_one_party_called_dead_in_one_sum_and_alive_in_the_next(ledger):
    first, second = terms(), terms(run="again", training=ALMOST)
    ledger.claim(first, DELTA)
    ledger.sign(first, (1, 2, 3, 4))
    ledger.claim(second, DELTA + 1)
    assert refused(lambda: ledger.sign(second, (1, 2, 3, 4, 5))) == "second-cohort"
    ledger.sign(second, (1, 2, 3, 4))


def test_a_merge_of_models_claims_their_tensors_not_the_public_base(ledger):
    ledger.claim(terms(training=bytes(32)), DELTA, (b"a" * 32,))
    other = terms((1, 2, 3, 4), training=bytes(32), run="another model, same base")
    ledger.claim(other, DELTA + 1, (b"b" * 32,))
    again = terms((1, 2, 3, 4), training=bytes(32), run="third", base="12" * 32)
    assert refused(lambda: ledger.claim(again, DELTA + 2, (b"b" * 32,))) == "second-cohort"


def test_what_is_forgotten_is_forgotten_whole(tmp_path):
    book = FileLedger(tmp_path / "a.ledger")
    book.claim(terms(), DELTA)
    book.sign(terms(), (1, 2, 3, 4))
    assert book.forget(terms().session.hex()) == 1 and not book.entries()
    other = terms((1, 2, 3, 4), run="another")
    book.claim(other, DELTA)
    book.sign(other, (1, 2, 3))


EVERYONE = {"secure-min-cohort": 0.99, "secure-min-threshold": 1.0}


@pytest.mark.parametrize("insists", [False, True])
def test_another_version_by_one_bit(tmp_path, monkeypatch, insists):
    """What remains: a base moved by one bit is another version, and the difference of two sums the
    victim's delta. Who insists on everyone in each sum is in no such pair."""
    quick_keys(monkeypatch)
    parties = Parties(tmp_path, learner(), node=lambda number: EVERYONE if insists else {})
    victim, sums = parties.ids[2], []
    base = base_arrays()
    moved = {"body.w": base["body.w"].copy()}
    moved["body.w"][0, 0] = np.nextafter(base["body.w"][0, 0], np.float32(9))
    others = [party for party in parties.ids if party != victim]
    # A real model's delta has other bits from there; these parties' has them from the rate.
    for arrays, cohort, config in (
        (base, parties.ids, {"lr": 0.01}),
        (moved, others, {"lr": 0.010001}),
    ):
        words = {"threshold": len(cohort), "run": str(len(cohort)), "cohort": cohort}
        two = parties.terms(arrays, training=digest_of(arrays, config, {}), **words)
        told = (arrays, config, {})
        refused_by = parties.round(two, lambda party, told=told: told)
        if len(cohort) == 3 and insists:
            assert refused_by == dict.fromkeys(cohort, "parties")
            return
        assert refused_by == {}
        sums.append(merge_sums(parties.sums, two.quantiser, "sum")[0])
    found = sums[0] - sums[1]
    alone = -np.float32(0.01) * np.random.default_rng(victim).normal(size=600).astype(np.float32)
    cosine = found @ alone / np.linalg.norm(found) / np.linalg.norm(alone)
    assert cosine > 0.9999 and not insists


def test_who_insists_on_everyone_signs_for_no_fewer(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    parties = Parties(tmp_path, learner(), node=lambda number: EVERYONE)
    arrays, config = base_arrays(), {"lr": 0.01}
    fewer = parties.terms(arrays, training=digest_of(arrays, config, {}), threshold=3)
    refused_by = parties.round(fewer, lambda party: (arrays, config, {}))
    assert refused_by == dict.fromkeys(parties.ids, "threshold")
