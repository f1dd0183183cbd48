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
    groups = split_tensors(arrays(), dense=["head", "scalar"], exclude=["^head"])
    assert groups.layout.names == ("a.weight", "z.weight")
    assert groups.dense_layout.names == ("norm.running_var", "scalar")
    assert set(groups.local) == {"norm.num_batches_tracked", "head.weight"}


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


def test_nothing_left_for_the_delta_group_is_an_error():
    with pytest.raises(LayoutError, match="narrow 'exclude'"):
        global_model(arrays(), exclude=["."])
