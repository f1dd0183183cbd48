"""The merge rows against inputs and outputs of mergekit's functions."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.norms import norm_ratios
from dare_agg.merge.wrapped import ScaledSource
from dare_agg.offline.recipe import MERGEKIT_NORMS
from dare_agg.vectors.layout import Layout, layout_of
from dare_agg.vectors.sources import array_source
from simulations.runs.sparsifiers import dare_given

DATA = Path(__file__).resolve().parent.parent / "data" / "mergekit"
TENSORS = ("w", "b", "c")


@cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file}


def tensors(file: str, tag: str) -> dict[str, np.ndarray]:
    return {name: load(file)[f"{tag}_{name}"] for name in TENSORS}


def problem() -> tuple[Layout, np.ndarray, list[np.ndarray]]:
    base = tensors("inputs", "base")
    layout = layout_of({name: array.shape for name, array in base.items()})
    models = [layout.flatten(tensors("inputs", f"ft{i}")) for i in range(1, 5)]
    return layout, layout.flatten(base), models


def method_cases() -> list[str]:
    return list(json.loads((DATA / "index.json").read_text()))


@pytest.mark.parametrize("case", method_cases())
def test_methods(case: str) -> None:
    about = json.loads((DATA / "index.json").read_text())[case]
    layout, base, models = problem()
    parameters = dict(about["parameters"])
    parameters.pop("int8_mask", None)
    scaling = parameters.pop("lambda", 1.0)
    options: dict[str, object] = dict(parameters)
    if about["method"] == "ties":
        options = {
            "density": about["per_model"]["density"],
            "trim-scope": "tensor",
            "sign-tie": "positive",
            "normalize": "agreeing" if parameters["normalize"] else "none",
            "rescale": parameters.get("rescale", False),
        }
    for tile in (7, 1 << 16):
        delta, _ = merge_deltas(
            layout, [array_source(m - base) for m in models], about["method"],
            weights=about["per_model"]["weight"], scaling=scaling, options=options, tile=tile,
            base=array_source(base),
        )  # fmt: skip
        file, tag = case.split("/")
        expected = layout.flatten(tensors(file, tag))
        np.testing.assert_allclose(base + delta, expected, rtol=0, atol=2e-6)


def sparsify_cases() -> list[str]:
    return sorted(load("sparsify"))


def test_magnitude_and_outliers() -> None:
    seen = set()
    for key in sparsify_cases():
        words = key.split("_")
        kind, name, which, density, last = words
        delta = load("inputs")[f"{which}_{name}"] - load("inputs")[f"base_{name}"]
        layout = layout_of({name: delta.shape})
        method, options = "ties", {"density": float(density[1:]), "trim-scope": "tensor"}
        if kind == "outliers":
            method = "breadcrumbs"
            options = {"density": float(density[1:]), "gamma": float(last[1:])}
        else:
            options |= {"rescale": last.lower(), "normalize": "none"}
        result, _ = merge_deltas(layout, [array_source(delta.ravel())], method, options=options)
        np.testing.assert_allclose(
            result, load("sparsify")[key].ravel(), rtol=0, atol=2e-6, err_msg=key
        )
        seen.add((kind, last))
    assert seen >= {("magnitude", norm) for norm in ("None", "l1", "l2", "linf")}


def test_sign_consensus() -> None:
    layout, base, models = problem()
    deltas = [array_source(m - base) for m in models]
    for key in ("sum", "count", "sum_weighted", "count_weighted"):
        weights = [0.5, 1, 0.25, -0.5] if "weighted" in key else [1.0] * 4
        keep = tensors("sign_consensus", key)
        rows = [{n: mask[i] for n, mask in keep.items()} for i in range(4)]
        merged, _ = merge_deltas(
            layout, deltas, "ties", weights=weights,
            options={
                "trim": 0, "normalize": "none", "sign-tie": "positive",
                "elect": key.partition("_")[0],
            },
        )  # fmt: skip
        expected = sum(
            w * (m - base) * layout.flatten({n: a.astype(np.float32) for n, a in row.items()})
            for w, m, row in zip(weights, models, rows, strict=True)
        )
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", ["paper", "mergekit"])
def test_dare_with_given_masks(rule: str) -> None:
    layout, base, models = problem()
    masks = tensors("dare_given_masks", "mask")
    kept = [
        layout.flatten({n: m[i].astype(np.float32) for n, m in masks.items()}) != 0
        for i in range(4)
    ]
    deltas = [m - base for m in models]
    dropped = [array_source(dare_given(d, ~k, "0.7")) for d, k in zip(deltas, kept, strict=True)]
    if rule == "mergekit":
        spans = [(e.offset, e.stop) for e in layout.entries]
        dropped = [
            ScaledSource(
                array_source(d * k),
                spans,
                norm_ratios(array_source(d), array_source(d * k), spans, "l1"),
            )
            for d, k in zip(deltas, kept, strict=True)
        ]
    spans = [(e.offset, e.stop) for e in layout.entries]
    norms = MERGEKIT_NORMS.values()
    masked = {norm: tensors("dare_given_masks", f"masked_{norm}") for norm in ("None", *norms)}
    paper = tensors("dare_given_masks", "paper_rescale")
    for i, (delta, keep) in enumerate(zip(deltas, kept, strict=True)):
        whole, left = array_source(delta), array_source(delta * keep)
        rescaled = [
            (ScaledSource(left, spans, norm_ratios(whole, left, spans, norm)), masked[norm])
            for norm in norms
        ]
        for source, wanted in (
            (left, masked["None"]), *rescaled,
            (array_source(dare_given(delta, ~keep, "0.7")), paper),
        ):  # fmt: skip
            found = np.empty(layout.size, np.float32)
            source.read(0, layout.size, found)
            expected = layout.flatten({n: a[i] for n, a in wanted.items()})
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    ties = {"trim": 0, "normalize": "none", "sign-tie": "positive"}
    for name, method, options in (
        ("dare_linear", "task-arithmetic", {}),
        ("dare_ties", "ties", ties),
        ("dare_ties_norm", "ties", ties | {"normalize": "agreeing"}),
    ):
        delta, _ = merge_deltas(layout, dropped, method, weights=[0.25] * 4, options=options)
        expected = layout.flatten(tensors("dare_given_masks", f"{name}_{rule}"))
        # The files hold the whole model for some rows and the delta for none.
        np.testing.assert_allclose(base + delta, expected, rtol=0, atol=2e-6, err_msg=name)
