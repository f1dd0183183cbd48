"""The server has parties keep other heads before the round that all of them sign alike."""

import numpy as np
import pytest
from guarded import Parties, base_arrays, digest_of, learner, quick_keys, training_content

from dare_agg.flower import reception
from dare_agg.secure.packing import merge_sums

HEAD, CONFIG, WILD, RUN = (r"^head\.",), {"lr": 1e-6}, {"lr": 1e4}, {"steps": 5}


@pytest.fixture
def parties(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    own = base_arrays(head=True)
    monkeypatch.setattr(reception, "_OFFERS", [lambda message, context: own])
    return Parties(tmp_path, learner())


def cosine_with(parties, victim, terms):
    """How much the sum is the victim's delta alone."""
    total, _ = merge_sums(parties.sums, terms.quantiser, "sum")
    alone = np.random.default_rng(victim).normal(size=600)
    return abs(float(total @ alone) / np.linalg.norm(total) / np.linalg.norm(alone))


def terms_of(parties, config, after=b"", **words):
    arrays = base_arrays(head=True)
    return parties.terms(
        arrays, training=digest_of(arrays, config, RUN, after), exclude=HEAD, **words
    )


def told(config):
    return lambda party: (base_arrays(head=True), config, RUN)


def test_a_training_that_never_became_a_sum(parties):
    """One lone message gave the victim a head of thousands: its delta was all of the sum."""
    victim = parties.ids[1]
    content = training_content(terms_of(parties, WILD, run="lone"), *told(WILD)(victim)[:2])
    parties.send(victim, content, "train", RUN)
    terms = terms_of(parties, CONFIG)
    assert parties.round(terms, told(CONFIG)) == {}
    assert cosine_with(parties, victim, terms) < 0.8


@pytest.fixture
def with_others(parties):
    """A sum of all but the first party left three of four with heads of thousands."""
    wild = terms_of(parties, WILD, cohort=parties.ids[1:], run="without the first")
    assert parties.round(wild, told(WILD)) == {}
    return parties, wild.session


def test_a_sum_that_one_party_was_no_part_of(with_others):
    """It does not go on with the others, and where all begin anew their heads are forgotten."""
    parties, session = with_others
    # Another version of the base: that of the wild sum is over another cohort.
    base = base_arrays(head=True)
    base["body.w"] += np.float32(0.01)
    going = parties.terms(base, training=digest_of(base, CONFIG, RUN, session), exclude=HEAD)
    refused = parties.round(going, lambda party: (base, CONFIG, RUN), session)
    assert refused == {parties.ids[0]: "local"}
    anew = parties.terms(base, training=digest_of(base, CONFIG, RUN), exclude=HEAD)
    assert parties.round(anew, lambda party: (base, CONFIG, RUN)) == {}
    assert max(cosine_with(parties, party, anew) for party in parties.ids) < 0.8


def test_told_differently_where_to_begin(with_others):
    """One is told to begin anew, the others to go on: their terms are not the same."""
    parties, session = with_others
    terms, first = terms_of(parties, CONFIG, session, run="next"), parties.ids[0]
    content = training_content(terms, base_arrays(head=True), CONFIG)
    reply = parties.send(first, content, "train", RUN)
    assert reply.content["dare.secure"]["refused"] == "training"


def test_a_tensor_of_the_body_kept_under_other_patterns(parties):
    """What was local in one round is the signed model's in the next."""
    arrays, victim = base_arrays(head=True), parties.ids[1]
    everything = parties.terms(
        arrays, training=digest_of(arrays, WILD, RUN), exclude=(r"^body\.",), run="lone"
    )
    parties.send(victim, training_content(everything, arrays, WILD), "train", RUN)
    terms = terms_of(parties, CONFIG)
    assert parties.round(terms, told(CONFIG)) == {}
    assert cosine_with(parties, victim, terms) < 0.8
