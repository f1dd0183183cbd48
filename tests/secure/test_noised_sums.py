"""Sums whose parties add noise: their words, their noise, what they cost, what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from parties import consortium

from dare_agg.errors import ConfigError, PrivacyError, ProtocolError
from dare_agg.privacy import shares
from dare_agg.privacy.accountant import concentrated_epsilon
from dare_agg.privacy.sharing import SharedPrivacy
from dare_agg.secure import private
from dare_agg.secure.guard import PrivacyGuard, honest_parties
from dare_agg.secure.local import secure_sum
from dare_agg.secure.packing import Quantiser, pack_private, unpack_sums
from dare_agg.secure.policy import check_terms
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.stream import cut_words
from dare_agg.secure.terms import decode_terms

KEYS = b"r" * 16, b"n" * 16


def noised_group(n=4, variance=400, bits=10, size=4000, dense=50, **words):
    return consortium(
        n, aggregate="private-mean", variance=variance, bits=bits, size=size, dense=dense,
        epsilon=8.0, delta=1e-3, clip=2.0, **words,
    )  # fmt: skip


def values_of(group, spread=0.01, seed=1):
    rng = np.random.default_rng(seed)
    terms = group.terms
    return {p: rng.normal(0, spread, terms.values).astype(np.float32) for p in terms.cohort}


def clipped(values, mask, norm):
    """A party's vector as it is summed, by the textbook."""
    whole = values.astype(np.float64)
    whole[: mask.survivors] *= private.rescale_of(mask)
    return whole * min(1.0, norm / np.linalg.norm(whole))


def noise_in(result, values, party_ids, n):
    """What of a sum is not the parties' own, in units."""
    point = result.terms.quantiser
    plain = sum(clipped(values[p], result.mask, point.clip) for p in party_ids)
    return result.sums.total - plain * (point.top / point.clip)


@pytest.mark.parametrize("spread", [1e-4, 0.01, 5.0])
def test_a_sum_is_the_clipped_mean_within_its_noise(spread):
    group = noised_group()
    values = values_of(group, spread)
    result = secure_sum(group.terms, group.roster, group.identities, lambda p, mask: values[p])
    rest = noise_in(result, values, group.terms.cohort, 4)
    deviation = math.sqrt(4 * 400 + 4 / 4)
    assert abs(rest.mean()) < 5 * deviation / math.sqrt(rest.size)
    # Rounding adds at most ¼ a party to its variance.
    least, most = 4 * 400, 4 * (400 + 0.25)
    chance = 5 * math.sqrt(2 / rest.size)
    assert least * (1 - chance) < rest.var() < most * (1 + chance)
    merged, measured = result.merged()
    assert measured.clipped_share == 0 and measured.parties == 4
    unit = 2.0 / group.terms.quantiser.top
    plain = sum(clipped(v, result.mask, 2.0) for v in values.values()) / 4
    seen = result.mask.gather(merged)
    assert np.abs(seen - plain[: seen.size]).max() < 6 * deviation * unit / 4


def test_the_cohort_divides_whoever_stays():
    group = noised_group(6, variance=1, bits=16, dense=0)
    values = values_of(group, 0.001)
    gone = {"vectors": [2]}
    result = secure_sum(
        group.terms, group.roster, group.identities, lambda p, mask: values[p], dropped=gone
    )
    stayed = [p for p in group.terms.cohort if p != 2]
    merged, _ = result.merged()
    plain = sum(clipped(values[p], result.mask, 2.0) for p in stayed) / 6
    seen = result.mask.gather(merged)
    assert np.abs(seen - plain).max() < 6 * math.sqrt(5 * 1.25) * 2 / 65535 / 6


