"""A short fuzz of both directions of a secure sum; the long one is a command."""

import pytest

from dare_agg.secure import messages as wire
from simulations.bench.fuzz_secure import PartySide, ServerSide
from simulations.bench.fuzzing import fuzz


def test_dishonest_answers_give_typed_errors_or_count_as_signed():
    figures = fuzz(ServerSide(), 1500, seed=5)
    reasons = figures["reasons"]
    assert sum(reasons.values()) == figures["mutants"] == 1500
    assert {"accepted", "signature", "session", "duplicate", "malformed"} <= set(reasons)


def test_dishonest_requests_give_typed_errors_or_are_canonical():
    figures = fuzz(PartySide(), 1500, seed=6)
    reasons = figures["reasons"]
    assert sum(reasons.values()) == figures["mutants"] == 1500
    assert {"accepted", "terms", "alive", "shares", "nonce", "threshold"} <= set(reasons)


def test_a_server_that_checks_no_signature_is_found(monkeypatch):
    monkeypatch.setattr(wire, "check_signature", lambda *_: None)
    with pytest.raises(AssertionError, match="forgery"):
        fuzz(ServerSide(), 1500, seed=5)
