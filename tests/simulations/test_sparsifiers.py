from pathlib import Path

import numpy as np
import pytest

from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.errors import ConfigError
from simulations.runs.sparsifiers import dare, dare_given, drop_only, magnitude, sparsify

VECTORS = Path(__file__).parents[1] / "data" / "mergelm"


def cases(name):
    with np.load(VECTORS / name) as file:
        arrays = {key: file[key] for key in file.files}
    for key, expected in arrays.items():
        parts = key.split("/")
        if parts[-1] in ("rescale0", "rescale1"):
            stem, rate = "/".join(parts[:-2]), parts[-2][1:]
            yield key, arrays[f"{stem}/in"], rate, parts[-1] == "rescale1", expected, arrays


def test_magnitude_equals_the_reference():
    seen = 0
    for key, delta, rate, rescale, expected, _ in cases("magnitude_mask.npz"):
        got = magnitude(delta.reshape(-1), rate, rescale=rescale).reshape(delta.shape)
        np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=key)
        seen += 1
    assert seen > 50


def test_dare_with_given_masks_equals_the_reference():
    seen = 0
    for key, delta, rate, rescale, expected, arrays in cases("dare_fixed_mask.npz"):
        mask = arrays[key.rsplit("/", 1)[0] + "/drop_mask"].astype(bool)
        if rescale:
            got = dare_given(delta, mask, 1 if rate == "1.0" else rate)
        else:
            got = np.where(mask, 0, delta)
        tolerance = 1e-6 if delta.dtype == np.float32 else 2e-3
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=tolerance, err_msg=key)
        seen += 1
    assert seen > 10


def test_magnitude_of_almost_nothing_keeps_everything():
    delta = np.array([1.0, -2.0], np.float32)
    assert np.array_equal(magnitude(delta, "0.4"), delta)


def test_dare_is_drop_only_rescaled():
    delta = np.arange(1, 101, dtype=np.float32)
    mask = Mask("stratified", 100, parse_drop_rate("0.9"), bytes(16))
    assert np.array_equal(dare(delta, mask), drop_only(delta, mask) * 10)
    assert np.array_equal(sparsify("dare", delta, mask=mask), dare(delta, mask))


def test_unknown_sparsifier():
    with pytest.raises(ConfigError, match="did you mean 'dare'"):
        sparsify("dar", np.zeros(1, np.float32))
