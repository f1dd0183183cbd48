"""Image classification: features of a pretrained image model under a linear head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from client.config import TaskConfig
from client.head import linear_head, with_adapters
from client.images import is_image_source, load_images
from client.models import (
    IMAGE_ENCODER,
    MODELS,
    built_in,
    built_in_kind,
    model_path,
    refuse_pickled_model,
    refuse_quantised_model,
)
from client.pixels import read_image
from client.rows import Data, Indices, Rows
from client.tasks.task import Batch, Task, test_share
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import read_json

_PREPROCESSOR = "preprocessor_config.json"
# (x − 127)/128 for pixels from 0 to 255, as EfficientNet-lite was trained.
_LITE_MEAN, _LITE_DEVIATION = 127 / 255, 128 / 255


def _recognises(config: TaskConfig) -> bool:
    return is_image_source(config.data) or built_in_kind(config.model) == IMAGE_ENCODER


def _load(config: TaskConfig) -> Data:
    if config.test_data:
        raise ConfigError(
            f"test-data = {config.test_data!r} for images; put them into {config.data}/test beside "
            f"{config.data}/train"
        )
    return load_images(
        config.data,
        label_column=config.label_column,
        partition_by=config.partition_by,
        label_names=config.labels,
        test_share=test_share(config),
        seed=config.seed,
    )


class ImageReader:
    """Decodes images when first asked for; a batch is ``pixel_values`` (n, 3, size, size)."""

    def __init__(self, config: TaskConfig, rows: Rows) -> None:
        self.size = config.image_size or _own_size(config.model)
        self.mean, self.deviation = _normalisation(config.model)
        self.inputs = rows.inputs
        self.pixels = np.zeros((len(rows), self.size, self.size, 3), np.uint8)
        # Per row: "" once decoded, why it cannot be, None before it was asked for.
        self.wrong: list[str | None] = [None] * len(rows)

    def readable(self, at: Indices) -> tuple[Indices, str]:
        """Those of the rows that hold an image, and why the first other does not."""
        for row in map(int, at):
            if self.wrong[row] is not None:
                continue
            try:
                self.pixels[row] = read_image(self.inputs[row], self.size)
                self.wrong[row] = ""
            except ConfigError as error:
                self.wrong[row] = str(error)
        why = next((said for row in map(int, at) if (said := self.wrong[row])), "")
        return (at[[not self.wrong[row] for row in map(int, at)]] if why else at), why

    def __call__(self, at: Indices) -> Batch:
        """The batch of some rows; raises `ConfigError` for one without a readable image."""
        import torch

        _, why = self.readable(at)
        if why:
            raise ConfigError(why)
        images = self.pixels[at].astype(np.float32)
        images -= 255 * self.mean
        images /= 255 * self.deviation
        # Kept as (n, size, size, 3) in memory, "channels last": a third faster on a CPU.
        return {"pixel_values": torch.from_numpy(images.transpose(0, 3, 1, 2))}


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
    refuse_pickled_model(config.model)
    torch.manual_seed(config.seed)  # for what the checkpoint lacks, such as a pooler
    try:
        model = AutoModel.from_pretrained(
            config.model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
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
    reader=ImageReader,
)
