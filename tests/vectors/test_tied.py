"""Tied tensors as they are read from values, and what training makes of them."""

import numpy as np
import pytest

from dare_agg.errors import ApartError
from dare_agg.vectors.model import global_model
from dare_agg.vectors.tied import tied_tensors


def model_arrays():
    generator = np.random.default_rng(0)
    embedding = generator.normal(size=(30, 8)).astype(np.float32)
    return {
        "lm_head.weight": embedding.copy(),
        "embed.weight": embedding,
        "layer.weight": generator.normal(size=(8, 8)).astype(np.float32),
        "zeros.a": np.zeros((8, 8), np.float32),
        "zeros.b": np.zeros((8, 8), np.float32),
        "norm.a": np.arange(8, dtype=np.float32),
        "norm.b": np.arange(8, dtype=np.float32),
        "row.a": np.arange(8, dtype=np.float32).reshape(1, 8),
        "row.b": np.arange(8, dtype=np.float32).reshape(1, 8),
    }


def test_matrices_that_are_equal_to_the_bit_are_one():
    arrays = model_arrays()
    assert tied_tensors(arrays) == {"lm_head.weight": "embed.weight"}
    for change in (np.float32(1e-7), np.float16(1)):
        other = arrays["embed.weight"].copy()
        other[3, 5] += change
        assert tied_tensors({**arrays, "lm_head.weight": other}) == {}
    half = arrays["embed.weight"].astype(np.float16)
    assert tied_tensors({"a": half, "b": half.astype(np.float32)}) == {}
    three = dict.fromkeys("cab", arrays["embed.weight"])
    assert tied_tensors(three) == {"b": "a", "c": "a"}
    turned = {"a": half.T, "b": np.ascontiguousarray(half.T)}
    assert tied_tensors(turned) == {"b": "a"}


def test_a_tied_tensor_is_one_entry_and_every_name_of_it_comes_back():
    arrays = model_arrays()
    model = global_model(arrays, by_form=True)
    assert "lm_head.weight" not in model.groups.layout and "embed.weight" in model.groups.layout
    assert global_model(arrays).delta.size - model.delta.size == 240
    moved = model.moved(np.arange(model.delta.size, dtype=np.float32), None).arrays()
    assert list(moved) == list(arrays)
    assert np.array_equal(moved["lm_head.weight"], moved["embed.weight"])
    assert not np.array_equal(moved["zeros.a"], moved["zeros.b"])


def test_groups_keep_apart_what_they_are_told_and_other_groups_tensors():
    arrays = model_arrays()
    for words in ({"apart": ["lm_head.weight"]}, {"dense": ["head"]}, {"exclude": ["head"]}, {}):
        groups = global_model(arrays, by_form=bool(words), **words).groups
        assert not groups.copies and "embed.weight" in groups.layout
    groups = global_model(arrays, by_form=True, dense=["head", "embed"]).groups
    assert groups.copies and groups.dense_layout.names == ("embed.weight",)


def test_after_training_copies_are_one_or_said_to_be_apart():
    arrays = model_arrays()
    groups = global_model(arrays, by_form=True).groups
    tuned = arrays["embed.weight"] + 1
    for returned in ({"embed.weight": tuned}, {"lm_head.weight": tuned},
                     {"embed.weight": tuned, "lm_head.weight": tuned.copy()}):  # fmt: skip
        assert np.array_equal(groups.completed(arrays, returned)["embed.weight"], tuned)
    with pytest.raises(ApartError, match=r"'embed.weight' and 'lm_head.weight' are one") as told:
        groups.completed(arrays, {"embed.weight": tuned, "lm_head.weight": tuned + 1})
    assert told.value.names == ("lm_head.weight",)


def test_a_vector_is_laid_out_anew():
    arrays = model_arrays()
    one = global_model(arrays, by_form=True).groups
    two = global_model(arrays, by_form=True, apart=["lm_head.weight"]).groups
    vector = np.arange(one.layout.size, dtype=np.float32)
    named = two.layout.unflatten(two.relaid(vector, one))
    assert np.array_equal(named["lm_head.weight"], named["embed.weight"])
    assert np.array_equal(one.relaid(two.relaid(vector, one), two), vector)
