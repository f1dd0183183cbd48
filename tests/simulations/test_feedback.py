import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
from dare_agg.errors import ConfigError
from simulations.runs.feedback import unsent

SIZE = 4096
SPEC = UpdateSpec(
    SIZE, parse_drop_rate("0.9"), "stratified", bytes(16), bytes(16), 0, "b1", "0" * 64, "1" * 64,
    False,
)  # fmt: skip


def spec_of(number, rescale=False):
    key = hashlib.sha256(struct.pack("<I", number)).digest()
    return replace(SPEC, mask_key=key[:16], values_key=key[16:], rescale=rescale)


def send(number, delta, memory):
    """One round: the receiver's update, and what the client keeps."""
    wanted = delta + memory
    update = decode_update(encode_update(spec_of(number), wanted), spec_of(number))
    return update, unsent(update, wanted)


def test_rescaled_survivors_are_refused():
    delta, spec = np.ones(SIZE, np.float32), spec_of(0, rescale=True)
    with pytest.raises(ConfigError, match="diverges"):
        unsent(decode_update(encode_update(spec, delta), spec), delta)


def test_nothing_is_lost():
    """What was received so far and the memory add up to all deltas so far."""
    rng = np.random.default_rng(0)
    memory, received, total = np.zeros((3, SIZE), np.float32)
    for number in range(40):
        delta = rng.standard_normal(SIZE).astype(np.float32)
        update, memory = send(number, delta, memory)
        update.add(0, SIZE, received)
        total += delta
    np.testing.assert_allclose(received + memory, total, atol=1e-3)


def test_over_rounds_it_beats_updates_without_memory():
    """The same delta each round: the mean received comes closer than unbiased DARE's."""
    delta = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)
    rounds, memory = 60, np.zeros(SIZE, np.float32)
    sums = np.zeros((2, SIZE), np.float32)
    for number in range(rounds):
        update, memory = send(number, delta, memory)
        update.add(0, SIZE, sums[0])
        plain = spec_of(number, rescale=True)
        decode_update(encode_update(plain, delta), plain).add(0, SIZE, sums[1])
    errors = np.linalg.norm(sums / rounds - delta, axis=1) / np.linalg.norm(delta)
    assert errors[0] < 0.75 * errors[1]
