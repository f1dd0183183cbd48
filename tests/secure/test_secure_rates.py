"""Secure sums whose tensors have keep rates of their own: terms, sums, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from parties import consortium, seeded

from dare_agg.codec.fitted_rates import fitted_rates, levels_of, tensor_squares
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.rates import RateTable, TensorRates
from dare_agg.errors import ConfigError, ProtocolError
from dare_agg.secure import decode_terms, secure_sum
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.sketch import sketch_of
from dare_agg.secure.terms import SecureTerms
from dare_agg.vectors.layout import layout_of

LAYOUT = layout_of({"a.weight": (60, 40), "b.bias": (60,), "c.weight": (30, 60)})
RATE = parse_drop_rate("0.9")


def learnt(parties: int = 4) -> list[np.ndarray]:
    """Deltas whose tensors differ a hundredfold."""
    scales = np.repeat(np.array([1e-3, 1e-1, 1e-2], np.float32), LAYOUT.sizes)
    rng = np.random.default_rng(3)
    return [(rng.normal(size=LAYOUT.size) * scales).astype(np.float32) for _ in range(parties)]


def told(deltas: list[np.ndarray]) -> TensorRates:
    levels = levels_of(LAYOUT.sizes, tensor_squares(LAYOUT.sizes, np.mean(deltas, axis=0)))
    return fitted_rates(LAYOUT.sizes, levels, RATE, "f32", told=True)


def with_rates(n: int = 4, **words: Any) -> Any:
    rates = words.pop("rates", None) or told(learnt(n))
    size, drop = words.pop("size", LAYOUT.size), words.pop("drop_rate", RATE)
    return consortium(n, size=size, drop_rate=drop, rates=rates, **words)


@pytest.mark.parametrize("groups", [1, 2])
def test_terms_have_one_encoding(groups: int) -> None:
    terms = with_rates(4, groups=groups).terms
    data = terms.encode()
    assert decode_terms(data) == terms and decode_terms(data).session == terms.session
    assert decode_terms(data).rates == terms.rates != None  # noqa: E711
    assert terms.session != replace(terms, rates=None).session
    with pytest.raises(ProtocolError, match="keep rates"):
        decode_terms(data + b"\0")
    others = [data[:cut] for cut in range(len(data))]
    for bit in range(8 * len(data)):
        other = bytearray(data)
        other[bit // 8] ^= 1 << bit % 8
        others.append(bytes(other))
    for other in others:
        try:
            changed = decode_terms(other)
        except ProtocolError:
            continue
        assert changed.session != terms.session


def test_no_more_words_than_of_one_rate() -> None:
    terms = with_rates().terms
    uniform = replace(terms, rates=None)
    assert 0.98 * uniform.survivors < terms.survivors <= uniform.survivors
    assert terms.mask(bytes(32)).survivors == terms.survivors


@pytest.mark.parametrize("aggregate", ["mean", "ties"])
@pytest.mark.parametrize("gone", [{}, {"vectors": [2]}])
def test_a_sum_is_the_merge_of_the_survivors(aggregate: str, gone: dict[str, list[int]]) -> None:
    group, deltas = with_rates(5, aggregate=aggregate, bits=22, clip=0.5), learnt(5)
    found = secure_sum(
        group.terms, group.roster, group.identities,
        lambda party, mask: mask.gather(deltas[party - 1]), dropped=gone, random=seeded(4),
    )  # fmt: skip
    inside = [deltas[party - 1] for party in found.alive]
    assert len(inside) == 5 - len(gone)
    stack = np.array([found.mask.gather(delta) for delta in inside], np.float64)
    if aggregate == "ties":
        agree = np.sign(stack) == np.sign(stack.sum(0))
        merged = (stack * agree).sum(0) / agree.sum(0)
    else:
        merged = stack.mean(0)
    wanted = found.mask.scatter(merged.astype(np.float32))
    rates = group.terms.rates
    assert rates is not None
    # b, which changes most, is kept whole; a hardly at all.
    counts = rates.known.counts(np.array(LAYOUT.sizes))
    assert counts[1] == LAYOUT.sizes[1] and counts[0] < LAYOUT.sizes[0] / 20
    error = found.merged()[0] - wanted
    assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(wanted)


def test_of_the_same_words_the_error_is_less() -> None:
    deltas = learnt(3)
    errors = {}
    for rates in (told(deltas), None):
        group = consortium(3, size=LAYOUT.size, drop_rate=RATE, rates=rates, bits=16, clip=0.5)
        merged, _ = secure_sum(
            group.terms, group.roster, group.identities,
            lambda party, mask: mask.gather(deltas[party - 1]), random=seeded(9),
        ).merged()  # fmt: skip
        wanted = np.mean(deltas, axis=0)
        errors[rates is None] = np.square(merged - wanted).sum() / np.square(wanted).sum()
    assert errors[False] < errors[True] / 3


def test_gram_matrices_go_with_rates_by_tensor() -> None:
    deltas, settings = (
        learnt(3),
        SecureSettings("wudi", drop_rate=RATE, clip=0.5, keep_rates="last"),
    )
    blank = consortium(3)
    levels = told(deltas).known.levels
    terms = settings.terms(
        run="run", round_number=2, roster=blank.roster, cohort=[1, 2, 3], base="ab" * 32,
        layout="cd" * 32, size=LAYOUT.size, model=LAYOUT, levels=levels,
    )  # fmt: skip
    assert terms.rates is not None and decode_terms(terms.encode()) == terms
    found = secure_sum(
        terms, blank.roster, blank.identities,
        lambda party, mask: np.concatenate(
            [mask.gather(deltas[party - 1]),
             sketch_of(terms.sketch_plan(LAYOUT), deltas[party - 1])]
        ),
        random=seeded(2),
    )  # fmt: skip
    merged = found.merged(layout=LAYOUT)[0]
    # What is kept whole and is no Linear is the mean, to the fixed point.
    b = slice(LAYOUT.sizes[0], LAYOUT.sizes[0] + LAYOUT.sizes[1])
    assert np.abs(merged[b] - np.mean(deltas, axis=0)[b]).max() < 1e-5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"size": LAYOUT.size + 1}, "as many as the size"),
        ({"drop_rate": parse_drop_rate("0.99")}, "which the drop rate allows"),
        ({"rates": TensorRates(LAYOUT.sizes, RateTable(b"\0\0\0"), told=True)}, "0 survivors"),
    ],
)
def test_rates_that_are_none_are_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        with_rates(**words)


def test_rates_of_other_tensors_are_refused_by_who_has_the_model() -> None:
    terms: SecureTerms = with_rates().terms
    terms.check_layout(LAYOUT)
    other = layout_of({"a.weight": (60, 40), "b.bias": (61,), "c.weight": (30, 60)})
    with pytest.raises(ProtocolError, match="other sizes") as error:
        terms.check_layout(other)
    assert error.value.reason == "terms"


@pytest.mark.parametrize("keep_rates", ["own", "lats"])
def test_rates_of_each_party_are_refused(keep_rates: str) -> None:
    with pytest.raises(ConfigError, match="uniform or last are possible"):
        SecureSettings(keep_rates=keep_rates)
