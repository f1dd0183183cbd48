"""One picture from a file, an array or a `datasets` cell: upright, square, RGB of eight bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError

Pixels = NDArray[np.uint8]


def check_image(path: Path) -> str:
    """Say what is wrong with an image file as far as its first bytes tell; "" where nothing is."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path):
                return ""
    except Exception as error:  # broken in whatever way
        return _why(path, error)


def read_image(item: Any, size: int) -> Pixels:
    """Decode an image into uint8 (size, size, 3): upright, centre-cropped square, scaled, RGB.

    A camera's rotation (EXIF) is applied, 16 bits a channel are scaled to 8, transparent parts
    are white, of several pictures in a file the first counts. Raises `ConfigError` naming a
    file that is no readable image.
    """
    from PIL import Image, ImageOps

    opened: Any = item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = item() if callable(item) else item
            image = _opened(opened)
            image.load()
            image = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a decoder may raise anything over damaged bytes
        raise ConfigError(_why(opened, error)) from error
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR), np.uint8)


def _opened(source: Any) -> Any:
    from PIL import Image

    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    return Image.open(source) if isinstance(source, Path) else source


def _rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I"):
        # Pillow's own conversion would cut off all above 255: a white picture.
        deep = np.asarray(image).astype(np.int64)
        if deep.min(initial=0) < 0 or deep.max(initial=0) > 0xFFFF:
            raise ValueError("more than 16 bits a pixel; save it with 8 or 16")
        return Image.fromarray((deep // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _why(source: Any, error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(source, Path) and source.is_file() and not source.stat().st_size:
        said = "the file is empty"
    name = f"image {str(source)!r:.200}" if isinstance(source, Path | np.ndarray) else "an image"
    return f"{name} cannot be read: {said[:200]}"
