"""Merging by Gram matrices in one secure sum: the plain merge, whoever stays; refusals."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sketching import LAYOUT, apart, deltas_of, gathering, plain, summed

import dare_agg.secure.client as client
from dare_agg.errors import ConfigError, MergeError, NonFiniteError, ProtocolError
from dare_agg.merge.by_tensor import read_matrix
from dare_agg.merge.directions import leading_directions
from dare_agg.merge.linears import model_linears
from dare_agg.secure.aggregate import TRAILER_WORDS
from dare_agg.secure.local import DROP_STAGES
from dare_agg.secure.result import merged_sum, read_result, result_bytes
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.sketch import sketch_of, sketch_words
from dare_agg.secure.solved import RIDGE
from dare_agg.secure.terms import decode_terms
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source


def test_a_sum_is_the_plain_merge_within_the_fixed_point() -> None:
    group = gathering(4)
    deltas = dict(zip(group.terms.cohort, deltas_of(4), strict=True))
    merged, measured = summed(group, deltas).merged("wudi", layout=LAYOUT)
    wanted = plain(list(deltas.values()), 2)
    assert measured.clipped_share == 0
    assert apart(merged, wanted) < 1e-4
    # And that is another model than the mean.
    assert apart(wanted, np.mean(list(deltas.values()), axis=0)) > 0.1


def test_fewer_bits_are_a_larger_error_and_no_other_model() -> None:
    group = gathering(4, bits=16)
    deltas = dict(zip(group.terms.cohort, deltas_of(4), strict=True))
    merged, _ = summed(group, deltas).merged("wudi", layout=LAYOUT)
    assert 1e-4 < apart(merged, plain(list(deltas.values()), 2)) < 0.05


def test_survivors_give_the_mean_and_whole_deltas_the_directions() -> None:
    """At a drop rate what the Gram matrices speak of stays whole; the rest is the survivors'."""
    group = gathering(4, rate="0.5")
    deltas = dict(zip(group.terms.cohort, deltas_of(4), strict=True))
    result = summed(group, deltas)
    merged, _ = result.merged("wudi", layout=LAYOUT)
    mean = result.mask.scatter(np.mean([result.mask.gather(d) for d in deltas.values()], axis=0))
    wanted = mean.copy()
    for linear in model_linears(LAYOUT).values():
        middle = read_matrix(array_source(mean), linear.entry, 0, linear.transposed)
        gram, right = 0.0, 0.0
        for delta in deltas.values():
            matrix = read_matrix(array_source(delta), linear.entry, 0, linear.transposed)
            rows = leading_directions(matrix, 2)
            own = rows.T @ rows / np.square(rows).sum()
            gram, right = gram + own, right + matrix @ own
        total = gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
        solved = middle + np.linalg.solve(total, (right - middle @ gram).T).T
        tensor = solved.T if linear.transposed else solved
        wanted[linear.entry.offset : linear.entry.stop] = tensor.reshape(-1)
    assert apart(merged, wanted) < 1e-4


