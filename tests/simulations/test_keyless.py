"""Noised sums without keys are those of the whole protocol, bit by bit."""

import numpy as np

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.privacy.sharing import SharedPrivacy
from dare_agg.secure import client, private
from dare_agg.secure.identity import Identity
from dare_agg.secure.local import secure_sum
from dare_agg.secure.roster import make_roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.model import global_model
from simulations.runs import keyless


def test_a_sum_without_keys_is_the_protocols_bit_by_bit(monkeypatch):
    """Six parties, one of whom falls out before its vector; their keys as they drew them."""
    identities = [Identity(f"party {i}", bytes([i]) * 32) for i in range(1, 7)]
    roster = make_roster("six", [(one.name, one.public) for one in identities])
    model = global_model({"weight": np.zeros((60, 40), np.float32)}, dense=(), exclude=())
    settings = SecureSettings(drop_rate=parse_drop_rate("0.9"), privacy=SharedPrivacy(clip=0.5))
    terms = keyless.noised_terms(settings, roster, model, 3, rho=2.0)
    rng = np.random.default_rng(2)
    deltas = rng.normal(0, 0.01, (7, 2400)).astype(np.float32)
    drawn = {}
    whole = client.pack_private

    def noting(values, mask, point, keys):
        drawn[values.tobytes()] = keys
        return whole(values, mask, point, keys)

    monkeypatch.setattr(client, "pack_private", noting)
    found = secure_sum(
        terms, roster, {roster.id_of(one.public): one for one in identities},
        lambda party, mask: mask.gather(deltas[party]), dropped={"vectors": [2]},
    )  # fmt: skip
    vectors = [(party, found.mask.gather(deltas[party])) for party in found.alive]
    assert len(vectors) == len(drawn) == 5
    by_party = {party: drawn[values.tobytes()] for party, values in vectors}
    assert len(set(by_party.values())) == 5
    again = keyless.keyless_sum(terms, found.mask, vectors, by_party.__getitem__)
    assert np.array_equal(again.total, found.sums.total)
    assert (again.parties, again.weight, again.clipped) == (
        found.sums.parties, found.sums.weight, found.sums.clipped,
    )  # fmt: skip
    quiet = keyless.keyless_sum(terms, found.mask, vectors, by_party.__getitem__, found.alive)
    noise = again.total - quiet.total
    # Nothing but the noise of five is gone.
    assert abs(noise.var() / (5 * terms.variance) - 1) < 5 * np.sqrt(2 / noise.size)
    one = private.discrete_gaussian(terms.variance, terms.values, by_party[1][1])
    but_one = keyless.keyless_sum(terms, found.mask, vectors, by_party.__getitem__, [1])
    assert np.array_equal(again.total - but_one.total, one)


def test_keys_differ_by_party_round_and_seed():
    found = {
        keyless.keys_of(seed, number)(party)
        for seed in (0, 1) for number in (1, 2) for party in range(3)
    }  # fmt: skip
    assert len(found) == 12 and all(rounding != noise for rounding, noise in found)
