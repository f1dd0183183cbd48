"""Files of models: checkpoints, their folders, adapters, merge recipes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
from safetensors.numpy import save

from dare_agg.checkpoint import Checkpoint, carry_files, fingerprints, open_checkpoint
from dare_agg.checkpoint.fingerprints import recall, remember
from dare_agg.offline.adapters.source import adapter_source
from dare_agg.offline.base import open_base
from dare_agg.offline.range_check import bases_named_by
from dare_agg.offline.recipe import make_recipe
from dare_agg.offline.recipe_file import read_recipe
from dare_agg.vectors.sources import CachedSource
from simulations.bench.file_readers.reader import Reader, safetensors_header, sample_arrays, whole

MOST_READ = 1 << 20


def fingerprints_file_reader(folder: Path) -> Reader:
    """Fingerprints that are remembered."""
    model, name = folder / "model.safetensors", "ab" * 32
    model.write_bytes(save(sample_arrays()))
    os.utime(model, (1, 1))
    with patch.object(fingerprints, "_SETTLED_SECONDS", -1.0):
        remember([model], name, "cd" * 32)
    (path,) = (folder / "cache" / "fingerprints").iterdir()

    def read() -> None:
        found = recall([model], name)
        assert found is None or len(bytes.fromhex(found)) == 32

    return Reader(path, (path.read_bytes(),), read, is_text=True)


def checkpoint_reader(folder: Path, which: str) -> Reader:
    """A checkpoint of two shards."""
    first, second = folder / "model" / "a.safetensors", folder / "model" / "b.safetensors"
    index = folder / "model" / "model.safetensors.index.json"
    arrays = sample_arrays()
    first.parent.mkdir()
    half = {"half": np.ones((3, 3), np.float16), "count": np.ones(3, np.int64)}
    first.write_bytes(save({"a.weight": arrays["a.weight"]}))
    second.write_bytes(save({"b.bias": arrays["b.bias"], **half}, {"format": "pt"}))
    weights = {"a.weight": first.name, "b.bias": second.name, "half": second.name}
    index.write_text(json.dumps({"metadata": {"total_size": 4}, "weight_map": weights}))
    path = {"file": second, "shard": second, "index": index}[which]
    opened = second if which == "file" else folder / "model"

    def read() -> None:
        _use(open_checkpoint(opened))

    return Reader(
        path, (path.read_bytes(),), read, whole if which == "index" else safetensors_header
    )


def _use(found: Checkpoint) -> None:
    layout = found.layout()
    if layout.size <= MOST_READ:
        found.vector(layout)
        found.check_finite(layout)
        found.fingerprint(layout)


def model_folder_reader(folder: Path, name: str) -> Reader:
    """The files of a model folder that are carried or asked for the base."""
    model, out = folder / "model", folder / "out"
    model.mkdir()
    contents = {
        "config.json": {"auto_map": {"AutoModel": "x.py--Model"}, "hidden": [1, {"a": None}],
                        "_name_or_path": "base", "custom_pipelines": {"a": {"impl": "b"}}},
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.X"}],
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x.py--T", None]}, "model": 5},
        "adapter_config.json": {"base_model_name_or_path": "base", "peft_type": "LORA"},
    }  # fmt: skip
    for file, value in contents.items():
        (model / file).write_text(json.dumps(value))
    (model / "README.md").write_text(
        "---\nbase_model:\n- one\n- two\ntags: &t [merge, dare]\nmore: *t\n---\n\n# A model\n"
    )
    path = model / name

    def read() -> None:
        bases_named_by([model])
        out.mkdir()
        try:
            carry_files(model, out)
        finally:
            shutil.rmtree(out)

    is_text = name == "README.md"
    return Reader(path, (path.read_bytes(),), read, None if is_text else whole, is_text=is_text)


def adapter_reader(folder: Path, which: str) -> Reader:
    """A LoRA adapter over a base."""
    base_path, adapter = folder / "base.safetensors", folder / "adapter"
    adapter.mkdir()
    base_path.write_bytes(save(sample_arrays()))
    base = open_base(base_path, [])
    layout = base.layout
    cached = CachedSource(base.checkpoint.reader(layout))
    left, right = np.ones((6, 2), np.float32), np.ones((2, 5), np.float32)
    prefix = "base_model.model.a"
    factors = {f"{prefix}.lora_A.weight": right, f"{prefix}.lora_B.weight": left,
               "base_model.model.b.bias": np.ones(7, np.float32)}  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False,
              "fan_in_fan_out": False, "alpha_pattern": {"a": 8}, "use_dora": False,
              "base_model_name_or_path": "base"}  # fmt: skip
    (adapter / "adapter_model.safetensors").write_bytes(save(factors))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    path = adapter / ("adapter_config.json" if which == "config" else "adapter_model.safetensors")

    def read() -> None:
        source, out = adapter_source(adapter, base, cached), np.empty(layout.size, np.float32)
        source.read(0, layout.size, out)

    return Reader(
        path, (path.read_bytes(),), read, whole if which == "config" else safetensors_header
    )


_RECIPE = {
    "base": "base", "method": "ties", "scaling": 0.7, "drop-rate": "0.5", "seed": 3,
    "models": ["one", {"path": "two", "options": {"density": 0.5}}], "exclude": ["head.*"],
    "options": {"density": 0.5}, "rules": [{"match": "a.*", "scaling": 0.5}], "out": "merged",
}  # fmt: skip
_RECIPES = {
    "yaml": b"""base: base
method: ties
scaling: 0.7
drop-rate: 0.5
options: &o {density: 0.5}
models:
- one
- path: two
  options: *o
exclude: ['head.*']
rules:
- match: 'a.*'
  scaling: 0.5
""",
    "toml": b"""base = "base"
method = "ties"
scaling = 0.7
models = ["one", {path = "two", options = {density = 0.5}}]
exclude = ['head.*']
[options]
density = 0.5
[[rules]]
match = "a.*"
scaling = 0.5
""",
    "json": json.dumps(_RECIPE).encode(),
}


def recipe_reader(folder: Path, kind: str) -> Reader:
    """A merge recipe."""
    path = folder / f"recipe.{kind}"

    def read() -> None:
        values = read_recipe(path).values
        values.pop("out", None)
        make_recipe(values)

    inner = whole if kind == "json" else None
    return Reader(path, (_RECIPES[kind],), read, inner, is_text=True)