def test_scaling_scales_all_of_it() -> None:
    group = gathering(3)
    result = summed(group, dict(zip(group.terms.cohort, deltas_of(3), strict=True)))
    whole, _ = result.merged("wudi", 1.0, LAYOUT)
    half, _ = result.merged("wudi", 0.5, LAYOUT)
    assert apart(half, 0.5 * whole) < 1e-6


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_drop_outs_at_any_stage(data: st.DataObject) -> None:
    """The merge of those who stayed, or a clear end below the threshold."""
    n = data.draw(st.integers(3, 6), "n")
    threshold = data.draw(st.integers(max(3, n // 2 + 1), n), "threshold")
    group = gathering(n, threshold=threshold)
    deltas = dict(zip(group.terms.cohort, deltas_of(n), strict=True))
    gone = st.sets(st.sampled_from(group.terms.cohort), max_size=2)
    dropped = {s: data.draw(gone, s) for s in DROP_STAGES}
    left = set(group.terms.cohort) - set().union(*dropped.values())
    if len(left) < threshold:
        with pytest.raises(ProtocolError) as error:
            summed(group, deltas, dropped=dropped)
        assert error.value.reason == "threshold"
        return
    result = summed(group, deltas, dropped=dropped)
    merged, _ = result.merged("wudi", layout=LAYOUT)
    assert apart(merged, plain([deltas[p] for p in result.alive], 2)) < 1e-3


def test_a_party_without_change_in_a_layer_has_no_say_there() -> None:
    group = gathering(4)
    deltas = dict(zip(group.terms.cohort, deltas_of(4), strict=True))
    for party, name in ((1, "wide.weight"), *((p, "lying.weight") for p in deltas)):
        entry = LAYOUT[name]
        deltas[party][entry.offset : entry.stop] = 0
    merged, _ = summed(group, deltas).merged("wudi", layout=LAYOUT)
    assert apart(merged, plain(list(deltas.values()), 2)) < 1e-4
    entry = LAYOUT["lying.weight"]
    assert np.abs(merged[entry.offset : entry.stop]).max() < 1e-6


def test_parties_read_the_servers_bits_whole_or_in_tiles() -> None:
    group = gathering(4, rate="0.5")
    result = summed(group, dict(zip(group.terms.cohort, deltas_of(4), strict=True)))
    found = merged_sum(result.sums, result.terms, result.mask, "wudi", 0.7, LAYOUT)
    message = found.message()
    assert len(message) == result_bytes(result.terms)
    theirs = read_result(result.terms, result.mask, LAYOUT, message)
    whole = found.vector()
    for step in (LAYOUT.size, 333, 7):
        tiles = []
        for lo in range(0, LAYOUT.size, step):
            tile = np.empty(min(step, LAYOUT.size - lo), np.float32)
            theirs.read(lo, lo + tile.size, tile)
            tiles.append(tile)
        assert np.concatenate(tiles).tobytes() == whole.tobytes()
    assert abs(theirs.norm() - np.linalg.norm(whole.astype(np.float64))) < 1e-6


def test_a_result_of_other_bytes_is_refused() -> None:
    group = gathering(3)
    result = summed(group, dict(zip(group.terms.cohort, deltas_of(3), strict=True)))
    message = merged_sum(result.sums, result.terms, result.mask, "wudi", 1, LAYOUT).message()
    for bad in (message[:-4], message + bytes(4), b""):
        with pytest.raises(ProtocolError) as error:
            read_result(result.terms, result.mask, LAYOUT, bad)
        assert error.value.reason == "malformed"
    with pytest.raises(NonFiniteError):
        nan = np.float32(np.nan).tobytes()
        read_result(result.terms, result.mask, LAYOUT, message[:-4] + nan)


def test_sketches_are_far_fewer_than_gram_matrices() -> None:
    """MiniLM's layer of 1,536 inputs: 72 times fewer words for four parties of four directions."""
    layout = layout_of({"dense.weight": (384, 1536)})
    assert sketch_words(layout, 4, 4) == (384 + 1536) * 24
    assert 30 * sketch_words(layout, 4, 4) < 1536 * 1537 // 2 + 384 * 1536
    # More directions than inputs: the matrices whole, never more.
    assert sketch_words(layout, 1000, 100) == (384 + 1536) * 1536


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_delta_that_is_no_number_gives_no_sketch(value: float) -> None:
    (delta,) = deltas_of(1)
    delta[LAYOUT["wide.weight"].offset + 5] = value
    with pytest.raises(MergeError):
        sketch_of(gathering().terms.sketch_plan(LAYOUT), delta)


def test_terms_bind_the_sketch() -> None:
    terms = gathering(4).terms
    assert decode_terms(terms.encode()) == terms
    other = replace(terms, directions=3, sketch=sketch_words(LAYOUT, 3, 4))
    assert other.session != terms.session
    for words in (
        {"sketch": 0},
        {"directions": 0},
        {"directions": 5000},
        {"aggregate": "mean"},
        {"sketch": 1 << 30},
        {"weighting": "examples", "max_weight": 10.0},
    ):
        with pytest.raises(ConfigError):
            replace(terms, **words)
    # A sketch of nothing, and one behind terms of an aggregate that has none.
    plain_terms = gathering(4).terms.encode()[:-12]
    for tail in (bytes(12), b"\1\0\0\0" + bytes(8), b"\1"):
        with pytest.raises(ProtocolError):
            decode_terms(plain_terms + tail)


def test_another_layout_than_the_terms_say_is_refused() -> None:
    """A server cannot have a party sketch other Linears, or more of them."""
    terms = gathering(4).terms
    for layout in (layout_of({"a.weight": (9, 9)}), layout_of({"bias": (9,)})):
        with pytest.raises((ProtocolError, ConfigError)):
            terms.sketch_plan(layout)
    with pytest.raises(ProtocolError) as error:
        replace(terms, sketch=terms.sketch + 1).sketch_plan(LAYOUT)
    assert error.value.reason == "terms"


def lying(group, deltas, lie):
    """The sum where the first party's words go through ``lie(values, plan)`` before they leave."""
    honest, plan = client.pack_party, group.terms.sketch_plan(LAYOUT)
    turn = iter(sorted(group.identities))

    def pack(values, quantiser, key, gain):
        if next(turn) == 1:
            values = values.copy()
            lie(values[-group.terms.sketch :], plan)
        return honest(values, quantiser, key, gain)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "pack_party", pack)
        return summed(group, deltas)


def _negative(values, plan):
    values[:] = -5 * values


def _huge(values, plan):
    for found, grams, _ in plan.parts():
        signs = plan.signs(found)
        values[grams] = (40 * signs * plan.unit(found) / 4).reshape(-1)


def _far(values, plan):
    for _, _, part in plan.parts():
        values[part] = 0.5 * np.sign(values[part] + 1e-9)


@pytest.mark.parametrize("lie", [_negative, _huge, _far])
def test_gram_matrices_that_no_party_has_are_refused(lie) -> None:
    group = gathering(4)
    deltas = dict(zip(group.terms.cohort, deltas_of(4), strict=True))
    result = lying(group, deltas, lie)
    with pytest.raises(ProtocolError) as error:
        result.merged("wudi", layout=LAYOUT)
    assert error.value.reason == "words"


def test_words_beyond_what_parties_add_up_to_are_refused() -> None:
    group = gathering(4, bits=16)
    deltas = dict(zip(group.terms.cohort, deltas_of(4), strict=True))
    honest = client.pack_party
    turn = iter(sorted(group.identities))

    def pack(values, quantiser, key, gain):
        words = honest(values, quantiser, key, gain)
        if next(turn) == 1:
            words[-TRAILER_WORDS - 3] = 5 * quantiser.top
        return words

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "pack_party", pack)
        with pytest.raises(ProtocolError) as error:
            summed(group, deltas)
    assert error.value.reason == "words"


def test_settings_ask_for_what_a_sketch_needs() -> None:
    chosen = SecureSettings("wudi")
    assert chosen.bits_for(4) == 24 and chosen.directions == 8
    with pytest.raises(ConfigError, match="rank"):
        SecureSettings("wudi", directions=0)
    with pytest.raises(ConfigError, match="16 to 24"):
        SecureSettings("wudi", bits=8)
    with pytest.raises(ConfigError, match="layout"):
        chosen.terms(
            run="r", round_number=0, roster=gathering().roster, cohort=range(4), base="ab" * 32,
            layout="ab" * 32, size=10,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="no Linear"):
        sketch_words(layout_of({"bias": (8,)}), 8, 4)


def test_a_sketch_without_a_layout_is_not_read() -> None:
    group = gathering(3)
    result = summed(group, dict(zip(group.terms.cohort, deltas_of(3), strict=True)))
    with pytest.raises(ConfigError, match="layout"):
        result.merged("wudi")
