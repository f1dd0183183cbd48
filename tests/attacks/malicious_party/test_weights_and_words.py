"""One party lies about its weight or its words, to move the whole mean."""

import numpy as np
import pytest
from parties import consortium

import dare_agg.secure.client as client
from dare_agg.errors import ProtocolError
from dare_agg.secure import merge_sums, secure_sum
from dare_agg.secure.aggregate import TRAILER_WORDS

BY_EXAMPLES = {"weighting": "examples", "min_weight": 10.0, "max_weight": 1000.0}


def merged(group, *, liar=None, lie=None, examples=None):
    """The mean of the consortium where ``lie(words)`` edits the words of ``liar``."""
    honest = client.pack_party
    turn = iter(sorted(group.identities))

    def pack(values, quantiser, key, gain):
        words = honest(values, quantiser, key, gain)
        return lie(words) if next(turn) == liar else words

    rng = np.random.default_rng(0)
    delta = rng.uniform(-0.5, 0.5, group.terms.size).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "pack_party", pack)
        result = secure_sum(
            group.terms, group.roster, group.identities,
            lambda party, mask: mask.gather(delta), examples=examples,
        )  # fmt: skip
    return merge_sums(result.sums, group.terms.quantiser)[0], result.mask.gather(delta)


def with_weight(word):
    def lie(words):
        words = words.copy()
        words[-TRAILER_WORDS] = words.dtype.type(word & int(np.iinfo(words.dtype).max))
        return words

    return lie


def refused(group, **how):
    with pytest.raises(ProtocolError) as caught:
        merged(group, **how)
    return caught.value.reason


@pytest.mark.parametrize("off", [-3 * 255 + 1, -255, -200, -1, 1, 255])
def test_equal_weights_are_exactly_equal(off):
    """Four equal weights less 3 x 255 make the mean 1,020 times as large (327,675 at 16 bits)."""
    group = consortium(4, size=300)
    assert group.terms.quantiser.top == 255
    got, want = merged(group)
    assert np.abs(got - want).max() < 0.01
    assert refused(group, liar=2, lie=with_weight(255 + off)) == "words"


def test_weights_by_examples_stay_within_the_bounds_all_have_signed():
    group = consortium(
        4, size=300, weighting="examples", min_weight=10.0, max_weight=1000.0, bits=16
    )
    examples = dict.fromkeys(group.terms.cohort, 500.0)
    honest, _ = merged(group, examples=examples)
    least, top = group.terms.weight_units
    total = 4 * round(0.5 * top)
    # Less than four parties can have, and more.
    for word in (4 * least - 1 - total, 4 * top + 1 - total):
        lie = with_weight(round(0.5 * top) + word)
        assert refused(group, liar=3, lie=lie, examples=examples) == "words"
    # What remains possible: the mean scaled by up to max_weight / min_weight.
    worst, _ = merged(
        group, liar=3, lie=with_weight(round(0.5 * top) + 4 * least - total), examples=examples
    )
    factor = np.abs(worst).max() / np.abs(honest).max()
    assert 40 < factor <= 100


def test_few_and_many_examples_count_as_the_bounds():
    group = consortium(
        4, size=300, weighting="examples", min_weight=10.0, max_weight=1000.0, bits=16
    )
    few = dict.fromkeys(group.terms.cohort, 1.0)
    result = secure_sum(
        group.terms, group.roster, group.identities,
        lambda party, mask: np.zeros(group.terms.survivors, np.float32), examples=few,
    )  # fmt: skip
    assert result.sums.weight == 4 * group.terms.weight_units[0]


def test_within_the_words_one_party_moves_an_element_anywhere_between_the_clips():
    """What remains possible, as SECURITY.md says it: a mean element anywhere in ±clip."""
    group = consortium(4, size=300)

    def lie(words):
        words = words.copy()
        words[:-TRAILER_WORDS] = 4 * 255 - 3 * 128
        return words

    got, _ = merged(group, liar=1, lie=lie)
    assert 0.5 < np.abs(got).max() <= group.terms.clip
