"""A noised secure sum without its keys: every party's words as they are before they are masked.

Masks cancel, so the sum is that of the whole protocol, bit by bit
(`tests/simulations/test_keyless.py`); a thousand parties take seconds. Their clipping, rounding
and noise, the word and how the sum is read are the product's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from unittest import mock

import numpy as np

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import Mask
from dare_agg.secure import private
from dare_agg.secure.aggregate import Sums
from dare_agg.secure.packing import pack_private, unpack_sums
from dare_agg.secure.roster import Roster, make_roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.stream import cut_words, word_type
from dare_agg.secure.terms import SecureTerms
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.model import GlobalModel

Keys = Callable[[int], tuple[bytes, bytes]]


def roster_of(members: int) -> Roster:
    """A roster of so many; nobody has its keys."""
    keys = [derive_key(seed_secret(0), "public", i, length=32) for i in range(members)]
    return make_roster("keyless", [(f"party {i}", key) for i, key in enumerate(keys)])


def noised_terms(
    settings: SecureSettings, roster: Roster, model: GlobalModel, number: int, rho: float
) -> SecureTerms:
    """The terms of a round's sum among the whole roster."""
    return settings.terms(
        run="keyless", round_number=number, roster=roster,
        cohort=range(1, len(roster.members) + 1), base=model.fingerprints.base,
        layout=model.groups.layout.fingerprint, size=model.groups.layout.size, rho=rho,
    )  # fmt: skip


def keys_of(seed: int, number: int) -> Keys:
    """Each party's secret keys of a round, for its rounding and its noise."""
    secret = derive_key(seed_secret(seed), "keyless", number, length=32)

    def keys(party: int) -> tuple[bytes, bytes]:
        both = derive_key(secret, "party", party, length=32)
        return both[:16], both[16:]

    return keys


def keyless_sum(
    terms: SecureTerms,
    mask: Mask,
    vectors: Iterable[tuple[int, FloatVector]],
    keys: Keys,
    quiet: Collection[int] = (),
) -> Sums:
    """What the server reads of the parties' ``vectors`` (unscaled survivors, then dense values).

    ``quiet`` parties add no noise: they collude, or it is switched off.
    """
    point = terms.quantiser
    total = np.zeros(terms.values + 2, word_type(point.word_bits))
    parties = 0
    for party, values in vectors:
        if party in quiet:
            with mock.patch.object(private, "discrete_gaussian", _none):
                total += pack_private(values, mask, point, keys(party))
        else:
            total += pack_private(values, mask, point, keys(party))
        parties += 1
    cut_words(total, point.word_bits)
    return unpack_sums(total, point, parties)


def _none(variance: int, count: int, key: bytes) -> np.ndarray:
    return np.zeros(count, np.int64)
