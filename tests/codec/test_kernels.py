"""The compiled loops give numpy's bits, and are used only when asked or worth it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from dare_agg.codec import kernels
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.kernels import choose_kernel, kernel_in_use
from dare_agg.codec.mask import DropRate, Mask
from dare_agg.codec.rates import RateTable, TensorRates
from dare_agg.codec.rotation import GROUP
from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
from dare_agg.errors import ConfigError, NonFiniteError

STRIDES = [Fraction(1), Fraction(3, 2), Fraction(7), Fraction(100, 9), Fraction(100)]


@pytest.fixture
def numba():
    """Both kernels may be chosen; numpy again afterwards, and what was chosen before."""
    pytest.importorskip("numba", reason="numba (extra 'fast') is not installed")
    before = kernels._state.choice
    yield
    kernels._state.choice = before


def spec_of(size, stride, values, rank=0, mask="stratified"):
    return UpdateSpec(
        size, DropRate(stride.numerator, stride.denominator), mask, b"m" * 16, b"v" * 16, rank,
        values, "0" * 64, "1" * 64,
    )  # fmt: skip


def hard_values(size):
    """Magnitudes from subnormal to large, zeros of both signs, ties of binary16, zero blocks."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal(size).astype(np.float32)
    values *= np.float32(2) ** rng.integers(-40, 8, size).astype(np.float32)
    values[::7] = 0
    values[3::7] = np.float32(-0.0)
    values[5::11] = np.float32(1e-42)
    values[2::13] = (1 + np.arange(values[2::13].size) % 64 / 2048).astype(np.float32)
    values[4::13] = (np.arange(values[4::13].size) % 5000).astype(np.float32) * np.float32(2**-25)
    values[: size // 5] = 0
    return values


def both(work):
    found = []
    for name in ("numpy", "numba"):
        choose_kernel(name)
        assert kernel_in_use() == name
        found.append(work())
    return found


@pytest.mark.parametrize("values", sorted(VALUE_FORMATS))
@pytest.mark.parametrize(
    ("stride", "rescale"),
    [(Fraction(1), True), (Fraction(7), True), (Fraction(100, 9), True), (Fraction(7), False)],
)
def test_every_value_format_has_the_same_bits(numba, values, stride, rescale):
    size = int((GROUP + 1500) * stride) + 5
    base, delta = np.zeros(size, np.float32), hard_values(size)
    spec = replace(spec_of(size, stride, values, rank=2), rescale=rescale)

    def work():
        blob = encode_update(spec, (base, delta))
        assert encode_update(spec, delta) == blob
        update = decode_update(blob, spec)
        read, added = np.empty(size, np.float32), np.full(size, 0.1, np.float32)
        update.read(0, size, read)
        update.add(0, size, added, 0.3)
        for lo, hi in ((5, size // 3), (size // 3, size)):
            update.add(lo, hi, added[lo:hi], -1.7)
        return blob, read.tobytes(), added.tobytes()

    plain, compiled = both(work)
    assert plain == compiled


@pytest.mark.parametrize("values", ["b1", "b2", "f16"])
@pytest.mark.parametrize("mask", ["stratified", "bernoulli"])
def test_threads_change_no_bit(values, mask, monkeypatch):
    monkeypatch.setattr("dare_agg.codec.update.GROUPS_A_THREAD", 1)
    delta = hard_values(500_000)
    spec = spec_of(delta.size, Fraction(2), values, mask=mask)
    alone = encode_update(spec, delta)
    assert encode_update(spec, delta, threads=3) == alone
    assert encode_update(spec, (np.zeros_like(delta), delta), threads=99) == alone


@pytest.mark.parametrize("stride", STRIDES, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 6, 2**32 - 1])
def test_masks_are_the_same(numba, stride, rank):
    size = int(70_001 * stride) + 3
    vector = np.random.default_rng(0).standard_normal(size).astype(np.float32)

    def work():
        mask = Mask(
            "stratified", size, DropRate(stride.numerator, stride.denominator), b"k" * 16, rank
        )
        pieces = [(p.copy(), np.broadcast_to(s, p.shape)) for p, s in mask.blocks()]
        part = [p.copy() for _, p, _ in mask.within(size // 7, size // 2)]
        whole = [np.concatenate(arrays) for arrays in (*zip(*pieces, strict=True), part)]
        whole += [mask.gather(vector), mask.indices(9, size // 9)]
        return [array.tobytes() for array in whole]

    plain, compiled = both(work)
    assert plain == compiled


@pytest.mark.parametrize("rank", [0, 3, 9])
@pytest.mark.parametrize("threshold", [33, 34, 36, 40])
def test_keep_rates_by_tensor_are_the_same(numba, threshold, rank):
    """Strides from 1 to hundreds, whole and not, of one large tensor and of many small ones."""
    rng = np.random.default_rng(6)
    sizes = (*rng.integers(0, 400, 60).tolist(), 1_500_000, 1, 0, 250_007, 99)
    levels = rng.integers(108, 132, len(sizes)).astype(np.uint8)
    levels[-2], levels[5] = 124, 0
    rates = TensorRates(sizes, RateTable(levels.tobytes(), (threshold << 15) + 4321), told=True)
    size = sum(sizes)
    delta = rng.standard_normal(size).astype(np.float32)
    spec = replace(spec_of(size, Fraction(7), "b1", rank), rates=rates)

    def work():
        mask = spec.draw_mask()
        pieces = [(p.copy(), np.broadcast_to(s, p.shape)) for p, s in mask.blocks()]
        part = [p.copy() for _, p, _ in mask.within(size // 7, size // 2)]
        whole = [np.concatenate(arrays) for arrays in (*zip(*pieces, strict=True), part)]
        assert (np.diff(whole[0]) > 0).all()
        added = np.zeros(size, np.float32)
        blob = encode_update(spec, delta)
        decode_update(blob, spec).add(0, size, added, 0.3)
        return [array.tobytes() for array in (*whole, mask.indices(9, size // 9), added)], blob

    plain, compiled = both(work)
    assert plain == compiled


@pytest.mark.parametrize("values", ["f16", "b1", "i8"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 2.0**61])
def test_what_is_no_number_is_refused_alike(numba, values, bad):
    delta = np.ones(2 * GROUP, np.float32)
    delta[GROUP + 3] = bad

    def work():
        with pytest.raises(NonFiniteError, match=f"survivor number {GROUP + 3}") as caught:
            encode_update(spec_of(delta.size, Fraction(1), values), delta)
        return str(caught.value)

    plain, compiled = both(work)
    assert plain == compiled


def test_f16_overflow_is_refused_alike(numba):
    delta = np.full(GROUP, 65520, np.float32)
    choose_kernel("numba")
    with pytest.raises(NonFiniteError, match="use bf16 or f32"):
        encode_update(spec_of(GROUP, Fraction(1), "f16"), delta)


def test_unusual_memory_goes_the_way_of_numpy(numba):
    """Strided, unaligned and read-only vectors."""
    size = GROUP * 2
    delta = hard_values(size)
    spec = spec_of(size, Fraction(2), "b1")
    wide = np.zeros((size, 2), np.float32)
    wide[:, 0] = delta
    shifted = np.frombuffer(b"\0" + delta.tobytes(), np.float32, offset=1)
    locked = delta.copy()
    locked.flags.writeable = False
    choose_kernel("numba")
    blob = encode_update(spec, delta)
    for other in (wide[:, 0], shifted, locked):
        assert encode_update(spec, other) == blob
        assert encode_update(spec, (other, np.zeros(size, np.float32)))
    out, plain = np.zeros((size, 2), np.float32), np.zeros(size, np.float32)
    update = decode_update(blob, spec)
    update.add(0, size, out[:, 1])
    update.add(0, size, plain)
    assert np.array_equal(out[:, 1], plain)


def test_unknown_names_say_what_is_known():
    with pytest.raises(ConfigError, match="did you mean 'numba'"):
        choose_kernel("numbaa")


def test_a_short_process_loads_nothing():
    """Small work, whatever is installed, imports no numba."""
    script = (
        "import sys, numpy as np\n"
        "from fractions import Fraction\n"
        "from dare_agg.codec.mask import DropRate\n"
        "from dare_agg.codec.update import UpdateSpec, encode_update\n"
        "spec = UpdateSpec(200_000, DropRate(2, 1), 'stratified', b'm' * 16, b'v' * 16, 0, 'b1',"
        " '0' * 64, '1' * 64)\n"
        "encode_update(spec, np.ones(200_000, np.float32))\n"
        "print('numba' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_without_numba_auto_goes_on_and_asking_for_it_is_an_error(monkeypatch):
    state = kernels._State()
    monkeypatch.setattr(kernels, "_state", state)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "dare_agg.codec.numba_loops", raising=False)
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    monkeypatch.setattr(kernels, "_WORTH_LOADING", 10)
    monkeypatch.setattr(kernels, "_WORTH_COMPILING", 10)
    assert kernels.compiled(9) is None and state.choice == "auto"
    assert kernels.compiled(9) is None and state.choice == "numpy"
    with pytest.raises(ConfigError, match="dare-agg"):
        choose_kernel("numba")


def test_auto_loads_once_it_is_worth_it(numba, monkeypatch):
    state = kernels._State()
    monkeypatch.setattr(kernels, "_state", state)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_WORTH_LOADING", 10)
    monkeypatch.setattr(kernels, "_WORTH_COMPILING", 10)
    assert kernel_in_use() == "numpy"
    assert kernels.compiled(9) is None
    assert kernels.compiled(9) is not None
    assert kernel_in_use() == "numba"
