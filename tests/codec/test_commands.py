"""`dare-agg diff`, `inspect` and `apply` on real checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.cli.main import main
from dare_agg.codec.mask import Mask
from dare_agg.codec.update_file import read_update_file

SHAPES = {"layer.0.weight": (120, 90), "layer.0.bias": (90,), "head.weight": (4, 90)}


def models(folder, dtype="F32", sharded=False):
    rng = np.random.default_rng(3)
    base = {n: rng.standard_normal(s).astype(np.float32) * 0.05 for n, s in SHAPES.items()}
    base = {n: a.astype(np.float32) for n, a in base.items()}
    tuned = {n: a + rng.standard_normal(a.shape).astype(np.float32) * 2e-3 for n, a in base.items()}
    steps = {"steps": np.arange(3, dtype=np.int64)}
    for name, arrays in (("base", base), ("tuned", tuned)):
        path = folder / (name if sharded else f"{name}.safetensors")
        write_checkpoint(path, {**arrays, **steps}, dtypes=dict.fromkeys(SHAPES, dtype))
        if sharded:
            (path / "config.json").write_text('{"model_type": "toy"}')
            split(path)
    suffix = "" if sharded else ".safetensors"
    return folder / f"base{suffix}", folder / f"tuned{suffix}"


def split(folder):
    """Cut a model folder's one file into two shards with an index."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    names = sorted(arrays)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: arrays[name] for name in part}, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(*words):
    main([str(word) for word in words])


def call(*words):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    return ended.value.code or 0


