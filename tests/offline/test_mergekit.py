"""mergekit's files, unchanged: read, said as our recipe, merged, or refused with the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from dare_agg.errors import ConfigError
from dare_agg.offline.recipe_file import read_recipe
from tests.tiny import command, llama, rewrite, tensors, worst

MODELS = """\
models:
  - model: base
  - model: a
    parameters: {weight: 0.4}
  - model: b
    parameters: {weight: [0, 0.5]}
base_model: base
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        llama(place / name, seed)
    return place


@pytest.fixture
def said(folder: Path, tmp_path: Path) -> Callable[[str], dict[str, object]]:
    """Translates a file that lies beside the models."""

    def translate(text: str) -> dict[str, object]:
        file = folder / f"{tmp_path.name}.yml"
        file.write_text(text)
        return read_recipe(file).values

    return translate


def test_a_published_file_merges_and_its_recipe_gives_the_same_bits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "r.yml"
    file.write_text(
        "models:\n  - model: base\n  - model: a\n    parameters: {density: 0.53, weight: 0.4}\n"
        "merge_method: dare_ties\nbase_model: base\nparameters: {int8_mask: true}\n"
        "dtype: bfloat16\n"
    )
    for words in (("--recipe", file), (file,)):
        status, text = command(capsys, "merge", *words, "-o", tmp_path / "out", "--force")
        assert status == 0, text
    status, recipe = command(capsys, "merge", "--explain", file)
    assert status == 0
    assert yaml.safe_load(recipe) == {
        "base": str(folder / "base"),
        "models": [{"path": str(folder / "a"), "weight": 0.4, "drop-rate": "0.47"}],
        "method": "ties",
        "options": {"trim": 0, "normalize": "none", "sign-tie": "positive"},
        "sparsifier": "mergekit-dare",
        "mask": "bernoulli",
        "order": "given",
        "dtype": "bfloat16",
    }
    (tmp_path / "ours.yaml").write_text(recipe)
    assert command(capsys, "merge", tmp_path / "ours.yaml", "-o", tmp_path / "again")[0] == 0
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert first == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_gradients_filters_and_the_order_of_scopes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "linear.yml"
    file.write_text(
        "models:\n  - model: a\n    parameters:\n      weight:\n"
        "        - filter: self_attn\n          value: [0.25, 0.75]\n"
        "  - model: b\nmerge_method: linear\nparameters: {weight: 0.5, normalize: false}\n"
    )
    status, text = command(capsys, "merge", file, "-o", tmp_path / "out")
    assert status == 0, text
    a, b = tensors(folder / "a"), tensors(folder / "b")

    def share(name: str) -> float:
        if "self_attn" not in name:
            return 0.5
        return 0.25 if ".0." in name else 0.75

    right = {name: share(name) * a[name] + 0.5 * b[name] for name in a}
    assert worst(tensors(tmp_path / "out"), right) < 3e-7
    # The first model takes the base's place: nothing is to be said of that.
    assert "warning" not in text


def test_slerp_of_slices_over_whole_models_starts_at_the_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "slerp.yml"
    file.write_text(
        "slices:\n  - sources:\n      - model: b\n        layer_range: [0, 2]\n"
        "      - model: a\n        layer_range: [0, 2]\nmerge_method: slerp\nbase_model: a\n"
        "parameters:\n  t:\n    - filter: mlp\n      value: [0, 1]\n    - value: 0.25\n"
    )
    status, text = command(capsys, "merge", file, "-o", tmp_path / "out")
    assert status == 0, text
    a, b, out = (tensors(p) for p in (folder / "a", folder / "b", tmp_path / "out"))
    for name, found in out.items():
        t = 0.25 if "mlp" not in name else 0.0 if ".0." in name else 1.0
        x, y = a[name].astype(np.float64), b[name].astype(np.float64)
        angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
        shares = (1 - t, t)
        if np.cos(angle) <= 0.9995:
            shares = (np.sin((1 - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle))
        assert np.abs(found - (shares[0] * x + shares[1] * y)).max() < 3e-7, name


def test_a_base_that_is_not_listed_is_one_more_where_the_method_knows_none(
    said: Callable[[str], dict[str, object]], folder: Path
) -> None:
    values = said("models:\n  - model: a\nbase_model: base\nmerge_method: karcher\n")
    assert [Path(m["path"]).name for m in values["models"]] == ["a", "base"]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="line 3: weight is missing"):
        said("models:\n  - {model: a, parameters: {weight: 1}}\nbase_model: base\n"
             "merge_method: linear\n")  # fmt: skip