def test_no_sum_is_without_the_noise_of_those_who_must_stay():
    """An attack: those who may collude add none and take their own off, all but the threshold
    fall out. What is left of the sum has the variance that is counted."""
    group = noised_group(10, variance=2500, bits=8, size=30_000, dense=0)
    terms = group.terms
    values = values_of(group, 0.001)
    colluders = [1, 2]
    real = shares.discrete_gaussian
    calls = []

    def noise(variance, size, key):
        calls.append(variance)
        drawn = real(variance, size, key)
        return drawn if len(calls) > len(colluders) else np.zeros_like(drawn)

    patch = pytest.MonkeyPatch()
    patch.setattr(private, "discrete_gaussian", noise)
    try:
        gone = {"vectors": sorted(terms.cohort)[terms.threshold :]}
        result = secure_sum(
            terms, group.roster, group.identities, lambda p, mask: values[p], dropped=gone
        )
    finally:
        patch.undo()
    assert len(result.alive) == terms.threshold == len(calls)
    rest = noise_in(result, values, result.alive, 10)
    honest = honest_parties(terms.threshold, 10, 0.2)
    assert honest == terms.threshold - len(colluders)
    promised = honest * 2500
    assert rest.var() > promised * (1 - 5 * math.sqrt(2 / rest.size))
    # And one that is a colluder more would be found out by this test.
    assert (honest - 1) * 2500 < promised * (1 - 5 * math.sqrt(2 / rest.size))


def test_what_a_party_sends_is_as_long_as_is_counted_whatever_its_values():
    rng = np.random.default_rng(3)
    for size, top in ((50, 15), (5000, 15), (5000, 1023), (200_000, 255)):
        most = private.square_bound(top, size)
        for turn in range(6):
            x = rng.standard_normal(size) * rng.random(size) ** 9
            x *= top / np.linalg.norm(x)
            if turn == 0:  # as far from whole numbers as can be
                x = np.full(size, top / math.sqrt(size))
            key = rng.bytes(16)
            tau = private._rounded(x * (1 - 1e-12), most, key)
            assert int((tau**2).sum()) <= most
            assert np.abs(tau - x).max() <= 1
    # Neighbouring vectors may differ by all of it: the bound is above the norm.
    assert private.square_bound(255, 100) >= 255**2


def test_a_rounding_that_is_too_long_is_drawn_again():
    x = np.full(4000, 0.5)
    expected = 4000 * 0.5  # each square is 0 or 1
    tight = int(expected)  # half of all roundings are longer
    seen = {int((private._rounded(x, tight, bytes([k]) * 16) ** 2).sum()) for k in range(12)}
    assert max(seen) <= tight and len(seen) > 3
    assert int((private._rounded(x, 0, KEYS[0]) ** 2).sum()) == 0  # towards zero in the end


def test_a_party_that_has_diverged_adds_no_more_than_the_norm():
    group = noised_group(variance=1, bits=16)
    mask = group.terms.mask(b"d" * 32)
    huge = np.full(group.terms.values, 3e38, np.float32)
    tau = private.noised(huge, mask, group.terms.quantiser, 1, KEYS)
    assert math.sqrt(float((tau.astype(float) ** 2).sum())) < 65535 * 1.02
    with pytest.raises(Exception, match="finite"):
        private.noised(huge * np.float32("nan"), mask, group.terms.quantiser, 1, KEYS)
    still = private.noised(huge * 0, mask, group.terms.quantiser, 1, KEYS)
    assert 0 < np.abs(still).max() < 10


@pytest.mark.parametrize(("variance", "n", "bits"), [(1, 3, 4), (shares.MOST_VARIANCE, 900, 24)])
def test_noise_never_overflows_the_word(variance, n, bits):
    point = Quantiser("private-mean", bits, 1.0, n, variance)
    worst = n * point.top + math.floor(private._REACH * math.sqrt(n * variance))
    assert worst <= point.reach < 1 << (point.word_bits - 1)
    # Of 2²⁸ words one is beyond with a chance below 2⁻⁴⁰.
    assert 2 * 2**28 * math.exp(-(private._REACH**2) / 2) < 2.0**-40
    half = np.array([worst, -worst, 5, point.top * n, 0], np.int64)
    words = cut_words(half.astype(np.uint64), point.word_bits)
    assert np.array_equal(unpack_sums(words, point, n).total, half[:3])
    with pytest.raises(ProtocolError, match="noised sum"):
        beyond = np.array([point.reach + 1, point.top * n, 0], np.int64).astype(np.uint64)
        unpack_sums(cut_words(beyond, point.word_bits), point, n)


