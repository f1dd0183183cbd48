"""Files whose values are of another kind or size than any program writes (found by fuzzing)."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save_file

from dare_agg.checkpoint import carry_files, open_checkpoint
from dare_agg.deploy.identities import load_identity
from dare_agg.errors import MOST_CHARACTERS, CheckpointError, ConfigError, NonFiniteError
from dare_agg.offline.adapters.source import adapter_source
from dare_agg.offline.base import open_base
from dare_agg.offline.recipe_file import read_recipe
from dare_agg.vectors.sources import CachedSource

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., np.ndarray]:
    """Reads an adapter of the given configuration and factors to its end."""
    save_file({"a.weight": np.zeros((6, 5), np.float32)}, tmp_path / "base.safetensors")
    base = open_base(tmp_path / "base.safetensors", [])
    layout, adapter = base.layout, tmp_path / "adapter"
    adapter.mkdir()

    def read(
        config: dict, a: tuple[int, ...] = (2, 5), b: tuple[int, ...] = (6, 2), scale: float = 1
    ) -> np.ndarray:
        names = ("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight")
        factors = {
            name: np.full(shape, scale, np.float32)
            for name, shape in zip(names, (a, b), strict=True)
        }
        save_file(factors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
        source = adapter_source(adapter, base, CachedSource(base.checkpoint.reader(layout)))
        out = np.empty(layout.size, np.float32)
        source.read(0, layout.size, out)
        return out

    return read


def test_a_pattern_of_an_adapter_cannot_hang(opened: Callable[..., np.ndarray]) -> None:
    assert opened({"alpha_pattern": {r"(\w+\.?)+!": 9, "a": 8}})[0] == 8  # 8 / 2, rank 2
    began = process_time()
    opened({"alpha_pattern": {r"(\w+\.?)+!": 9, "(a*)*" * 20 + "!": 1}})
    assert process_time() - began < 1


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": "a"}, {"alpha_pattern": [1]}, {"lora_alpha": [4]}, {"lora_alpha": ""},
        {"lora_alpha": True}, {"lora_alpha": 1e999}, {"alpha_pattern": {"a": None}},
    ],
)  # fmt: skip
def test_an_adapter_without_numbers_is_refused(
    opened: Callable[..., np.ndarray], config: dict
) -> None:
    with pytest.raises(CheckpointError, match="alpha"):
        opened(config)


@pytest.mark.parametrize(
    ("a", "b"), [((3, 5), (6, 2)), ((5,), (6, 2)), ((2, 5), (6,)), ((0, 5), (6, 0))]
)
def test_factors_that_cannot_be_multiplied_are_refused(
    opened: Callable[..., np.ndarray], a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError, match="cannot be multiplied"):
        opened({}, a, b)


@pytest.mark.parametrize("alpha", [1e29, -1e29])
def test_a_delta_beyond_float32_is_refused(opened: Callable[..., np.ndarray], alpha: float) -> None:
    opened({"lora_alpha": alpha})
    with pytest.raises(NonFiniteError, match="not finite"):
        opened({"lora_alpha": alpha}, scale=1e6)


@pytest.mark.parametrize("shard", ["x" * 300, "a\nb", "\x1b[2J"])
def test_an_index_of_impossible_names_is_refused_on_one_line(tmp_path: Path, shard: str) -> None:
    index = {"weight_map": {"a.weight": shard + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="missing") as error:
        open_checkpoint(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) <= MOST_CHARACTERS


@pytest.mark.parametrize("modules", ["1.5", "7", "null", '"x"', '{"a": 1}'])
def test_modules_that_are_no_list_stay(tmp_path: Path, modules: str) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    (model / "modules.json").write_text(modules)
    carried = carry_files(model, out)
    assert [left.file for left in carried.left] == ["modules.json"]
    assert not list(out.iterdir())


@pytest.mark.parametrize("text", ["9" * 250_000, "[[" + "a" * 250_000, "x = " + "9" * 250_000])
def test_a_long_word_in_a_recipe_costs_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    began = process_time()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_recipe(tmp_path / "recipe.toml")
    assert process_time() - began < 1


def test_a_key_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "client.pem"
    der = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    text = base64.b64encode(der.replace(b"\x2b\x65\x70", b"\x2b\x65\x03")).decode()
    path.write_text(f"-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="PEM"):
        load_identity(path)