def test_models_of_several_dtypes_give_float32(folder: Path) -> None:
    if not (folder / "half").exists():
        llama(folder / "half", 4)
        rewrite(folder / "half", lambda t: {name: value.half() for name, value in t.items()})
    file = folder / "mixed.yml"
    text = "models:\n  - {{model: {}}}\n  - {{model: half}}\nmerge_method: karcher\n"
    file.write_text(text.format("a"))
    assert read_recipe(file).values["dtype"] == "float32"
    file.write_text("models:\n  - {model: half}\nmerge_method: karcher\n")
    assert "dtype" not in read_recipe(file).values
    file.write_text(text.format("a") + "out_dtype: float16\ndtype: float32\n")
    assert read_recipe(file).values["dtype"] == "float16"


def test_models_are_named_as_on_old_cards_from_the_current_folder_and_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.yml"
    file.write_text(
        "base_model:\n  model:\n    path: base\ndtype: torch.float16\nmerge_method: ties\nmodels:\n"
        "- model: {model: {path: ./a}}\n  parameters: {weight: 1}\n"
        "- model: org/name@v1\n  parameters: {weight: 1e-1}\n"
    )
    monkeypatch.chdir(folder)
    values = read_recipe(file).values
    assert values["base"] == str(folder / "base") and values["dtype"] == "float16"
    assert [m["path"] for m in values["models"]] == [str(folder / "a"), "org/name@v1"]
    assert values["models"][1]["weight"] == 0.1
    llama(tmp_path / "base", 3)
    with pytest.raises(ConfigError, match=r"r\.yml, line 1: base is in the file's folder"):
        read_recipe(file)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (MODELS + "merge_method: tise\n", "line 8: merge_method 'tise' is not supported; did"),
        (MODELS + "merge_methods: ties\n", "line 8: 'merge_methods' is unknown in the file; did"),
        (MODELS, "line 1: merge_method is missing"),
        (MODELS + "merge_method: ties\nparameters: {densitty: 1}\n", "line 9: 'densitty' is unkn"),
        (MODELS + "merge_method: ties\nmerge_method: sce\n", "line 9: 'merge_method' stands on l"),
        (MODELS + "merge_method: ties\ndtype: int4\n", "line 9: dtype 'int4'"),
        (MODELS + "merge_method: ties\nparameters: {normalize: maybe}\n", "line 9: normalize is t"),
        (MODELS + "merge_method: slerp\nparameters: {t: 1}\n", "line 1: slerp takes 1 model besid"),
        (MODELS + "merge_method: passthrough\n", "line 1: passthrough takes 1 model, 3 are given"),
        (MODELS + "merge_method: ties\nmodules: {}\n", "one of models, slices and modules"),
        (MODELS.replace("model: b\n", "model: a\n") + "merge_method: ties\n", "line 5: a is named"),
        (MODELS.replace("model: b\n", "model: zz\n") + "merge_method: ties\n", "line 5: zz does n"),
        (MODELS.replace("{weight: 0.4}", "{weight: x}") + "merge_method: ties\n", "line 4: weight"),
        ("models:\n  - model: a\n    weight: 1\nmerge_method: linear\n", "line 3: weight stands b"),
        ("models:\n  - model: a\nmerge_method: ties\n", "line 3: ties needs a base_model"),
        ("base_model: a\nexperts:\n  - x\n", "line 2: 'experts' makes this file mergekit-moe's"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(
    said: Callable[[str], dict[str, object]], text: str, right: str
) -> None:
    with pytest.raises(ConfigError) as error:
        said(text)
    assert right in str(error.value)


def test_what_mergekit_passes_over_is_passed_over_with_a_note(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "notes.yml"
    file.write_text(
        MODELS.replace("- model: base\n", "- model: base\n    parameters: {weight: 1}\n").replace(
            "0.4}", "0.4, lambda: 2, gamma: 1}"
        )
        + "merge_method: task_arithmetic\nname: mine\n"
    )
    status, text = command(capsys, "merge", "--explain", file)
    assert status == 0
    for note in (
        "line 3: weight is of the base, which has none",
        "line 5: lambda of a model is not read",
        "line 5: gamma plays no part in task_arithmetic",
        "line 10: 'name' is no word of mergekit's",
    ):
        assert f"note: {note}" in text
    # What is not read does not get into the recipe.
    assert "scaling" not in text
