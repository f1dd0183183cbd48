"""Image classification: features of a pretrained image model under a linear head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from client.config import TaskConfig
from client.head import linear_head, with_adapters
from client.images import is_image_source, load_images, read_image
from client.models import (
    IMAGE_ENCODER,
    MODELS,
    built_in,
    built_in_kind,
    model_path,
    refuse_quantised_model,
)
from client.rows import Data, Indices, Rows
from client.tasks.task import Batch, Reader, Task
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import read_json

_PREPROCESSOR = "preprocessor_config.json"
# (x − 127)/128 for pixels from 0 to 255, as EfficientNet-lite was trained.
_LITE_MEAN, _LITE_DEVIATION = 127 / 255, 128 / 255


def _recognises(config: TaskConfig) -> bool:
    return is_image_source(config.data) or built_in_kind(config.model) == IMAGE_ENCODER


def _load(config: TaskConfig) -> Data:
    return load_images(
        config.data,
        label_column=config.label_column,
        partition_by=config.partition_by,
        label_names=config.labels,
        seed=config.seed,
    )


def image_reader(config: TaskConfig, rows: Rows) -> Reader:
    """Decode images when first asked for; a batch is ``pixel_values`` (n, 3, size, size)."""
    import torch

    size = config.image_size or _own_size(config.model)
    mean, deviation = _normalisation(config.model)
    pixels = np.zeros((len(rows), size, size, 3), np.uint8)
    decoded = np.zeros(len(rows), np.bool_)

    def read(at: Indices) -> Batch:
        for row in at:
            if not decoded[row]:
                pixels[row] = read_image(rows.inputs[row], size)
                decoded[row] = True
        images = pixels[at].astype(np.float32)
        images -= 255 * mean
        images /= 255 * deviation
        # Kept as (n, size, size, 3) in memory, "channels last": a third faster on a CPU.
        return {"pixel_values": torch.from_numpy(images.transpose(0, 3, 1, 2))}

    return read


def image_model(config: TaskConfig, labels: int) -> Any:
    """Load the image model and put a seeded linear head on its pooled features."""
    import torch

    kind = built_in_kind(config.model)
    if kind not in ("", IMAGE_ENCODER):
        raise ConfigError(
            f"model {config.model!r} reads text; for the images of {config.data!r} set model to "
            f"{built_in(IMAGE_ENCODER)[0]!r} or to an image "
            "model's folder"
        )
    backbone, width, features = _lite(config.model) if kind else _hugging_face(config)
    encoder = with_adapters(backbone, config)

    class ImageModelWithHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder
            self.head = linear_head(width, labels, config.seed)

        def forward(self, pixel_values: Any) -> Any:
            return self.head(features(self.encoder, pixel_values))

    return ImageModelWithHead()


def _lite(name: str) -> tuple[Any, int, Callable[[Any, Any], Any]]:
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name(name)
    # A .pth file is a pickle: only tensors are taken from it, and its digest was checked.
    weights = torch.load(model_path(name), map_location="cpu", weights_only=True)
    model.load_state_dict(weights)
    width = model._fc.in_features
    del model._fc

    def features(encoder: Any, images: Any) -> Any:
        return encoder.extract_features(images).mean(dim=(2, 3))

    return model, width, features


def _hugging_face(config: TaskConfig) -> tuple[Any, int, Callable[[Any, Any], Any]]:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    refuse_quantised_model(config.model)
    torch.manual_seed(config.seed)  # for what the checkpoint lacks, such as a pooler
    try:
        model = AutoModel.from_pretrained(config.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {config.model!r} cannot be loaded: {' '.join(str(error).split())[:200]}; give "
            "a Hugging Face folder, or a name while a hub can be reached"
        ) from error

    def features(encoder: Any, images: Any) -> Any:
        states = encoder(pixel_values=images).last_hidden_state
        # (n, channels, y, x) of a convolutional net, (n, patches, width) of a transformer.
        return states.mean(dim=(2, 3)) if states.dim() == 4 else states.mean(dim=1)

    width = getattr(model.config, "hidden_size", None) or model.config.hidden_sizes[-1]
    return model, int(width), features


def _own_size(name: str) -> int:
    """The image size a model was trained with; 224 where it does not say."""
    path = Path(name) / "config.json"
    found = read_json(path) if path.is_file() else {}
    size = found.get("image_size", 224)
    return int(size[0] if isinstance(size, list) else size)


def _normalisation(name: str) -> tuple[Any, Any]:
    """Mean and deviation a channel, for pixels from 0 to 1."""
    if name in MODELS:
        return np.float32(_LITE_MEAN), np.float32(_LITE_DEVIATION)
    path = Path(name) / _PREPROCESSOR
    found = read_json(path) if path.is_file() else {}
    half = [0.5, 0.5, 0.5]
    return (
        np.array(found.get("image_mean", half), np.float32),
        np.array(found.get("image_std", half), np.float32),
    )


TASK = Task(
    "image-classification",
    recognises=_recognises,
    load=_load,
    network=image_model,
    reader=image_reader,
)
