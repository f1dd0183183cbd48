"""Delta, dense and local tensors, and the global model's vectors."""

from __future__ import annotations

import numpy as np
import pytest

from dare_agg.errors import LayoutError
from dare_agg.vectors.layout import fingerprint
from dare_agg.vectors.model import global_model, split_tensors


def arrays() -> dict[str, np.ndarray]:
    return {
        "z.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.weight": np.ones((2, 2), np.float64),
        "norm.running_var": np.ones(2, np.float32),
        "norm.num_batches_tracked": np.asarray(7, np.int64),
        "head.weight": np.full((3,), 2, np.float16),
        "scalar": np.asarray(0.5, np.float32),
    }


def test_every_tensor_is_in_one_group_and_exclude_wins():
    words = {"dense": ["head", "scalar"], "exclude": ["^head"]}
    groups = split_tensors(arrays(), **words, by_form=True)
    assert groups.layout.names == ("a.weight", "z.weight")
    counter = "norm.num_batches_tracked"
    assert groups.dense_layout.names == (counter, "norm.running_var", "scalar")
    assert groups.integers == (counter,) and set(groups.local) == {"head.weight"}
    assert split_tensors(arrays(), exclude=["num_batches"], by_form=True).local == (counter,)
    before = split_tensors(arrays(), **words)
    assert before.dense_layout.names == ("norm.running_var", "scalar")
    assert set(before.local) == {counter, "head.weight"}


def test_a_model_of_vectors_alone_is_its_weights():
    vectors = {"0": np.ones(3, np.float32), "1": np.ones(4, np.float32)}
    groups = split_tensors(vectors, by_form=True)
    assert groups.layout.names == ("0", "1") and not groups.dense_layout.names
    groups = split_tensors({**vectors, "2": np.ones((2, 2), np.float32)}, by_form=True)
    assert groups.layout.names == ("2",) and groups.dense_layout.names == ("0", "1")


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.uint32])
def test_integers_are_exact_move_by_means_and_stay_in_their_range(dtype):
    top = min(np.iinfo(dtype).max, (1 << 24) - 1)
    first = {"w": np.ones((2, 2), np.float32), "n": np.array([0, 7, top], dtype)}
    model = global_model(first, by_form=True)
    assert np.array_equal(model.arrays()["n"], first["n"])
    step = np.array([1.5, 3 - 1e-5, 1], np.float32) / np.float32(4096)
    moved = model.moved(np.zeros(4, np.float32), step)
    assert moved.arrays()["n"].tolist() == [1, 10, top]
    assert global_model(moved.arrays(), by_form=True).ref == moved.ref


def test_arrays_come_back_in_order_shape_dtype_and_value():
    original = arrays()
    model = global_model(original, dense=["head"], exclude=["scalar"])
    restored = model.arrays()
    assert list(restored) == list(original)
    for name, array in original.items():
        assert restored[name].dtype == array.dtype and restored[name].shape == array.shape
        assert np.array_equal(restored[name], array)


def test_the_model_does_not_share_memory_with_its_source():
    original = arrays()
    model = global_model(original)
    original["z.weight"][:] = 99
    assert model.arrays()["z.weight"].max() == 5


def test_half_precision_models_move_to_what_clients_will_hold():
    model = global_model({"w": np.ones(4, np.float16)})
    moved = model.moved(np.full(4, 1e-4, np.float32), None)
    received = global_model({"w": moved.arrays()["w"]})
    assert received.ref.base == moved.ref.base
    assert moved.delta.max() == 1.0  # 1e-4 is below float16's spacing at 1


def test_version_names_both_groups():
    model = global_model(arrays(), dense=["head"])
    assert model.ref.base == fingerprint(model.groups.layout, model.delta)
    other = model.placed(model.delta, model.dense + 1)
    assert other.ref.base == model.ref.base and other.ref.version != model.ref.version


def test_a_model_of_bytes_is_said_to_be_one():
    with pytest.raises(LayoutError, match="all 1 tensors are uint8"):
        global_model({"0": np.frombuffer(b"trees", np.uint8)}, by_form=True)


def test_nothing_left_for_the_delta_group_is_an_error():
    with pytest.raises(LayoutError, match="narrow 'exclude'"):
        global_model(arrays(), exclude=["."])
