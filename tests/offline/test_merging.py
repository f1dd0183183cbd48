"""Offline merges through the command line, on small models with every awkward part."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dare_agg.checkpoint import CheckpointWriter, TensorPlan, open_checkpoint, write_checkpoint
from dare_agg.cli.main import main
from dare_agg.errors import CheckpointError, ConfigError
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.methods import METHODS
from dare_agg.offline.merging import merge_offline
from dare_agg.offline.recipe import make_recipe
from dare_agg.offline.recipe_file import read_recipe

# Runs a merge that must fail with one clear line, which it returns.
Refused = Callable[..., str]
RNG = np.random.default_rng(11)
SHAPES = {
    "emb.weight": (50, 16),
    "enc.fc.weight": (24, 16),
    "enc.fc.bias": (24,),
    "conv.weight": (3, 2, 3),
    "temperature": (),
}


def random_model(base: dict | None = None, scale: float = 0.0015) -> dict[str, np.ndarray]:
    arrays = {}
    for name, shape in SHAPES.items():
        start = np.zeros(shape) if base is None else base[name]
        noise = RNG.standard_normal(shape) * (0.3 if base is None else scale)
        arrays[name] = np.asarray(start + noise, np.float32)
    arrays["position_ids"] = np.arange(7)
    return arrays


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    base = random_model()
    folder = tmp_path / "base"
    write_checkpoint(folder, base)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("the base's card")
    paths = [folder]
    for i in range(3):
        save_file(random_model(base), tmp_path / f"m{i}.safetensors")
        paths.append(tmp_path / f"m{i}.safetensors")
    return paths


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["merge", *(str(word) for word in words)])
    assert stop.value.code == 0


def test_a_folder_with_everything(models: list[Path], tmp_path: Path, capsys) -> None:
    run(*models, "-o", tmp_path / "out", "--scaling", 0.5, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == sum(int(np.prod(s)) for s in SHAPES.values())
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "task-arithmetic" in card and "scaling: 0.5" in card and str(models[0]) in card
    base = load_file(models[0] / "model.safetensors")
    tuned = [load_file(p) for p in models[1:]]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        expected = base[name] + 0.5 * sum(t[name] - base[name] for t in tuned)
        np.testing.assert_allclose(merged[name], expected, atol=1e-6)
    np.testing.assert_array_equal(merged["position_ids"], base["position_ids"])


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fisher", "regmean", "slerp", "nuslerp"}))
def test_order_tiles_and_threads_change_nothing(
    models: list[Path], tmp_path: Path, method: str
) -> None:
    extra = ["--option", "density=0.3"] if method in ("breadcrumbs", "della") else []
    extra += ["--option", "select-topk=0.4"] if method == "sce" else []
    plain = ["--method", method, *extra, "--weights"]
    base, a, b, c = models
    run(base, a, b, c, "-o", tmp_path / "1.safetensors", *plain, "0.2,0.3,0.7")
    run(
        base, c, a, b, "-o", tmp_path / "2.safetensors", *plain, "0.7,0.2,0.3",
        "--tile", 37, "--threads", 3,
    )  # fmt: skip
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_the_given_order_is_that_of_the_sum(models: list[Path], tmp_path: Path) -> None:
    base, *tuned = (load_file(m if m.is_file() else m / "model.safetensors") for m in models)
    for number, order in enumerate(([0, 1, 2], [2, 1, 0])):
        recipe = {
            "base": models[0], "models": [models[1 + i] for i in order], "order": "given",
            "method": "task-arithmetic",
        }  # fmt: skip
        out = tmp_path / f"{number}.safetensors"
        merge_offline(make_recipe(recipe), out)
        for name in SHAPES:
            first, second, third = (tuned[i][name] - base[name] for i in order)
            expected = ((first + second) + third) + base[name]
            np.testing.assert_array_equal(load_file(out)[name], expected)


def test_the_seed_is_that_of_all_draws(models: list[Path], tmp_path: Path) -> None:
    base, a, *_ = models
    words = ["--method", "della", "--seed"]
    for number, extra in enumerate(([1], [2], [7, "--option", "seed=1"])):
        run(base, a, "-o", tmp_path / f"{number}.safetensors", *words, *extra)
    one, two, own = ((tmp_path / f"{i}.safetensors").read_bytes() for i in range(3))
    assert one != two
    assert one == own


@pytest.mark.parametrize("rate", ["0.5", "0.9"])
@pytest.mark.parametrize("method", ["average", "ties"])
@pytest.mark.parametrize("mask", ["stratified", "bernoulli"])
def test_masks_travel_with_the_models(
    models: list[Path], tmp_path: Path, method: str, rate: str, mask: str
) -> None:
    base, a, b, c = models
    words = ["--method", method, "--drop-rate", rate, "--seed", 5, "--mask", mask]
    words += ["--option", "trim=0"] if method == "ties" else []
    run(base, a, b, c, "-o", tmp_path / "1.safetensors", *words)
    run(base, b, c, a, "-o", tmp_path / "2.safetensors", *words, "--tile", 41, "--threads", 2)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    other = [*words]
    other[other.index(5)] = 6
    run(base, a, b, c, "-o", tmp_path / "3.safetensors", *other)
    assert (tmp_path / "1.safetensors").read_bytes() != (tmp_path / "3.safetensors").read_bytes()


def test_gram_matrices_are_of_the_whole_deltas_unless_asked_otherwise(
    models: list[Path], tmp_path: Path
) -> None:
    from dare_agg.codec.mask import Mask, parse_drop_rate
    from dare_agg.merge.wrapped import MaskedSource
    from dare_agg.offline.opening import OpenedModel
    from dare_agg.offline.sparsify import mask_keys
    from dare_agg.vectors.sources import array_source

    words = ["--method", "wudi", "--drop-rate", "0.5", "--seed", 3]
    for gram in ("whole", "dropped"):
        out = tmp_path / f"{gram}.safetensors"
        run(*models, "-o", out, *words, "--option", f"gram={gram}")
        run(models[0], *reversed(models[1:]), "-o", out, *words, "--option", f"gram={gram}",
            "--force", "--threads", 2, "--tile", 99)  # fmt: skip
    layout = open_checkpoint(models[0]).layout()
    base, *tuned = (
        layout.flatten(load_file(m if m.is_file() else m / "model.safetensors")) for m in models
    )
    wholes = [array_source(t - base) for t in tuned]
    recipe = make_recipe({"base": models[0], "models": models[1:], "method": "wudi"})
    given = [
        OpenedModel(m, w, "checkpoint", None, i)
        for i, (m, w) in enumerate(zip(recipe.models, wholes, strict=True))
    ]
    masks = [
        Mask("stratified", layout.size, parse_drop_rate("0.5"), k) for k in mask_keys(given, 3)
    ]
    dropped = [MaskedSource(w, m) for w, m in zip(wholes, masks, strict=True)]
    expected = {
        "whole": merge_deltas(layout, dropped, "wudi", statistics=wholes)[0],
        "dropped": merge_deltas(layout, dropped, "wudi")[0],
    }
    assert not np.allclose(expected["whole"], expected["dropped"], rtol=1e-3, atol=0)
    for gram, delta in expected.items():
        found = layout.flatten(load_file(tmp_path / f"{gram}.safetensors"))
        np.testing.assert_allclose(found - base, delta, atol=2e-7)


def test_sparse_and_dense_consensus_agree(models: list[Path], tmp_path: Path) -> None:
    from dare_agg.codec.mask import Mask, parse_drop_rate
    from dare_agg.merge.wrapped import MaskedSource
    from dare_agg.vectors.sources import array_source

    arrays = [load_file(models[0] / "model.safetensors"), *(load_file(p) for p in models[1:])]
    layout = open_checkpoint(models[0]).layout()
    base, *tuned = (layout.flatten(a) for a in arrays)
    masks = [
        Mask("stratified", layout.size, parse_drop_rate("0.85"), bytes([i] * 16)) for i in (1, 1, 2)
    ]
    sparse = [MaskedSource(array_source(t - base), m) for t, m in zip(tuned, masks, strict=True)]
    dense = []
    for source in sparse:
        whole = np.empty(layout.size, np.float32)
        source.read(0, layout.size, whole)
        dense.append(array_source(whole))
    # Exact cancellation on the shared mask, so that ties of signs occur.
    dense[1] = array_source(-dense[0].delta)
    sparse[1] = MaskedSource(array_source(-(tuned[0] - base)), masks[0])
    for weights in (None, [0.5, 0.5, 0.5], [0.3, 0.3, -0.4]):
        for normalize in ("agreeing", "expected", "none", "max"):
            for tie in ("majority", "majority-or-negative", "positive"):
                options = {"trim": 0, "normalize": normalize, "sign-tie": tie}
                results = [
                    merge_deltas(layout, s, "ties", weights=weights, options=options)
                    for s in (sparse, dense)
                ]
                np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6, atol=1e-9)
                assert results[0][1] == results[1][1]


def test_heads_stay_the_bases_and_prefixes_are_found(models: list[Path], tmp_path: Path) -> None:
    base = load_file(models[0] / "model.safetensors")
    tuned = {f"bert.{k}": v for k, v in load_file(models[1]).items()}
    tuned["classifier.weight"] = np.ones((3, 4), np.float32)
    save_file(tuned, tmp_path / "task.safetensors")
    out = tmp_path / "o.safetensors"
    run(models[0], tmp_path / "task.safetensors", "-o", out, "--exclude", "classifier|^conv")
    merged = load_file(out)
    assert set(merged) == set(base)
    np.testing.assert_array_equal(merged["conv.weight"], base["conv.weight"])
    np.testing.assert_allclose(merged["enc.fc.bias"], tuned["bert.enc.fc.bias"], atol=1e-7)


def test_bfloat16_shards_and_dtype(models: list[Path], tmp_path: Path) -> None:
    arrays = load_file(models[0] / "model.safetensors")
    plans = {
        name: TensorPlan("BF16", shape, f"model-0000{1 + i % 2}-of-00002.safetensors")
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    with CheckpointWriter(tmp_path / "sharded", plans, {}) as writer:
        for name in SHAPES:
            writer.write(name, 0, arrays[name].reshape(-1))
    out = tmp_path / "out"
    run(tmp_path / "sharded", *models[1:], "-o", out, "--method", "average")
    merged = open_checkpoint(out)
    assert len(merged.files) == 2 and set(merged.dtypes.values()) == {"BF16"}
    mean = sum(load_file(p)["emb.weight"] for p in models[1:]) / 3
    np.testing.assert_allclose(merged.array("emb.weight"), mean, rtol=2**-8, atol=1e-6)
    run(tmp_path / "sharded", *models[1:], "-o", tmp_path / "f.safetensors", "--dtype", "float32")
    assert set(open_checkpoint(tmp_path / "f.safetensors").dtypes.values()) == {"F32"}


def test_recipes_of_both_kinds(models: list[Path], tmp_path: Path) -> None:
    yaml_text = """
