"""The server has all parties but one stand still, and reads that one's delta out of the "sum"."""

import numpy as np
import pytest
from flwr.app import ConfigRecord
from guarded import Parties, base_arrays, digest_of, learner, quick_keys, training_content

from dare_agg.flower import reception
from dare_agg.flower.transport import to_record
from dare_agg.secure.packing import merge_sums

CONFIG, RUN = {"lr": 0.01, "server-round": 1}, {"learning-rate": 0.01, "steps": 5}


@pytest.fixture
def parties(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    return Parties(tmp_path, learner())


def honest_terms(parties, arrays, **words):
    return parties.terms(arrays, training=digest_of(arrays, CONFIG, RUN), **words)


def test_told_alike_they_sum(parties):
    arrays = base_arrays()
    terms = honest_terms(parties, arrays)
    assert parties.round(terms, lambda party: (arrays, CONFIG, RUN)) == {}
    total, _ = merge_sums(parties.sums, terms.quantiser, "sum")
    assert parties.sums.parties == 4 and np.abs(total).max() > 0.01


@pytest.mark.parametrize("who", ["run config", "config", "another key", "type of a number"])
def test_other_settings_for_the_others(parties, who):
    """Learning rate 0 in the run config or in the app's own record, for all but the victim."""
    arrays, victim = base_arrays(), parties.ids[1]
    others = {
        "run config": (arrays, CONFIG, {**RUN, "learning-rate": 0.0}),
        "config": (arrays, {**CONFIG, "lr": 0.0}, RUN),
        "another key": (arrays, {**CONFIG, "extra": "x"}, RUN),
        "type of a number": (arrays, CONFIG, {**RUN, "steps": 5.0}),
    }[who]
    terms = honest_terms(parties, arrays)
    refused = parties.round(
        terms, lambda party: (arrays, CONFIG, RUN) if party == victim else others
    )
    assert refused == {party: "training" for party in parties.ids if party != victim}


def test_another_record_or_array_beside_the_apps_own(parties):
    arrays, first = base_arrays(), parties.ids[0]
    terms = honest_terms(parties, arrays)
    more = (
        {"second": ConfigRecord({"lr": 0.0})},
        {"prior": to_record({"w": np.zeros(3, np.float32)})},
    )
    for extra in more:
        content = training_content(terms, arrays, CONFIG, **extra)
        reply = parties.send(first, content, "train", RUN)
        assert reply.content["dare.secure"]["refused"] == "training"


def test_the_same_arrays_in_another_order(parties):
    """Code that takes arrays by position would put the head where the body belongs."""
    arrays, first = base_arrays(head=True), parties.ids[0]
    head = (r"^head\.",)
    terms = honest_terms(parties, arrays, exclude=head)
    content = training_content(terms, dict(reversed(arrays.items())), CONFIG)
    reply = parties.send(first, content, "train", RUN)
    assert reply.content["dare.secure"]["refused"] == "training"


def test_a_head_of_zeros_where_the_head_is_no_part_of_the_sum(parties, monkeypatch):
    """The excluded head comes from the party alone, so a server's zeros teach nobody stillness."""
    arrays, victim = base_arrays(head=True), parties.ids[2]
    zeros = {**arrays, "head.w": np.zeros_like(arrays["head.w"])}
    terms = honest_terms(parties, arrays, exclude=(r"^head\.",))
    told = {party: arrays if party == victim else zeros for party in parties.ids}
    # Nobody has a head yet: nobody takes the server's.
    refused = parties.round(terms, lambda party: (arrays, CONFIG, RUN))
    assert set(refused.values()) == {"local"}
    own = {**arrays, "head.w": np.ones_like(arrays["head.w"])}
    monkeypatch.setattr(reception, "_OFFERS", [lambda message, context: own])
    refused = parties.round(terms, lambda party: (told[party], CONFIG, RUN))
    assert refused == {party: "training" for party in parties.ids if party != victim}
    # The same zeros for all, in the terms too: the parties train with their own head.
    same = parties.terms(
        zeros, training=digest_of(zeros, CONFIG, RUN), exclude=(r"^head\.",), run="again"
    )
    assert parties.round(same, lambda party: (zeros, CONFIG, RUN)) == {}
    total, _ = merge_sums(parties.sums, same.quantiser, "sum")
    assert np.abs(total).max() > 0.01


def test_other_patterns_than_the_terms(parties):
    arrays = base_arrays(head=True)
    terms = honest_terms(parties, arrays)
    other = honest_terms(parties, arrays, exclude=(r"^head\.",))
    content = training_content(other, arrays, CONFIG)
    content["dare.secure"]["terms"] = terms.encode()
    reply = parties.send(parties.ids[0], content, "train", RUN)
    assert reply.content["dare.secure"]["refused"] == "terms"


def test_all_stand_still_but_none_signs_for_it(parties):
    """A learning rate of 0 for all is in the terms; a delta of norm 0 goes into no sum."""
    arrays, still = base_arrays(), {**CONFIG, "lr": 0.0}
    terms = parties.terms(arrays, training=digest_of(arrays, still, RUN))
    refused = parties.round(terms, lambda party: (arrays, still, RUN))
    assert refused == dict.fromkeys(parties.ids, "norm")


def test_a_floor_that_the_party_sets(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    parties = Parties(
        tmp_path, learner(), node=lambda number: {"secure-min-norm": 0.05} if number else {}
    )
    arrays, slow = base_arrays(), {**CONFIG, "lr": 1e-4}
    terms = parties.terms(arrays, training=digest_of(arrays, slow, RUN))
    refused = parties.round(terms, lambda party: (arrays, slow, RUN))
    assert len(refused) == 3 and set(refused.values()) == {"norm"}
