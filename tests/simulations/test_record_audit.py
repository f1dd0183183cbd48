"""The audit of records: below what is charged with noise, above it without."""

import pytest

from simulations.bench.record_audit import audit_records


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_attack_stays_below_what_is_charged(seed, rate):
    found = audit_records(seed, noise=True, rate=rate)
    assert 1.99 < found.epsilon <= 2.0
    assert found.bound <= found.epsilon


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_attack_exceeds_what_is_promised_where_noise_is_off(seed, rate):
    assert audit_records(seed, noise=False, rate=rate).bound > 2.0
