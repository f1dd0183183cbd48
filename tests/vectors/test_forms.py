"""What a tensor is: statistics and counters of several frameworks, and lists without names."""

import numpy as np
import pytest

from dare_agg.vectors.forms import is_counter, is_list, is_mask, whole_tensors

MATRIX, VECTOR = np.ones((4, 3), np.float32), np.ones(3, np.float32)


@pytest.mark.parametrize(
    "names",
    [
        ("bn.running_mean", "bn.running_var"),
        ("running_mean", "running_var"),
        ("batch_normalization/moving_mean:0", "batch_normalization/moving_variance:0"),
        ("batch_normalization_1/moving_mean", "batch_normalization_1/moving_variance"),
        ("batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"),
        ("['batch_stats']['bn']['mean']", "['batch_stats']['bn']['var']"),
        ("BatchNorm_0/mean", "BatchNorm_0/var"),
        ("bn.mean.value", "bn.var.value"),
        ("net/~/batch_norm/~/mean_ema/average", "net/~/batch_norm/~/var_ema/average"),
        ("normalization/mean", "normalization/variance"),
    ],
)
def test_statistics_are_known_by_their_names(names):
    model = {"dense/kernel": MATRIX, "dense/bias": VECTOR, "bn/scale": VECTOR}
    assert whole_tensors({**model, **dict.fromkeys(names, VECTOR)}) == set(names)


def test_weights_with_such_words_in_their_names_are_no_statistics():
    names = ["fc_mean.weight", "mean.bias", "var.bias", "policy.mean", "running_meanings", "mean"]
    assert whole_tensors({"w": MATRIX, **dict.fromkeys(names, VECTOR)}) == set()
    apart = {"head.mean": VECTOR, "head.var": np.ones(9, np.float32)}
    assert whole_tensors(apart) == set()


def test_of_models_whose_names_tell_nothing_all_vectors_travel_whole():
    long = np.ones(70_000, np.float32)
    arrays = [MATRIX, VECTOR, np.float32(1).reshape(()), np.array(3), np.ones((2, 2, 2)), long]
    for form in ("{}", "arr_{}", "layer{}.weight"):
        named = {form.format(n): array for n, array in enumerate(arrays)}
        assert whole_tensors(named) == {form.format(1), form.format(2)}
    assert whole_tensors({"0": VECTOR}) == set()


def test_lists_are_numbered_from_0():
    assert is_list(["0", "1", "2"]) and is_list(["1", "0"])
    assert not is_list(["1", "2"]) and not is_list(["0", "w"])


def test_counters_are_small_integers():
    for array in (np.array(7), np.zeros(64, np.uint8), np.array([], np.int32)):
        assert is_counter(array)
    table = np.zeros(65, np.int64)
    assert not is_counter(table) and is_counter(table, named=True)
    for array in (np.array(True), np.array(1.0), np.array([0, 1 << 24]), np.array(-(1 << 24))):
        assert not is_counter(array, named=True)
    assert not is_counter(np.array([5, 2**64 - 1], np.uint64))


INF = np.float32(-np.inf)


@pytest.mark.parametrize("other", [1.0, -1e9, np.finfo(np.float32).min, INF])
@pytest.mark.parametrize("shape", [(8, 8), (1, 1, 8, 8)])
def test_a_causal_mask_is_known_by_its_form(other, shape):
    for k in (0, -1):
        for triangle in (np.tri(8, k=k), np.tri(8, k=k).T):
            mask = np.where(triangle > 0, np.float32(other), np.float32(0)).reshape(shape)
            assert is_mask(mask)
            assert is_mask(mask, infinite=True) == (other == INF)
            mask[..., 4, 4 if k else 5] = 7
            assert not is_mask(mask)


def test_what_is_trained_is_no_mask():
    generator = np.random.default_rng(0)
    broken = generator.normal(size=(8, 8)).astype(np.float32)
    broken[0, 1] = INF
    nan = np.where(np.tri(8) > 0, np.nan, 0).astype(np.float32)
    padding = np.zeros((8, 5), np.float32)
    padding[0, 0] = 1
    others = (
        np.zeros((8, 8)),
        np.ones((8, 8)),
        np.eye(8),
        np.tri(3),
        np.tri(8, 6),
        np.tri(8, 8, 2),
    )
    for weight in (*others, broken, nan, padding, np.full((8, 8), INF), np.zeros((0, 8)), INF):
        assert not is_mask(np.asarray(weight))
    # Kept on disk in bands, or for single places: minus infinity is no weight anywhere.
    band = np.where(np.abs(np.subtract.outer(range(8), range(8))) > 2, INF, 0).astype(np.float32)
    assert is_mask(band) and is_mask(np.stack([band, band]), infinite=True)
