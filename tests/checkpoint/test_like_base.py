"""A version of a base on disk, written as the checkpoint that its base is."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.like_base import write_like_base
from dare_agg.checkpoint.model import model_in
from dare_agg.errors import CheckpointError, NonFiniteError
from dare_agg.files.json_text import read_json
from dare_agg.vectors.model import global_model
from dare_agg.vectors.tiled import TiledVector
from tests.tiny import llama, tensors


@dataclass(frozen=True)
class Shifted:
    """Another source with a number added."""

    source: object
    by: float

    @property
    def size(self) -> int:
        return self.source.size

    def read(self, lo, hi, out):
        self.source.read(lo, hi, out)
        out += np.float32(self.by)


def moved(model, by=0.25):
    return model.placed(TiledVector(Shifted(model.delta, by)), model.dense + np.float32(by))


def test_transformers_loads_a_version_with_the_clients_values(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = open_checkpoint(llama(tmp_path / "base"))
    model = moved(model_in(base))
    carried = write_like_base(base, model, tmp_path / "out")
    assert "config.json" in carried.files
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, array in model.arrays().items():
        assert np.array_equal(loaded[name].numpy(), array), name
    written = model_in(open_checkpoint(tmp_path / "out"))
    assert written.fingerprints == model.fingerprints


def test_tied_tensors_and_those_of_no_group_are_as_in_the_base(tmp_path: Path) -> None:
    folder = llama(tmp_path / "base", tie_word_embeddings=True)
    found = tensors(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].copy()
    found["table"] = np.eye(3, dtype=bool)
    from safetensors.numpy import save_file

    save_file(found, folder / "model.safetensors")
    base = open_checkpoint(folder)
    model = moved(model_in(base, exclude=["norm"]))
    write_like_base(base, model, tmp_path / "out.safetensors")
    written = tensors(tmp_path / "out.safetensors")
    assert written.keys() == found.keys()
    assert np.array_equal(written["table"], found["table"])
    assert np.array_equal(written["model.norm.weight"], found["model.norm.weight"])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert np.array_equal(written[name], found[name] + np.float32(0.25))


def test_a_bfloat16_base_gives_bfloat16_or_the_exact_values(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = llama(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    base = open_checkpoint(folder)
    model = moved(model_in(base), 1e-4)
    write_like_base(base, model, tmp_path / "bfloat16")
    write_like_base(base, model, tmp_path / "float32", dtype="float32")
    assert read_json(tmp_path / "bfloat16" / "config.json")["dtype"] == "bfloat16"
    assert read_json(tmp_path / "float32" / "config.json")["dtype"] == "float32"
    exact, rounded = (tensors(tmp_path / word) for word in ("float32", "bfloat16"))
    for name, array in model.arrays().items():
        assert np.array_equal(exact[name], array)
        close = torch.from_numpy(np.array(array)).to(torch.bfloat16).float().numpy()
        assert np.array_equal(rounded[name], close)


def test_a_place_that_is_taken_and_a_value_too_large_leave_nothing(tmp_path: Path) -> None:
    base = open_checkpoint(llama(tmp_path / "base"))
    with pytest.raises(CheckpointError, match="exists"):
        write_like_base(base, model_in(base), tmp_path / "base")
    with pytest.raises(CheckpointError, match="dtype 'half' is unknown"):
        write_like_base(base, model_in(base), tmp_path / "out", dtype="half")
    with pytest.raises(NonFiniteError, match="does not fit F16"):
        write_like_base(base, moved(model_in(base), 1e6), tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert global_model(tensors(tmp_path / "base"), by_form=True).ref == model_in(base).ref
