import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest

from dare_agg.codec.feedback import FeedbackFile, encode_with_feedback
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
from dare_agg.errors import ConfigError, StateError

SIZE = 4096
SPEC = UpdateSpec(
    SIZE, parse_drop_rate("0.9"), "stratified", bytes(16), bytes(16), 0, "b1", "0" * 64, "1" * 64,
    False,
)  # fmt: skip


def spec_of(number, rescale=False):
    key = hashlib.sha256(struct.pack("<I", number)).digest()
    return replace(SPEC, mask_key=key[:16], values_key=key[16:], rescale=rescale)


def test_rescaled_survivors_are_refused():
    with pytest.raises(ConfigError, match="diverges"):
        encode_with_feedback(spec_of(0, rescale=True), np.ones(SIZE, np.float32), None)


def test_nothing_is_lost():
    """What was received so far and the memory add up to all deltas so far."""
    rng = np.random.default_rng(0)
    memory, received, total = None, np.zeros(SIZE, np.float32), np.zeros(SIZE)
    for number in range(40):
        delta = rng.standard_normal(SIZE).astype(np.float32)
        spec = spec_of(number)
        blob, memory = encode_with_feedback(spec, delta, memory)
        decode_update(blob, spec).add(0, SIZE, received)
        total += delta
    np.testing.assert_allclose(received + memory, total, atol=1e-3)


def test_over_rounds_it_beats_updates_without_memory():
    """The same delta each round: the mean received comes closer than unbiased DARE's."""
    delta = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)
    rounds, memory = 60, None
    sums = np.zeros((2, SIZE), np.float32)
    for number in range(rounds):
        blob, memory = encode_with_feedback(spec_of(number), delta, memory)
        decode_update(blob, spec_of(number)).add(0, SIZE, sums[0])
        plain = spec_of(number, rescale=True)
        decode_update(encode_update(plain, delta), plain).add(0, SIZE, sums[1])
    errors = np.linalg.norm(sums / rounds - delta, axis=1) / np.linalg.norm(delta)
    assert errors[0] < 0.75 * errors[1]


def test_the_memory_survives_in_a_file(tmp_path):
    file = FeedbackFile(tmp_path, "ab" * 32)
    assert file.read(SIZE) is None
    memory = np.arange(SIZE, dtype=np.float32)
    file.write(memory)
    assert np.array_equal(file.read(SIZE), memory)
    assert [path.name for path in tmp_path.iterdir()] == [file.path.name]
    with pytest.raises(StateError, match="remove it"):
        file.read(SIZE + 1)
    file.path.write_bytes(file.path.read_bytes()[:100])
    with pytest.raises(StateError, match="remove it"):
        file.read(SIZE)