def test_words_tell_no_weight_and_nothing_of_what_was_clipped():
    group = noised_group(dense=0)
    mask = group.terms.mask(b"d" * 32)
    point = group.terms.quantiser
    tails = set()
    alone = np.zeros(group.terms.values, np.float32)
    alone[0] = 1e6
    for values in (alone, *(values_of(group, spread)[1] for spread in (1e-5, 100.0))):
        words = pack_private(values, mask, point, KEYS)
        tails.add(tuple(words[-2:].tolist()))
    assert tails == {(point.top, 0)}


def test_terms_of_noised_sums_are_read_as_they_were_written():
    terms = noised_group().terms
    assert decode_terms(terms.encode()) == terms
    assert decode_terms(consortium().terms.encode()) == consortium().terms
    for changed in ({"variance": 0}, {"variance": 1 << 25}, {"epsilon": 0.0}, {"delta": 1.0}):
        with pytest.raises(ConfigError):
            replace(terms, **changed)
    for name in ("mean", "ties"):
        with pytest.raises(ConfigError, match=r"noise|private"):
            replace(terms, aggregate=name)
    with pytest.raises(ConfigError, match="weighting"):
        replace(terms, weighting="examples", max_weight=5.0)


def settings(**words):
    return SecureSettings(**{"privacy": SharedPrivacy(), "drop_rate": "0.9", **words})


def terms_for(group, n=10, size=3000, rho=0.05, **words):
    return settings(**words).terms(
        run="a", round_number=1, roster=group.roster, cohort=range(1, n + 1), base="ab" * 32,
        layout="cd" * 32, size=size, rho=rho,
    )  # fmt: skip


def test_noise_is_counted_for_those_who_must_stay_and_do_not_collude():
    group = consortium(10)
    terms = terms_for(group)
    assert (terms.threshold, honest_parties(terms.threshold, 10, 0.2)) == (7, 5)
    cost = private.released(terms.quantiser.top, terms.values, terms.variance, 5)
    assert 0.049 < cost <= 0.05
    assert private.released(terms.quantiser.top, terms.values, terms.variance - 1, 5) > 0.05
    # More who must stay: less noise at each.
    assert terms_for(group, threshold=10, min_parties=10).variance < terms.variance
    assert terms.quantiser.bits >= 8 and terms.clip == 1.0


def test_noise_that_cannot_be_drawn_is_refused_with_a_remedy_that_works():
    group = consortium(10)
    with pytest.raises(ConfigError, match=r"fewer bits.*secure-bits = 0"):
        terms_for(group, rho=1e-4, bits=16)
    assert terms_for(group, rho=1e-4).variance <= shares.MOST_VARIANCE
    with pytest.raises(ConfigError, match="larger ε"):
        terms_for(group, rho=1e-12)
    with pytest.raises(ConfigError, match="one-shot"):
        terms_for(group, rho=0.0)
    with pytest.raises(ConfigError, match="may collude"):
        settings(colluding=0.3).terms(
            run="a", round_number=1, roster=group.roster, cohort=range(1, 7), base="ab" * 32,
            layout="cd" * 32, size=3000, rho=0.05,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"method": "ties"}, "secure = mean"),
        ({"method": "wudi"}, "secure = mean"),
        ({"method": "task-arithmetic"}, "secure = mean"),
        ({"groups": 3}, "secure-groups"),
        ({"weighting": "examples"}, "equal"),
        ({"bits": 3}, "secure-bits"),
    ],
)
def test_what_breaks_the_promise_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        settings(**words)


@pytest.mark.parametrize(
    "words", [{"epsilon": 0.0}, {"epsilon": 51.0}, {"clip": 0.0}, {"noise": 1e-9}, {"delta": -1.0}]
)
def test_numbers_that_promise_nothing_are_refused(words):
    with pytest.raises(ConfigError, match="privacy"):
        SharedPrivacy(**words)
    with pytest.raises(ConfigError, match="less than 1/10"):
        SharedPrivacy(delta=0.1).begin(3, 10)