base: base
models: [{path: m0.safetensors, weight: 0.5}, {path: m1.safetensors, weight: 0.25}]
method: ties
options: {trim: 0.5}
rules: [{match: "^emb", scaling: 0}, {match: bias, weights: [0, 1]}]
out: yaml.safetensors
"""
    toml_text = """
base = "base"
method = "ties"
out = "toml.safetensors"
models = [{path = "m0.safetensors", weight = 0.5}, {path = "m1.safetensors", weight = 0.25}]
options = {trim = 0.5}
rules = [{match = "^emb", scaling = 0}, {match = "bias", weights = [0, 1]}]
"""
    (tmp_path / "r.yaml").write_text(yaml_text)
    (tmp_path / "r.toml").write_text(toml_text)
    run("--recipe", tmp_path / "r.yaml")
    run("--recipe", tmp_path / "r.toml")
    merged = (tmp_path / "yaml.safetensors").read_bytes()
    assert merged == (tmp_path / "toml.safetensors").read_bytes()
    base = load_file(models[0] / "model.safetensors")
    np.testing.assert_array_equal(
        load_file(tmp_path / "yaml.safetensors")["emb.weight"], base["emb.weight"]
    )
    values = read_recipe(tmp_path / "r.yaml").values
    del values["out"]
    recipe = make_recipe(values)
    assert make_recipe(recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methodd": "ties"}, "did you mean 'method'"),
        ({"models": [{"path": "x", "weigth": 1}]}, "did you mean 'weight'"),
        ({"method": "tise"}, "did you mean 'ties'"),
        ({"options": {"densty": 0.1}, "method": "ties"}, "did you mean 'density'"),
        ({"options": {"trim": 1.5}, "method": "ties"}, "0 to 1"),
        ({"drop-rate": 1.2}, "outside"),
        ({"sparsifier": "dares"}, "sparsifier"),
        ({"exclude": ["("]}, "regular expression"),
        ({"method": "fisher"}, "statistics"),
        ({"models": []}, "models"),
    ],
)
def test_wrong_recipes_are_refused(change: dict, message: str) -> None:
    values = {"base": "b", "models": ["m"], "method": "average", **change}
    with pytest.raises((ConfigError, Exception), match=message) as caught:
        make_recipe(values)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_of_a_refused_merge(
    models: list[Path], tmp_path: Path, refused: Refused
) -> None:
    before = sorted(os.listdir(tmp_path))
    out = tmp_path / "out"
    bad = load_file(models[1])
    bad["enc.fc.weight"][3, 4] = np.nan
    (tmp_path / "bad").mkdir()
    save_file(bad, tmp_path / "bad" / "nan.safetensors")
    error = refused(models[0], tmp_path / "bad" / "nan.safetensors", "-o", out)
    assert "'enc.fc.weight' at index (3, 4)" in error
    bad = load_file(models[1])
    bad["emb.weight"] = np.zeros((51, 16), np.float32)
    save_file(bad, tmp_path / "bad" / "vocabulary.safetensors")
    error = refused(models[0], tmp_path / "bad" / "vocabulary.safetensors", "-o", out)
    assert "(51, 16)" in error and "vocabulary" in error
    del bad["emb.weight"]
    save_file(bad, tmp_path / "bad" / "missing.safetensors")
    assert "lacks tensor 'emb.weight'" in refused(
        models[0], tmp_path / "bad" / "missing.safetensors", "-o", out
    )
    bad = load_file(models[1]) | {"head.weight": np.ones(3, np.float32)}
    save_file(bad, tmp_path / "bad" / "head.safetensors")
    assert "--exclude" in refused(models[0], tmp_path / "bad" / "head.safetensors", "-o", out)
    assert "did you mean" in refused(*models, "-o", out, "--method", "avrage")
    assert "did you mean" in refused(
        *models, "-o", out, "--method", "ties", "--option", "trimm=0.2"
    )
    assert "weights" in refused(*models, "-o", out, "--weights", "1,2")
    assert "exists" in refused(*models, "-o", models[0])
    assert sorted(set(os.listdir(tmp_path)) - {"bad"}) == before


def test_unsafe_ranges_warn(models: list[Path], tmp_path: Path, capsys) -> None:
    base = load_file(models[0] / "model.safetensors")
    save_file(random_model(base, 0.05), tmp_path / "far.safetensors")
    words = ["-o", tmp_path / "o.safetensors", "--drop-rate", "0.5", "--json", "--force"]
    run(models[0], tmp_path / "far.safetensors", *words)
    assert "DARE is unsafe" in json.loads(capsys.readouterr().out)["warnings"][0]
    run(*models, *words)
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_l1_rescale_and_magnitude(models: list[Path], tmp_path: Path) -> None:
    base = load_file(models[0] / "model.safetensors")
    tuned = load_file(models[1])
    for sparsifier in ("mergekit-dare", "mergekit-dare-l2", "magnitude", "drop-only"):
        out = tmp_path / f"{sparsifier}.safetensors"
        run(models[0], models[1], "-o", out, "--drop-rate", 0.5, "--sparsifier", sparsifier)
        delta = load_file(out)["emb.weight"] - base["emb.weight"]
        whole = tuned["emb.weight"] - base["emb.weight"]
        share = np.abs(delta).sum() / np.abs(whole).sum()
        kept = np.mean(np.abs(delta) > 1e-8)
        assert abs(kept - 0.5) < 0.02
        if sparsifier == "mergekit-dare":
            assert abs(share - 1) < 1e-4
        elif sparsifier == "mergekit-dare-l2":
            assert abs(np.square(delta).sum() / np.square(whole).sum() - 1) < 1e-4
        elif sparsifier == "magnitude":
            assert np.abs(whole[np.abs(delta) > 1e-7]).min() >= np.median(np.abs(whole)) * 0.99
        else:
            assert abs(share - 0.5) < 0.1


def test_an_output_that_is_an_input_is_replaced_whole(models: list[Path]) -> None:
    before = load_file(models[1])
    run(*models, "-o", models[1], "--method", "average", "--force")
    assert not np.array_equal(load_file(models[1])["emb.weight"], before["emb.weight"])


def test_adapter_is_its_merged_model(tmp_path: Path) -> None:
    rank, alpha = 4, 8
    base = random_model()
    save_file(base, tmp_path / "base.safetensors")
    a = RNG.standard_normal((rank, 16)).astype(np.float32) * 0.1
    b = RNG.standard_normal((24, rank)).astype(np.float32) * 0.1
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "lora_alpha": alpha, "r": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.bert.enc.fc"
    save_file(
        {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    for tile in (19, 65536):
        out = tmp_path / f"{tile}.safetensors"
        run(tmp_path / "base.safetensors", folder, "-o", out, "--tile", tile)
        merged = load_file(out)
        np.testing.assert_allclose(
            merged["enc.fc.weight"], base["enc.fc.weight"] + 2 * b @ a, atol=1e-6
        )
        np.testing.assert_array_equal(merged["emb.weight"], base["emb.weight"])
    assert (tmp_path / "19.safetensors").read_bytes() == out.read_bytes()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    recipe = make_recipe(
        {"base": str(tmp_path / "base.safetensors"), "models": [str(folder)], "method": "average"}
    )
    with pytest.raises(CheckpointError, match="IA3"):
        merge_offline(recipe, tmp_path / "no.safetensors")
