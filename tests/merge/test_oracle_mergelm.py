"""The merge rows against inputs and outputs of the DARE paper's own code."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.fisher import _sum_of_squares
from dare_agg.vectors.layout import Layout, layout_of
from dare_agg.vectors.sources import ArraySource, array_source
from simulations.runs.sparsifiers import dare_given

DATA = Path(__file__).resolve().parent.parent / "data" / "mergelm"
TOLERANCE = 1e-6


@cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file}


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    start = prefix + "/"
    return {k[len(start) :]: v for k, v in arrays.items() if k.startswith(start)}


def model(kind: str, which: str) -> dict[str, np.ndarray]:
    return under(load(f"models_{kind}"), which)


def layout_like(arrays: dict[str, np.ndarray]) -> Layout:
    return layout_of({name: array.shape for name, array in arrays.items()})


def cases(name: str) -> list[str]:
    return sorted({key.rpartition("/")[0] for key in load(name)})


def check_merge(
    kind: str, count: int, expected: dict, method: str, *, atol: float = TOLERANCE, **settings
) -> None:
    layout = layout_like(expected)
    base = layout.flatten(model(kind, "base"))
    sources = [array_source(layout.flatten(model(kind, f"m{i}")) - base) for i in range(count)]
    for tile in (17, 1 << 16):
        delta, _ = merge_deltas(
            layout, sources, method, base=array_source(base), tile=tile, **settings
        )
        np.testing.assert_allclose(base + delta, layout.flatten(expected), rtol=0, atol=atol)


def test_average() -> None:
    for case in cases("average"):
        kind, n, _ = case.split("/")
        check_merge(kind, int(n[1:]), under(load("average"), case), "average")


def test_task_arithmetic() -> None:
    for case in cases("task_arithmetic"):
        kind, n, scaling = case.split("/")
        check_merge(
            kind, int(n[1:]), under(load("task_arithmetic"), case), "task-arithmetic",
            scaling=float(scaling[1:]),
        )  # fmt: skip


def test_ties() -> None:
    for case in cases("ties_mergelm"):
        kind, n, rate, scaling = case.split("/")
        check_merge(
            kind, int(n[1:]), under(load("ties_mergelm"), case), "ties",
            scaling=float(scaling[1:]), options={"trim": float(rate[1:])},
        )  # fmt: skip


def official_trim(size: int, share: float) -> float:
    """The official code removes below the (d - int(d*K))-th smallest."""
    kept = share / 100 if share > 1 else share
    return (size - int(size * kept) + 0.5) / size


def test_ties_official() -> None:
    for case in cases("ties_official"):
        kind, n, share, scaling, rule = case.split("/")
        expected = under(load("ties_official"), case)
        check_merge(
            kind, int(n[1:]), expected, "ties", scaling=float(scaling[3:]),
            options={
                "trim": official_trim(layout_like(expected).size, float(share[1:])),
                "normalize": {"dis-mean": "agreeing", "dis-sum": "none"}[rule],
                "sign-tie": "majority-or-negative",
            },
        )  # fmt: skip


def stage_cases(name: str) -> list[tuple[str, str]]:
    return [tuple(c.rsplit("/", 1)) for c in cases(name) if "/" in c]  # type: ignore[misc]


@pytest.mark.parametrize("official", [False, True])
def test_ties_stages(official: bool) -> None:
    name = "ties_stages_official" if official else "ties_stages_mergelm"
    arrays = load(name)
    for case, rate in stage_cases(name):
        flat = arrays[f"{case}/in"].astype(np.float32)
        layout = layout_of({"x": (flat.shape[1],)})
        share = float(rate[1:])
        trim = official_trim(layout.size, share) if official else share
        rules = (
            {"dis-mean": "agreeing", "dis-sum": "none", "dis-max": "max"}
            if official
            else {"merged": "agreeing"}
        )
        for key, normalize in rules.items():
            merged, _ = merge_deltas(
                layout, [array_source(row) for row in flat], "ties", tile=13,
                options={
                    "trim": min(trim, 1), "normalize": normalize,
                    "sign-tie": "majority-or-negative" if official else "majority",
                },
            )  # fmt: skip
            np.testing.assert_allclose(
                merged, arrays[f"{case}/{rate}/{key}"], rtol=0, atol=TOLERANCE, err_msg=case
            )


def dropped_model(kind: str, number: int, rate: str, layout: Layout) -> ArraySource:
    """DARE of a model with the reference's mask of it."""
    masks = under(load("dare_models"), f"drop_mask_p{rate}/m{number}")
    base, tuned = (layout.flatten(model(kind, w)) for w in ("base", f"m{number}"))
    return array_source(dare_given(tuned - base, layout.flatten(masks) != 0, rate))


@pytest.mark.parametrize("rate", ["0.5", "0.9"])
@pytest.mark.parametrize("kind", ["A", "B"])
def test_dare_of_whole_models(kind: str, rate: str) -> None:
    arrays = load("dare_models")
    for form in ("delta_weight", "finetuned_weight"):
        for rescale in (0, 1):
            expected = under(arrays, f"mask_model/{kind}/p{rate}/{form}/rescale{rescale}")
            layout = layout_like(expected)
            masks = under(arrays, f"drop_mask_p{rate}/m0")
            drop = layout.flatten(masks) != 0
            base, tuned = (layout.flatten(model(kind, w)) for w in ("base", "m0"))
            # The paper's code can also mask the weights themselves.
            start = base if form == "delta_weight" else np.zeros_like(base)
            got = dare_given(tuned - start, drop, rate) if rescale else (tuned - start) * ~drop
            np.testing.assert_allclose(
                start + got, layout.flatten(expected), rtol=0, atol=2e-6, err_msg=f"{form}{rescale}"
            )