def facts_of(capsys, *words):
    capsys.readouterr()
    assert call(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("mask", ["stratified", "bernoulli"])
def test_apply_gives_base_plus_rescaled_survivors(tmp_path, capsys, dtype, mask):
    base, tuned = models(tmp_path, dtype)
    update, out = tmp_path / "x.dare", tmp_path / "out.safetensors"
    facts_of(capsys, "diff", base, tuned, "-o", update, "--drop-rate", "0.8", "--values", "f32",
             "--mask", mask, "--seed", "7")  # fmt: skip
    assert call("apply", base, update, "-o", out) == 0
    _, header = read_update_file(update)
    layout = open_checkpoint(base).layout()
    before, after = (open_checkpoint(p).vector(layout) for p in (base, tuned))
    drawn = Mask(mask, layout.size, header.drop_rate, header.mask_key, header.rank)
    expected = before + drawn.scatter(drawn.gather(after - before))
    found = open_checkpoint(out)
    assert found.dtypes == open_checkpoint(base).dtypes
    assert np.array_equal(found.raw("steps"), open_checkpoint(base).raw("steps"))
    tolerance = {"F32": 0, "F16": 2e-3, "BF16": 2e-2}[dtype]
    np.testing.assert_allclose(found.vector(layout), expected, rtol=tolerance, atol=tolerance / 50)


def test_sharded_folders_keep_their_shards_and_files(tmp_path, capsys):
    base, tuned = models(tmp_path, sharded=True)
    facts = facts_of(capsys, "diff", base, tuned, "-o", tmp_path / "x.dare", "--drop-rate", "0",
                     "--values", "f32")  # fmt: skip
    assert facts["survivors"] == facts["parameters"]
    assert call("apply", base, tmp_path / "x.dare", "-o", tmp_path / "out") == 0
    found, wanted = open_checkpoint(tmp_path / "out"), open_checkpoint(tuned)
    np.testing.assert_allclose(found.vector(found.layout()), wanted.vector(wanted.layout()))
    assert len(found.files) == 2 and (tmp_path / "out" / "config.json").is_file()


def test_keep_rates_by_tensor_make_less_noise_in_as_many_bytes(tmp_path, capsys):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(3)
    shapes = {"a": (300, 100), "b": (70,), "head": (10, 100), "frozen": (500,)}
    before = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    rms = {"a": 1e-4, "b": 1e-3, "head": 1e-2, "frozen": 0}
    after = {
        name: array + (rng.standard_normal(array.shape) * rms[name]).astype(np.float32)
        for name, array in before.items()
    }
    save_file(before, tmp_path / "base.safetensors")
    save_file(after, tmp_path / "tuned.safetensors")
    base, tuned = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned"))
    layout = open_checkpoint(base).layout()
    delta = open_checkpoint(tuned).vector(layout) - open_checkpoint(base).vector(layout)
    sizes, errors = [], []
    for keep in ("uniform", "own"):
        path = tmp_path / f"{keep}.dare"
        facts = facts_of(
            capsys, "diff", base, tuned, "-o", path, "--drop-rate", "0.8", "--values", "i8",
            "--keep-rates", keep,
        )  # fmt: skip
        assert facts.get("keep_rates", "uniform") == keep
        assert facts["delta_norm"] == pytest.approx(float(np.linalg.norm(delta)), rel=0.15)
        assert call("inspect", path) == 0
        assert call("apply", base, path, "-o", tmp_path / f"{keep}.safetensors") == 0
        applied = open_checkpoint(tmp_path / f"{keep}.safetensors").vector(layout)
        error = applied - open_checkpoint(base).vector(layout) - delta
        errors.append(float(np.sum(np.square(error, dtype=np.float64))))
        sizes.append(facts["bytes"])
    assert sizes[1] <= sizes[0]
    assert errors[1] < 0.2 * errors[0]
    capsys.readouterr()
    words = ("diff", base, tuned, "-o", tmp_path / "x.dare", "--keep-rates", "own")
    assert call(*words, "--rank", "1") == 1 and "leave out one" in capsys.readouterr().err
    assert call(*words, "--mask", "bernoulli") == 1
    assert call(*words[:-1], "owm") == 1 and "own" in capsys.readouterr().err


def test_inspect_tells_what_is_inside_and_estimates_the_delta(tmp_path, capsys):
    base, tuned = models(tmp_path)
    layout = open_checkpoint(base).layout()
    delta = open_checkpoint(tuned).vector(layout) - open_checkpoint(base).vector(layout)
    for values in ("f16", "b1"):
        path = tmp_path / f"{values}.dare"
        facts_of(capsys, "diff", base, tuned, "-o", path, "--drop-rate", "0.5", "--values", values)
        facts = facts_of(capsys, "inspect", path)
        assert facts["parameters"] == layout.size
        assert facts["survivors"] == -(-layout.size // 2)
        assert facts["bytes"] == path.stat().st_size
        assert facts["bits_per_parameter"] == pytest.approx(8 * facts["bytes"] / layout.size)
        assert (facts["drop_rate"], facts["values"], facts["mask"]) == (0.5, values, "stratified")
        assert facts["base_fingerprint"] == open_checkpoint(base).fingerprint()
        for q in ("0.5", "0.9", "0.99"):
            expected = np.quantile(np.abs(delta), float(q))
            assert facts["delta_quantiles"][q] == pytest.approx(expected, rel=0.1)
        assert facts["delta_norm"] == pytest.approx(np.linalg.norm(delta), rel=0.1)


def test_same_seed_same_bytes_and_models_have_masks_of_their_own(tmp_path, capsys):
    base, tuned = models(tmp_path)
    files = {}
    for name, words in {
        "a": (base, tuned), "again": (base, tuned), "seed": (base, tuned, "--seed", "1"),
        "other": (tuned, base), "rank0": (base, tuned, "--rank", "0"),
        "rank1": (base, tuned, "--rank", "1"),
    }.items():  # fmt: skip
        files[name] = tmp_path / f"{name}.dare"
        facts_of(capsys, "diff", *words, "-o", files[name])
    assert files["a"].read_bytes() == files["again"].read_bytes()
    keys = {name: read_update_file(path)[1].mask_key for name, path in files.items()}
    assert keys["a"] != keys["seed"] and keys["a"] != keys["other"]
    assert keys["rank0"] == keys["rank1"]
    size = open_checkpoint(base).layout().size
    kept = [read_update_file(files[f"rank{r}"])[0].present(0, size) for r in (0, 1)]
    assert not np.any(kept[0] & kept[1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("diff", "BASE", "nowhere.safetensors", "-o", "y.dare"), "does not exist"),
        (("diff", "BASE", "TUNED", "-o", "y.bin"), "does not end in .dare"),
        (("diff", "BASE", "TUNED", "-o", "y.dare", "--drop-rate", "1"), "outside [0, 1)"),
        (("diff", "BASE", "TUNED", "-o", "y.dare", "--values", "b3"), "value format"),
        (("diff", "BASE", "TUNED", "-o", "y.dare", "--mask", "any"), "mask 'any'"),
        (("diff", "BASE", "TUNED", "-o", "y.dare", "--seed", "-1"), "seed"),
        (("diff", "BASE", "TUNED", "-o", "y.dare", "--gram-bits", "4"), "add --gram 8"),
        (("diff", "BASE", "NAN", "-o", "y.dare"), "layer.0.weight"),
        (("apply", "TUNED", "x.dare", "-o", "y.safetensors"), "give the base it was made from"),
        (("apply", "BASE", "BASE", "-o", "y.safetensors"), "no update file"),
        (("apply", "BASE", "cut.dare", "-o", "y.safetensors"), "bytes"),
        (("apply", "BASE", "nowhere.dare", "-o", "y.safetensors"), "nowhere.dare"),
        (("inspect", "cut.dare"), "bytes"),
        (("inspect", "BASE"), "no update file"),
        (("inspect", "FOLDER"), "is a folder without adapter_config.json; give an update file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, words, says):
    base, tuned = models(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert call("diff", base, tuned, "-o", "x.dare") == 0
    (tmp_path / "cut.dare").write_bytes((tmp_path / "x.dare").read_bytes()[:-9])
    broken = {n: open_checkpoint(tuned).array(n) for n in SHAPES}
    broken["layer.0.weight"][3, 4] = np.nan
    write_checkpoint(tmp_path / "nan.safetensors", broken)
    before = sorted(p.name for p in tmp_path.iterdir())
    capsys.readouterr()
    names = {"BASE": base, "TUNED": tuned, "NAN": tmp_path / "nan.safetensors", "FOLDER": tmp_path}
    assert call(*(names.get(word, word) for word in words)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert says in said
    assert sorted(p.name for p in tmp_path.iterdir()) == before