def test_the_rounds_of_a_run_spend_its_epsilon_and_no_more(tmp_path):
    run = SharedPrivacy(ledger=tmp_path / "budget").begin(5, 20)
    for number in range(5):
        assert run.may_go_on
        run.charge(number, bytes([number]) * 32)
    assert 7.9 < run.epsilon <= 8.0 and not run.may_go_on
    again = SharedPrivacy(ledger=tmp_path / "budget").begin(99, 20)
    assert again.budget.noise == run.budget.noise and again.epsilon == run.epsilon
    with pytest.raises(PrivacyError, match="more than ε = 8"):
        again.charge(6, bytes(32))
    # What it costs is what noise in shares costs, never what a Gaussian's curve would say.
    assert again.budget.spent.rho == pytest.approx(5 * run.rho) and not again.budget.spent.gaussian


def guard(tmp_path, **words):
    return PrivacyGuard(tmp_path / "own" / "budget", tmp_path / "marks", colluding=0.2, **words)


def test_a_party_keeps_its_own_limit_whatever_the_server_says(tmp_path):
    group = consortium(10)
    terms = terms_for(group)
    one = concentrated_epsilon(0.05, terms.delta)
    own = guard(tmp_path, epsilon=1.2 * one)
    own.check(terms, group.roster, 1)
    own.charge(terms, group.roster, 1)
    other = replace(terms, run="another")
    for refused in (own.check, own.charge):
        with pytest.raises(PrivacyError, match=r"its budget of .*secure-epsilon"):
            refused(other, group.roster, 1)
    # Hardly any noise, whatever ε the terms claim; and noise that its colluders would know.
    with pytest.raises(PrivacyError, match=r"promises nothing|budget of"):
        own.check(replace(terms, variance=1), group.roster, 1)
    with pytest.raises(PrivacyError, match="secure-colluding"):
        replace(own, colluding=1 / 3).check(
            replace(noised_group(3).terms, threshold=3), consortium(9).roster, 1
        )
    # One that has said a limit takes part in no sum without noise.
    plain = consortium(10).terms
    guard(tmp_path).check(plain, group.roster, 1)
    with pytest.raises(PrivacyError, match="noised sums alone"):
        guard(tmp_path, epsilon=1.0, insists=True).check(plain, group.roster, 1)


def test_a_party_that_says_nothing_lets_a_server_spend_eight_at_most(tmp_path):
    group = consortium(10)
    terms = replace(terms_for(group, rho=6.0), epsilon=40.0)
    with pytest.raises(PrivacyError, match="its budget of 8"):
        guard(tmp_path).check(terms, group.roster, 1)
    guard(tmp_path, practice=True).check(terms, group.roster, 1)


def test_a_budget_rolled_back_lost_or_of_another_party_is_refused(tmp_path):
    group = consortium(10)
    terms = terms_for(group, rho=0.001)
    own = guard(tmp_path)
    own.charge(terms, group.roster, 1)
    before = own.path.read_bytes()
    own.charge(replace(terms, round=2), group.roster, 1)
    with pytest.raises(PrivacyError, match="party"):
        own.check(terms, group.roster, 2)
    own.path.write_bytes(before)
    with pytest.raises(PrivacyError, match="rolled back"):
        own.check(terms, group.roster, 1)
    own.path.unlink()
    with pytest.raises(PrivacyError, match=r"is gone.*secure-budget"):
        own.check(terms, group.roster, 1)


def test_a_norm_above_the_largest_clip_is_no_refusal_where_noise_follows_it():
    group = noised_group(5)
    policy = group.policy(max_clip=1.0)
    check_terms(group.terms, group.roster, policy)
    with pytest.raises(ProtocolError, match="clip"):
        wide = consortium(5, clip=2.0)
        check_terms(wide.terms, wide.roster, policy)
    with pytest.raises(ProtocolError, match="takes part in mean"):
        check_terms(group.terms, group.roster, group.policy(aggregates=("mean",)))