def test_dare_then_merge() -> None:
    seen = set()
    for case in cases("dare_models"):
        if not case.startswith("mask_merging/"):
            continue
        _, kind, rate, words, count = case.split("/")
        expected = under(load("dare_models"), case)
        layout = layout_like(expected)
        name, _, settings = words.partition("_scali")
        scaling, _, trim = settings.partition("_param")
        method = {
            "average_merging": "average", "task_arithmetic": "task-arithmetic",
            "ties_merging": "ties",
        }[name]  # fmt: skip
        sources = [dropped_model(kind, i, rate[1:], layout) for i in range(int(count[1:]))]
        delta, _ = merge_deltas(
            layout, sources, method, scaling=float(scaling or 1), tile=19,
            options={"trim": float(trim)} if trim else {},
        )  # fmt: skip
        base = layout.flatten(model(kind, "base"))
        np.testing.assert_allclose(
            base + delta, layout.flatten(expected), rtol=0, atol=TOLERANCE, err_msg=case
        )
        seen.add((method, rate, kind))
    assert len(seen) == 12


def test_fisher_given() -> None:
    arrays = load("fisher_given")
    seen = 0
    for case in cases("fisher_given"):
        parts = case.split("/")
        if len(parts) != 5:
            continue
        n, kind, norm, epsilon, coefficient = parts
        count = int(n[1:])
        expected = under(arrays, case)
        check_merge(
            kind, count, expected, "fisher",
            statistics=[under(arrays, f"{n}/fisher/m{i}") for i in range(count)],
            weights=arrays[f"{n}/coef_ramp"].astype(float) if "ramp" in coefficient else None,
            options={"epsilon": float(epsilon[3:]), "normalize": norm == "norm1"},
        )  # fmt: skip
        seen += 1
    assert seen >= 24


def test_fisher_of_scalars_and_convolutions() -> None:
    arrays = load("fisher_given")
    for group, name in (("scalar", "temperature"), ("conv", "conv.weight")):
        values = under(arrays, group)
        assert set(values) == {"fisher", "norm0/eps1e-06/coef_none"}
        check_merge(
            "A",
            2,
            {name: values["norm0/eps1e-06/coef_none"]},
            "fisher",
            statistics=[{name: row} for row in values["fisher"]],
        )


def test_fisher_norms() -> None:
    arrays = load("fisher_given")
    seen = 0
    for case in (key for key in arrays if key.endswith("/norms")):
        n, kind, _ = case.split("/")
        layout = layout_like(under(arrays, f"{n}/{kind}/norm1/eps1e-06/coef_none"))
        for i, expected in enumerate(arrays[case]):
            values = layout.flatten(under(arrays, f"{n}/fisher/m{i}"))
            found = _sum_of_squares(array_source(values)) ** 0.5
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
            seen += 1
    assert seen == 18


@pytest.mark.parametrize("rate", ["0.1", "0.5", "0.9"])
def test_dare_with_masks_of_a_seeded_generator(rate: str) -> None:
    arrays = load("dare_seeded_torch_cpu")
    drop = arrays[f"p{rate}/drop_mask"].reshape(-1) != 0
    got = dare_given(arrays["in"].reshape(-1), drop, rate)
    np.testing.assert_allclose(
        got, arrays[f"p{rate}/out"].reshape(-1), rtol=0, atol=TOLERANCE
    )  # fmt: skip


@pytest.mark.parametrize("form", ["delta_weight", "finetuned_weight"])
def test_dare_of_a_model_with_a_seeded_generator(form: str) -> None:
    torch = pytest.importorskip("torch")
    expected = under(load("dare_seeded_torch_cpu"), f"model/{form}/p0.5")
    base, tuned = model("A", "base"), model("A", "m0")
    # The reference draws for one parameter after the other, in the order of registration.
    torch.manual_seed(0)
    assert len(expected) >= 10
    for name in filter(expected.__contains__, map(str, load("models_A")["param_order"])):
        start = base[name] if form == "delta_weight" else np.zeros_like(base[name])
        drop = torch.bernoulli(torch.full(base[name].shape, 0.5)).numpy().reshape(-1) != 0
        got = dare_given((tuned[name] - start).reshape(-1), drop, "0.5").reshape(start.shape)
        np.testing.assert_allclose(start + got, expected[name], rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("file", ["regmean_given"])
def test_regmean_given(file: str) -> None:
    arrays = load(file)
    seen = 0
    for case in cases(file):
        parts = case.split("/")
        if len(parts) != 3 or not parts[2].startswith("alpha"):
            continue
        n, kind, alpha = parts
        count = int(n[1:])
        grams = [
            {f"{k}.weight": v for k, v in under(arrays, f"{n}/gram/m{i}").items()}
            for i in range(count)
        ]
        check_merge(
            kind, count, under(arrays, case), "regmean", statistics=grams,
            options={"off-diagonal": float(alpha[5:]), "ridge": 0}, atol=1e-5,
        )  # fmt: skip
        seen += 1
    assert seen >= 24
