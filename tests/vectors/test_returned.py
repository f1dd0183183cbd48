"""What training returned, under the model's names: parts, wrappers' prefixes, and true words."""

import pytest

from dare_agg.errors import LayoutError
from dare_agg.vectors.returned import returned_tensors

MODEL = {"encoder.weight": 0, "encoder.bias": 0, "head.module.weight": 0}


def test_the_names_as_they_are_and_a_part_of_them():
    assert returned_tensors(MODEL, MODEL) == MODEL
    assert returned_tensors(MODEL, {"encoder.bias": 5}) == {"encoder.bias": 5}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_module.", "_fsdp_wrapped_module."]
)
def test_prefixes_of_wrappers_are_seen_through_on_either_side(prefix):
    wrapped = {prefix + name: value for name, value in MODEL.items()}
    assert returned_tensors(MODEL, wrapped) == MODEL
    assert returned_tensors(wrapped, MODEL) == wrapped


def test_a_compiled_part_of_a_model_is_seen_through():
    returned = {"encoder._orig_mod.weight": 1, "encoder._orig_mod.bias": 2, "head.module.weight": 3}
    assert list(returned_tensors(MODEL, returned)) == list(MODEL)


def test_one_tensor_under_two_names_is_refused():
    with pytest.raises(LayoutError, match=r"'encoder.bias' and 'module.encoder.bias', one tensor"):
        returned_tensors(MODEL, {**MODEL, "module.encoder.bias": 1})


def test_a_model_that_holds_a_name_twice_takes_names_as_they_are():
    model = {"w": 0, "module.w": 0}
    assert returned_tensors(model, {"w": 1, "module.w": 2}) == {"w": 1, "module.w": 2}
    with pytest.raises(LayoutError, match=r"_orig_mod\.w"):
        returned_tensors(model, {"_orig_mod.w": 1})


def test_local_tensors_may_be_others_and_may_be_lacking():
    found = returned_tensors(MODEL, {"module.mine": 1, "encoder.bias": 2}, ["^mine", "^head"])
    assert found == {"mine": 1, "encoder.bias": 2}
    with pytest.raises(LayoutError, match=r"1 tensors .* does not have \('module.mine'"):
        returned_tensors(MODEL, {"module.mine": 1, "encoder.bias": 2}, ["^head"])


def test_nothing_of_the_model_is_refused():
    with pytest.raises(LayoutError, match="without arrays"):
        returned_tensors(MODEL, {})
    with pytest.raises(LayoutError, match=r"local by 'exclude' \['\^head'\]"):
        returned_tensors(MODEL, {"head.module.weight": 1}, ["^head"])


def test_a_part_of_a_list_is_refused_since_its_members_have_no_names():
    model = {"0": 0, "1": 0, "2": 0}
    assert returned_tensors(model, {"0": 1, "1": 2}, ["^2$"]) == {"0": 1, "1": 2}
    with pytest.raises(LayoutError, match="2 arrays of a list of 3"):
        returned_tensors(model, {"0": 1, "1": 2})
