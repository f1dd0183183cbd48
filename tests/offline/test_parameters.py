"""Weights, drop rates and options that differ from model to model and from tensor to tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from dare_agg.errors import ConfigError
from dare_agg.offline.parameters import (
    by_tensor,
    parse_parameter,
    places,
    plain_parameter,
)
from tests.tiny import command, llama, tensors, worst

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("mlp.up", "self_attn.q")),
    "model.norm.weight",
    "lm_head.weight",
]


def values(plain: object) -> dict[str, float]:
    found = by_tensor(parse_parameter(plain), places(NAMES, NAMES), "weight")
    return dict(zip(NAMES, found.tolist(), strict=True))


def test_a_gradient_runs_over_the_layers_and_starts_outside_them() -> None:
    found = values([0, 0.3, 0.9])
    assert [found[f"model.layers.{i}.mlp.up.weight"] for i in range(4)] == pytest.approx(
        [0, 0.2, 0.5, 0.9]
    )
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == 0


def test_the_first_choice_that_fits_holds() -> None:
    found = values(
        [
            {"filter": "self_attn", "value": [0, 1]},
            {"filter": "mlp", "layers": [1, 3], "value": [5, 7]},
            {"filter": "*", "layers": [0, 1], "value": 9},
            {"value": "2.5e-1"},
        ]
    )
    assert [found[f"model.layers.{i}.self_attn.q.weight"] for i in range(4)] == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )
    assert [found[f"model.layers.{i}.mlp.up.weight"] for i in range(4)] == [9, 5, 7, 0.25]
    # What comes before the layers goes with the first.
    assert found["model.embed_tokens.weight"] == 9 and found["model.norm.weight"] == 0.25


def test_stacks_of_layers_are_counted_apart() -> None:
    names = ["encoder.block.0.w", "encoder.block.1.w", "decoder.block.0.w", "shared.weight"]
    names += ["decoder.block.0.experts.7.w"]
    found = by_tensor(parse_parameter([0, 1]), places(names, names), "weight")
    assert found.tolist() == [0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    "plain",
    [0.5, [0, 1.5], [{"filter": "mlp", "value": [0, 1]}, {"layers": [0, 2], "value": 1}]],
)
def test_plain_values_say_the_same_again(plain: object) -> None:
    parameter = parse_parameter(plain)
    assert parse_parameter(plain_parameter(parameter)) == parameter


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ([], "empty"),
        (True, "no parameter"),
        ("many", "no parameter"),
        (float("nan"), "no parameter"),
        ([1, [2]], "no parameter"),
        ([{"filter": "mlp"}], "value"),
        ([{"fliter": "mlp", "value": 1}], "did you mean 'filter'"),
        ([{"filter": 3, "value": 1}], "filter '3'"),
        ([{"layers": [3, 1], "value": 1}], "layers"),
        ([{"value": [{"value": 1}]}], "number"),
        ({"gradient": 3}, "gradient"),
    ],
)
def test_what_is_no_parameter_is_refused(plain: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_parameter(plain)


def test_a_tensor_without_a_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'model.embed_tokens.weight'; end its list"):
        values([{"filter": "layers", "value": 1}])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        llama(place / name, seed, num_hidden_layers=3)
    return place


def merged(folders: Path, out: Path, capsys, recipe: dict) -> dict[str, np.ndarray]:
    file = out.with_suffix(".yaml")
    models = [{**m, "path": str(folders / m["path"])} for m in recipe["models"]]
    file.write_text(yaml.safe_dump({**recipe, "base": str(folders / "base"), "models": models}))
    status, said = command(capsys, "merge", "--recipe", file, "-o", out)
    assert status == 0, said
    return tensors(out)


def test_every_model_has_its_own_drop_rate(folders: Path, tmp_path: Path, capsys) -> None:
    """As the merge of their updates of those rates, bit by bit."""
    base, a, b = folders / "base", folders / "a", folders / "b"
    ties = ["--method", "ties", "--option", "trim=0"]
    words = ["-o", tmp_path / "flag", "--drop-rate", "0.64,0.59", "--seed", 3, *ties]
    assert command(capsys, "merge", base, a, b, *words)[0] == 0
    for model, rate in ((a, "0.64"), (b, "0.59")):
        words = ["-o", tmp_path / f"{model.name}.dare", "--drop-rate", rate, "--values", "f32"]
        assert command(capsys, "diff", base, model, *words, "--seed", 3)[0] == 0
    updates = [tmp_path / "a.dare", tmp_path / "b.dare"]
    status, said = command(capsys, "merge", base, *updates, "-o", tmp_path / "updates", *ties)
    assert status == 0, said
    recipe = {
        "models": [{"path": "a", "drop-rate": 0.64}, {"path": "b", "drop-rate": 0.59}],
        "method": "ties", "options": {"trim": 0}, "seed": 3,
    }  # fmt: skip
    found = merged(folders, tmp_path / "recipe", capsys, recipe)
    for other in ("flag", "updates"):
        assert worst(tensors(tmp_path / other), found) == 0
    assert "drop rate 0.64, 0.59" in (tmp_path / "recipe" / "README.md").read_text()
    status, said = command(
        capsys, "merge", base, a, b, "-o", tmp_path / "no", "--drop-rate", ".1,.2,.3"
    )
    assert status == 1 and "drop-rate has 3 values for 2 models" in said


def test_weights_and_scaling_by_layer(folders: Path, tmp_path: Path, capsys) -> None:
    recipe = {
        "models": [
            {"path": "a", "weight": [0, 0.25, 0.5, 1]},
            {"path": "b", "weight": [{"filter": "mlp", "value": [1, 0]}, {"value": 0.2}]},
        ],
        "method": "task-arithmetic",
        "scaling": [{"filter": "norm", "value": 0}, {"value": 2}],
    }
    found = merged(folders, tmp_path / "o", capsys, recipe)
    base, a, b = (tensors(folders / name) for name in ("base", "a", "b"))
    first = {0: 0, 1: 0.375, 2: 1}
    for name, value in found.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        inside = "mlp" in name
        weights = first[layer], (1 - layer / 2 if inside else 0.2)
        right = base[name] + 2 * ("norm" not in name) * (
            weights[0] * (a[name] - base[name]) + weights[1] * (b[name] - base[name])
        )
        np.testing.assert_allclose(value, right, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("method", "option", "common"),
    [
        ("breadcrumbs", "density", {}),
        ("breadcrumbs", "gamma", {"density": 0.5}),
        ("della", "density", {"epsilon": 0.01}),
        ("ties", "density", {"trim-scope": "tensor"}),
        ("ties", "trim", {"trim-scope": "tensor"}),
        ("sce", "select-topk", {}),
        ("slerp", "t", {}),
    ],
)
def test_options_by_tensor_are_those_of_each_tensor_alone(
    folders: Path, tmp_path: Path, capsys, method: str, option: str, common: dict
) -> None:
    """A tensor merged with a value by filter is the tensor of a merge with that value alone."""
    parts = {"mlp": 0.3, "self_attn": 0.6}
    choices = [{"filter": part, "value": value} for part, value in parts.items()]
    choices.append({"value": 0.45})
    models = [{"path": "a"}, {"path": "b"}][: 1 if method == "slerp" else 2]
    recipe = {"models": models, "method": method}
    alone = {
        value: merged(
            folders, tmp_path / str(value), capsys,
            {**recipe, "options": {**common, option: value}},
        )
        for value in (0.3, 0.45, 0.6)
    }  # fmt: skip
    found = merged(
        folders, tmp_path / "o", capsys, {**recipe, "options": {**common, option: choices}}
    )
    for name, value in found.items():
        expected = next((v for part, v in parts.items() if part in name), 0.45)
        np.testing.assert_array_equal(value, alone[expected][name], err_msg=name)
    assert worst(found, alone[0.3]) > 0


@pytest.mark.parametrize("sparsifier", ["dare", "drop-only", "magnitude", "mergekit-dare"])
@pytest.mark.parametrize("mask", ["stratified", "bernoulli"])
def test_drop_rates_by_layer(
    folders: Path, tmp_path: Path, capsys, sparsifier: str, mask: str
) -> None:
    rates = [{"filter": "lm_head", "value": 1}, {"value": [0, 0.9]}]
    recipe = {
        "models": [{"path": "a", "drop-rate": rates}], "method": "average",
        "sparsifier": sparsifier, "mask": mask,
    }  # fmt: skip
    found = merged(folders, tmp_path / "o", capsys, recipe)
    base, a = tensors(folders / "base"), tensors(folders / "a")
    for layer, rate in enumerate((0, 0.45, 0.9)):
        names = [n for n in base if f".layers.{layer}." in n and "norm" not in n]
        kept = [np.abs(found[n] - base[n]) > 0 for n in names]
        share = sum(k.sum() for k in kept) / sum(k.size for k in kept)
        assert abs(share - (1 - rate)) < 0.02
        whole = sum(np.abs(a[n] - base[n]).sum() for n in names)
        left = sum(np.abs(found[n] - base[n]).sum() for n in names)
        if sparsifier in ("dare", "mergekit-dare"):
            assert abs(left / whole - 1) < (0.1 if sparsifier == "dare" else 1e-3)
    np.testing.assert_array_equal(found["lm_head.weight"], base["lm_head.weight"])
    np.testing.assert_allclose(
        found["model.embed_tokens.weight"], a["model.embed_tokens.weight"], atol=1e-7
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": {"trim": {"gradient": [0, 1]}}, "method": "ties"}, "trim-scope=tensor"),
        ({"options": {"tol": [0, 1]}, "method": "karcher"}, "tol = [0, 1]"),
        ({"options": {"tol": {"gradient": [0, 1]}}, "method": "karcher"}, "one number for all"),
        ({"options": {"t": [0, 1, "x"]}, "method": "slerp"}, "no parameter"),
        ({"options": {"density": [0.1, 0.2, 0.3]}, "method": "della"}, "density has 3 values"),
        ({"options": {"density": {"gradient": [0, 2]}}, "method": "della"}, "0 to 1"),
        ({"scaling": [{"filter": "x", "value": 1}]}, "scaling has no value for tensor"),
        ({"drop-rate": {"gradient": [0, 1.5]}}, "outside"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(
    folders: Path, tmp_path: Path, capsys, change: dict, said: str
) -> None:
    recipe = {"base": str(folders / "base"), "method": "average", **change}
    recipe["models"] = [str(folders / "a")]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    status, text = command(capsys, "merge", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "o")
    assert status == 1 and said in text and text.count("\n") == 1, text
