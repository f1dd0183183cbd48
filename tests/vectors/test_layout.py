import hashlib
import struct
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_agg.errors import LayoutError, NonFiniteError
from dare_agg.vectors.layout import (
    FingerprintStream,
    Layout,
    check_finite,
    fingerprint,
    layout_of,
)

ARRAYS = {
    "head.weight": np.arange(4, dtype=np.float32),
    "b": np.full((2, 3), 2.0, np.float32),
    "a": np.array(1.5, np.float32),
    "steps": np.array([7], np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


def laid_out(arrays: dict[str, np.ndarray], exclude: Sequence[str] = ()) -> Layout:
    return layout_of(
        {name: array.shape for name, array in arrays.items()},
        exclude=exclude,
        buffers=[name for name, array in arrays.items() if array.dtype.kind != "f"],
    )


def test_every_name_is_in_exactly_one_group() -> None:
    layout = laid_out(ARRAYS, exclude=[r"^head\."])
    assert layout.names == ("a", "b", "empty")
    assert layout.excluded == ("head.weight",)
    assert layout.buffers == ("steps",)
    assert layout.size == 7


def test_order_of_names_does_not_matter() -> None:
    backwards = dict(reversed(ARRAYS.items()))
    assert laid_out(ARRAYS) == laid_out(backwards)


def test_flatten_and_unflatten_are_inverse() -> None:
    layout = laid_out(ARRAYS)
    back = layout.unflatten(layout.flatten(ARRAYS))
    assert set(back) == set(layout.names)
    for name, array in back.items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_unflatten_restores_dtypes() -> None:
    arrays = {"w": np.ones(3, np.float16)}
    layout = laid_out(arrays)
    back = layout.unflatten(layout.flatten(arrays), {"w": np.dtype(np.float16)})
    assert back["w"].dtype == np.float16


@given(st.integers(0, 7), st.integers(0, 7))
def test_pieces_cover_a_range_once(start: int, stop: int) -> None:
    layout = laid_out(ARRAYS, exclude=["head"])
    seen = [entry.offset + i for entry, lo, hi in layout.pieces(start, stop) for i in range(lo, hi)]
    assert seen == list(range(start, stop))


def test_fingerprint_is_the_documented_hash() -> None:
    layout = layout_of({"w": (2,)})
    vector = np.array([1.0, -2.0], np.float32)
    expected = hashlib.sha256(
        b"dare-agg parameters 1\0"
        + struct.pack("<I", 1)
        + b"w"
        + struct.pack("<I", 1)
        + struct.pack("<Q", 2)
        + struct.pack("<2f", 1.0, -2.0)
    ).hexdigest()
    assert fingerprint(layout, vector) == expected


@given(st.lists(st.integers(0, 7), max_size=4))
def test_fingerprint_does_not_depend_on_the_pieces(cuts: list[int]) -> None:
    layout = laid_out(ARRAYS, exclude=["head"])
    vector = layout.flatten(ARRAYS)
    stream = FingerprintStream(layout)
    bounds = [0, *sorted(cuts), vector.size]
    for lo, hi in pairwise(bounds):
        stream.update(vector[lo:hi])
    assert stream.hexdigest() == fingerprint(layout, vector)


def test_fingerprint_tells_values_names_and_shapes_apart() -> None:
    vector = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    prints = {
        fingerprint(layout_of(shapes), values)
        for shapes, values in [
            ({"w": (4,)}, vector),
            ({"v": (4,)}, vector),
            ({"w": (2, 2)}, vector),
            ({"w": (4,)}, vector + 1),
        ]
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": np.ones((3, 2), np.float32)}, r"'b' has shape \(3, 2\).*\(2, 3\)"),
        ({"b": np.ones((2, 3), np.int32)}, "'b' has dtype int32"),
        ({"b": np.ones((2, 3), object)}, "'b' has dtype object"),
    ],
)
def test_flatten_refuses_what_does_not_fit(change: dict, message: str) -> None:
    layout = laid_out(ARRAYS)
    with pytest.raises(LayoutError, match=message):
        layout.flatten({**ARRAYS, **change})
    with pytest.raises(LayoutError, match="'b' is missing"):
        layout.flatten({name: a for name, a in ARRAYS.items() if name != "b"})


def test_bad_pattern_is_named() -> None:
    with pytest.raises(LayoutError, match=r"'\(' is not a regular expression"):
        layout_of({"w": (1,)}, exclude=["("])


def test_non_finite_values_are_located() -> None:
    layout = laid_out(ARRAYS, exclude=["head"])
    vector = layout.flatten(ARRAYS)
    check_finite(layout, vector, "update")
    vector[4] = np.nan
    with pytest.raises(NonFiniteError, match=r"nan in tensor 'b' at index \(1, 0\)"):
        check_finite(layout, vector, "update")
