"""The whole protocol: equal to the integer oracle, whoever vanishes and whenever."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import consortium, seeded, session, step

from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.errors import ConfigError, ProtocolError
from dare_agg.secure import LocalSum, secure_sum
from dare_agg.secure import client as party
from dare_agg.secure.local import DROP_STAGES
from dare_agg.secure.packing import quantise
from dare_agg.secure.settings import SecureSettings


def run_and_compare(
    group: Any, dropped: dict[str, set[int]], seed: int, examples: dict[int, float] | None = None
) -> LocalSum:
    """Run a session and compare with the sum of the same integers in the clear."""
    terms = group.terms
    rng = np.random.default_rng(seed)
    deltas = {p: rng.normal(0, 0.5, terms.size).astype(np.float32) for p in terms.cohort}
    masks: set[bytes] = set()
    rounding: dict[int, bytes] = {}
    random = seeded(seed)
    current = 0

    def survivors(p: int, mask: Mask) -> np.ndarray:
        nonlocal current
        current = p
        masks.add(mask.key)
        return mask.gather(deltas[p])

    def record(length: int) -> bytes:
        drawn = random(length)
        if length == 16:  # the key of stochastic rounding
            rounding[current] = drawn
        return drawn

    result = secure_sum(
        terms,
        group.roster,
        group.identities,
        survivors,
        examples=examples,
        dropped=dropped,
        random=record,
    )
    gone = set().union(*(dropped.get(s, set()) for s in ("adverts", "shares", "vectors")))
    assert set(result.alive) == set(terms.cohort) - gone
    assert masks == {result.mask.key}
    gains = {p: min(w, terms.max_weight) / terms.max_weight for p, w in (examples or {}).items()}
    tau = np.array(
        [
            quantise(
                result.mask.gather(deltas[p]), terms.quantiser, rounding[p], gains.get(p, 1.0)
            )[0]
            for p in result.alive
        ]
    )
    assert (result.sums.total == tau.sum(0)).all()
    if terms.aggregate == "ties":
        assert (result.sums.fields["positive"] == np.maximum(tau, 0).sum(0)).all()
        assert (result.sums.fields["negative_count"] == (tau < 0).sum(0)).all()
    return result


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_drop_outs_at_any_stage(data: st.DataObject) -> None:
    """The sum of those who stayed, exactly, or a clear end below the threshold."""
    n = data.draw(st.integers(3, 9), "n")
    threshold = data.draw(st.integers(max(3, n // 2 + 1), n), "threshold")
    aggregate = data.draw(st.sampled_from(["mean", "ties"]), "aggregate")
    group = consortium(n, threshold=threshold, aggregate=aggregate, size=60)
    everyone = st.sets(st.sampled_from(group.terms.cohort), max_size=3)
    dropped = {s: data.draw(everyone, s) for s in DROP_STAGES}
    left = set(group.terms.cohort) - set().union(*dropped.values())
    if len(left) >= threshold:
        run_and_compare(group, dropped, n)
    else:
        with pytest.raises(ProtocolError) as error:
            run_and_compare(group, dropped, n)
        assert error.value.reason == "threshold"
        assert str(threshold) in str(error.value)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_drop_outs_in_a_sparse_graph(data: st.DataObject) -> None:
    """The same beyond 100 parties, where each party draws its own neighbours (here: beyond 5)."""
    n = data.draw(st.integers(8, 14), "n")
    degree = data.draw(st.sampled_from([4, 6]), "degree")
    group = consortium(n, size=60, aggregate=data.draw(st.sampled_from(["mean", "ties"])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dare_agg.secure.terms.COMPLETE_UP_TO", 5)
        patch.setattr("dare_agg.secure.policy.is_safe", lambda *graph: True)
        group.terms = replace(group.terms, degree=degree, share_threshold=degree // 2 + 1)
        gone = st.sets(st.sampled_from(group.terms.cohort), max_size=1)
        dropped = {s: data.draw(gone, s) for s in DROP_STAGES}
        left = set(group.terms.cohort) - set().union(*dropped.values())
        try:
            run_and_compare(group, dropped, n)
            assert len(left) >= group.terms.threshold
        except ProtocolError as error:
            # Too few in all, or too few of the neighbours that one party drew.
            assert error.reason == "threshold"
            assert len(left) < group.terms.threshold or "revealed shares of party" in str(error)


def test_weights_by_examples_stay_hidden_in_the_sum() -> None:
    group = consortium(4, weighting="examples", max_weight=100.0, bits=12)
    examples = dict(zip(group.terms.cohort, (100.0, 50.0, 10.0, 5000.0), strict=True))
    result = run_and_compare(group, {}, 1, examples)
    top = group.terms.quantiser.top
    assert result.sums.weight == 2 * top + round(0.5 * top) + round(0.1 * top)


def test_a_mean_weighed_by_few_examples_is_as_exact() -> None:
    """Weights far below the largest one allowed shrink the values; the bits make up for it."""
    settings = SecureSettings("mean", drop_rate="0", weighting="examples", clip=0.02)
    group = consortium(4, size=2000)
    group.terms = settings.terms(
        run="run", round_number=1, roster=group.roster, cohort=group.terms.cohort,
        base=group.terms.base, layout=group.terms.layout, size=2000,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    deltas = {p: rng.normal(0, 4e-4, 2000).astype(np.float32) for p in group.terms.cohort}
    examples = dict(zip(group.terms.cohort, (16.0, 50.0, 160.0, 70.0), strict=True))
    result = secure_sum(
        group.terms, group.roster, group.identities, lambda p, mask: mask.gather(deltas[p]),
        examples=examples,
    )  # fmt: skip
    merged, _ = result.merged("mean")
    plain = sum(examples[p] * deltas[p].astype(np.float64) for p in deltas) / 296
    assert np.linalg.norm(merged - plain) / np.linalg.norm(plain) < 0.01


def test_merged_delta_equals_the_plain_mean_within_the_quantiser() -> None:
    group = consortium(5, bits=16, clip=1.0, size=999, drop_rate=parse_drop_rate("0.5"))
    rng = np.random.default_rng(0)
    deltas = {p: rng.normal(0, 0.2, 999).astype(np.float32) for p in group.terms.cohort}
    result = secure_sum(
        group.terms, group.roster, group.identities, lambda p, mask: mask.gather(deltas[p])
    )
    merged, measured = result.merged()
    mean = np.mean([result.mask.scatter(result.mask.gather(d)) for d in deltas.values()], 0)
    assert np.abs(merged - mean).max() < 2 * 1.0 / 2**16 + 1e-6
    assert measured.clipped_share < 1e-3 and measured.parties == 5
    tripled, _ = result.merged("sum", 3.0)
    assert np.allclose(tripled, 15 * merged, rtol=1e-5)


def test_order_of_answers_does_not_matter() -> None:
    runs = []
    for backwards in (False, True):
        run = session(consortium(4, aggregate="ties"), "adverts")
        random = seeded(9)
        for stage in ("shares", "vectors", "signatures", "reveals"):
            run.requests = run.server.close()
            answers = [step(run, p, stage, random) for p in run.group.terms.cohort]
            for answer in reversed(answers) if backwards else answers:
                run.server.take(answer)
        runs.append(run.server.finish())
    assert (runs[0].total == runs[1].total).all()
    assert (runs[0].fields["positive"] == runs[1].fields["positive"]).all()


@pytest.mark.slow
def test_beyond_a_hundred_parties_the_graph_is_sparse() -> None:
    group = consortium(101, size=20, colluding=0.1)
    assert group.terms.degree == 30 and group.terms.share_threshold == 16
    run_and_compare(group, {"vectors": set(range(1, 8)), "shares": {20}, "reveals": {30, 31}}, 3)


def test_wrong_shares_are_corrected_wherever_they_are() -> None:
    """Two of nine parties reveal nonsense: with five needed the sum comes out all the same."""
    run = session(consortium(9, threshold=5), "signatures")
    requests = run.server.close()
    for p in run.group.terms.cohort:
        state = run.states[p]
        if p in (1, 6):
            wrong = tuple((o, bytes([p]) * 31 + b"\0", bytes([p]) * 32) for o, _, _ in state.held)
            state = party.replace(state, held=wrong)
        _, answer = party.reveal(run.group.identities[p], run.group.roster, state, requests[p])
        run.server.take(answer)
    sums = run.server.finish()
    assert sums.parties == 9


def test_a_dealer_of_wrong_shares_ends_the_round_with_the_sum_masked() -> None:
    run = session(consortium(4), "signatures")
    requests = run.server.close()
    masked = run.server._sum.copy()
    for p in run.group.terms.cohort:
        state = run.states[p]
        wrong = tuple((o, m, bytes(32) if o == 2 else s) for o, m, s in state.held)
        state = party.replace(state, held=wrong)
        _, answer = party.reveal(run.group.identities[p], run.group.roster, state, requests[p])
        run.server.take(answer)
    with pytest.raises(ProtocolError, match="party 2 do not recover") as error:
        run.server.finish()
    assert error.value.reason == "shares"
    assert (run.server._sum == masked).all()


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"threshold": 2}, "threshold 2 of 4"),
        ({"threshold": 5}, "threshold 5 of 4"),
        ({"cohort": [1, 2]}, "2 parties; 3 to"),
        ({"bits": 3}, "bits = 3"),
        ({"aggregate": "ties", "weighting": "examples"}, "TIES counts parties"),
        ({"base": "zz"}, "64 hexadecimal digits"),
        ({"clip": float("inf")}, "clip"),
        ({"aggregate": "median"}, "cannot be summed securely"),
    ],
)
def test_unsafe_terms_are_refused(settings_: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        consortium(4, **settings_)


def test_terms_have_one_encoding() -> None:
    from dare_agg.secure import decode_terms

    terms = consortium(4, aggregate="ties").terms
    data = terms.encode()
    assert decode_terms(data) == terms and decode_terms(data).session == terms.session
    assert hashlib.sha256(b"dare-agg secure terms 2\0" + data).digest() == terms.session
    for cut in range(len(data)):
        with pytest.raises(ProtocolError):
            decode_terms(data[:cut])
    with pytest.raises(ProtocolError, match="follow its end"):
        decode_terms(data + b"\0")
    for at in range(len(data)):
        other = bytearray(data)
        other[at] ^= 1
        try:
            changed = decode_terms(bytes(other))
        except ProtocolError:
            continue
        assert changed.session != terms.session
