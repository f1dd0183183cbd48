"""Offline merges whatever the input is: updates, Fisher and Gram files, the oracles' models."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dare_agg.cli.main import main

DATA = Path(__file__).resolve().parent.parent / "data"
SHAPES = {"emb.weight": (60, 16), "fc.weight": (24, 16), "fc.bias": (24,), "scale": ()}


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 0


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(5)
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    paths = [tmp_path / "base.safetensors", *(tmp_path / f"m{i}.safetensors" for i in range(3))]
    save_file(base, paths[0])
    for path in paths[1:]:
        tuned = {n: (a + rng.standard_normal(a.shape) * 0.001) for n, a in base.items()}
        save_file({n: np.asarray(a, np.float32) for n, a in tuned.items()}, path)
    return paths


@pytest.mark.parametrize("mask", ["stratified", "bernoulli"])
@pytest.mark.parametrize("rate", ["0", "0.5", "0.9"])
@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "average", "breadcrumbs"])
def test_updates_and_checkpoints_give_the_same_bits(
    models: list[Path], tmp_path: Path, method: str, rate: str, mask: str
) -> None:
    base, *tuned = models
    updates = []
    for path in tuned:
        updates.append(path.with_suffix(".dare"))
        run("diff", base, path, "-o", updates[-1], "--drop-rate", rate, "--values", "f32",
            "--seed", 4, "--mask", mask)  # fmt: skip
    words = ["--method", method, "--weights", "0.3,0.5,0.2"]
    run("merge", base, *updates, "-o", tmp_path / "1.safetensors", *words)
    words += ["--drop-rate", rate, "--seed", 4, "--mask", mask]
    run("merge", base, *tuned, "-o", tmp_path / "2.safetensors", *words)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    mixed = [updates[2], *tuned[:2]]
    if rate == "0":
        run("merge", base, *mixed, "-o", tmp_path / "3.safetensors",
            "--method", method, "--weights", "0.2,0.3,0.5")  # fmt: skip
        assert (tmp_path / "3.safetensors").read_bytes() == (
            tmp_path / "1.safetensors"
        ).read_bytes()


def load(folder: str, name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / folder / f"{name}.npz") as file:
        return {key: file[key] for key in file}


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k[len(prefix) + 1 :]: v for k, v in arrays.items() if k.startswith(prefix + "/")}


def oracle_models(tmp_path: Path, count: int) -> list[Path]:
    arrays = load("mergelm", "models_A")
    paths = []
    for which in ("base", *(f"m{i}" for i in range(count))):
        named = under(arrays, which)
        named.pop("param_order", None)
        paths.append(tmp_path / f"{which}.safetensors")
        save_file({n: np.ascontiguousarray(a, np.float32) for n, a in named.items()}, paths[-1])
    return paths


def others_excluded(paths: list[Path], expected: dict[str, np.ndarray]) -> list[str]:
    names = set(load_file(paths[0])) - set(expected)
    return [w for name in sorted(names) for w in ("--exclude", f"^{name}$")]


def close(out: Path, expected: dict[str, np.ndarray], atol: float) -> None:
    found = load_file(out)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


def test_the_papers_code_through_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    seen = 0
    for file, words in (
        ("average", ["--method", "average"]),
        ("task_arithmetic", ["--method", "task-arithmetic"]),
        ("ties_mergelm", ["--method", "ties"]),
    ):
        arrays = load("mergelm", file)
        cases = sorted({key.rpartition("/")[0] for key in arrays if key.startswith("A/n2")})
        for case in cases[:3]:
            expected = under(arrays, case)
            paths = oracle_models(tmp_path, 2)
            extra: list[object] = []
            for part in case.split("/")[2:]:
                if part.startswith(("l", "s")):
                    extra += ["--scaling", float(part[1:])]
                elif part.startswith(("r", "t", "m")) and part[1:].replace(".", "").isdigit():
                    extra += ["--option", f"trim={part[1:]}"]
            run("merge", *paths, "-o", out, "--force", *words, *extra,
                *others_excluded(paths, expected))  # fmt: skip
            close(out, expected, 1e-6)
            seen += 1
    assert seen >= 6


@pytest.mark.parametrize("norm", [0, 1])
def test_given_fisher_values_through_the_command_line(tmp_path: Path, norm: int) -> None:
    arrays = load("mergelm", "fisher_given")
    expected = under(arrays, f"n2/A/norm{norm}/eps1e-06/coef_none")
    assert expected
    paths = oracle_models(tmp_path, 2)
    words: list[object] = []
    for i in range(2):
        save_file(under(arrays, f"n2/fisher/m{i}"), tmp_path / f"f{i}.safetensors")
        words += ["--statistics", tmp_path / f"f{i}.safetensors"]
    out = tmp_path / "out.safetensors"
    words += ["--option", f"normalize={'true' if norm else 'false'}"]
    run("merge", *paths, "-o", out, "--method", "fisher", *words,
        *others_excluded(paths, expected))  # fmt: skip
    close(out, expected, 1e-6)
    # Statistics travel with their models.
    swapped = [paths[0], paths[2], paths[1]]
    back = [words[0], words[3], words[2], words[1], *words[4:]]
    run("merge", *swapped, "-o", tmp_path / "2.safetensors", "--method", "fisher", *back,
        *others_excluded(paths, expected))  # fmt: skip
    assert (tmp_path / "2.safetensors").read_bytes() == out.read_bytes()


def test_given_gram_matrices_through_the_command_line(tmp_path: Path) -> None:
    arrays = load("mergelm", "regmean_given")
    expected = under(arrays, "n2/A/alpha0.9")
    assert expected
    paths = oracle_models(tmp_path, 2)
    words: list[object] = []
    for i in range(2):
        grams = {f"{k}.weight": v for k, v in under(arrays, f"n2/gram/m{i}").items()}
        save_file(grams, tmp_path / f"g{i}.safetensors")
        words += ["--statistics", tmp_path / f"g{i}.safetensors"]
    out = tmp_path / "out.safetensors"
    run("merge", *paths, "-o", out, "--method", "regmean", *words, "--option", "ridge=0",
        *others_excluded(paths, expected))  # fmt: skip
    close(out, expected, 1e-5)


def test_mergekit_through_the_command_line(tmp_path: Path) -> None:
    inputs = load("mergekit", "inputs")
    names = [key.removeprefix("base_") for key in inputs if key.startswith("base_")]
    paths = []
    for which in ("base", "ft1", "ft2", "ft3", "ft4"):
        paths.append(tmp_path / f"{which}.safetensors")
        save_file({n: inputs[f"{which}_{n}"].astype(np.float32) for n in names}, paths[-1])
    index = json.loads((DATA / "mergekit" / "index.json").read_text())
    for method in ("linear", "task_arithmetic", "ties"):
        case = sorted(c for c in index if index[c]["method"] == method)[0]
        about = index[case]
        words = ["--method", method, "--weights", ",".join(map(str, about["per_model"]["weight"]))]
        parameters = dict(about["parameters"])
        words += ["--scaling", parameters.get("lambda", 1.0)]
        normalize = parameters.get("normalize")
        if method == "ties":
            density = about["per_model"]["density"]
            listed = isinstance(density, list)
            words += ["--option", f"density={','.join(map(str, density)) if listed else density}"]
            words += ["--option", "trim-scope=tensor", "--option", "sign-tie=positive"]
            normalize = "agreeing" if normalize else "none"
        words += ["--option", f"normalize={str(normalize or False).lower()}"]
        out = tmp_path / f"{method}.safetensors"
        run("merge", *paths, "-o", out, *words)
        file, tag = case.split("/")
        expected = load("mergekit", file)
        close(out, {n: expected[f"{tag}_{n}"] for n in names}, 2e-6)
