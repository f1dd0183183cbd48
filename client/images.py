"""Image data: a folder of classes, MNIST's file format, a built-in set, a `datasets` folder.

An input is a path, an array of pixels or a `datasets` cell; `read_image` decodes it when it is
first trained on.
"""

from __future__ import annotations

import csv
import gzip
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.rows import Data, RawRow, RawSets, make_data
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.files.json_text import read_json

Pixels = NDArray[np.uint8]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
TEST_SPLITS = ("test", "validation", "val")
METADATA = "metadata.csv"
_IDX_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_IDX_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class BuiltInImages:
    """A row of the table of image sets that install from a package registry."""

    what: str
    folder: str
    label_names: tuple[str, ...]
    remedy: str


BUILT_IN_IMAGES: Mapping[str, BuiltInImages] = {
    "fashion-mnist": BuiltInImages(
        "clothes, 10 classes, 28×28 grey",
        "/usr/share/datasets/fashion-mnist",
        ("t-shirt", "trouser", "pullover", "dress", "coat")
        + ("sandal", "shirt", "sneaker", "bag", "boot"),
        "apt-get install dataset-fashion-mnist",
    ),
}


def is_image_source(source: str) -> bool:
    """Whether ``source`` holds images, as far as its name or its files tell."""
    folder = Path(source)
    if source in BUILT_IN_IMAGES:
        return True
    if not folder.is_dir():
        return False
    if _idx_file(folder, _IDX_NAMES[0]):
        return True
    if _saved_dataset(folder):
        return any(_has_image_feature(path) for path in folder.rglob("dataset_info.json"))
    return next(_images_below(folder), None) is not None


def load_images(
    source: str,
    *,
    label_column: str = "label",
    partition_by: str = "",
    label_names: Sequence[str] = (),
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Load an image set by name or folder.

    ``source`` is a row of `BUILT_IN_IMAGES`; a folder with one subfolder of images a class,
    optionally under ``train/`` and ``test/``; a folder with MNIST's four IDX files; or a
    `datasets` name or folder with one image column. ``partition_by`` names a column of
    the folder's ``metadata.csv`` (``file_name`` and others, relative to the split), or of
    the `datasets` set. Raises `ConfigError` for what is missing.
    """
    row = BUILT_IN_IMAGES.get(source)
    folder = Path(row.folder if row else source)
    if row and not folder.is_dir():
        raise ConfigError(f"data {source!r} is not installed; get it with: {row.remedy}")
    if _idx_file(folder, _IDX_NAMES[0]):
        sets = _read_idx_folder(folder, row.label_names if row else ())
    elif folder.is_dir() and not _saved_dataset(folder):
        sets = _read_class_folders(folder, partition_by)
    else:
        sets = _from_datasets(source, label_column, partition_by)
    return make_data(source, sets, label_names=label_names, test_share=test_share, seed=seed)


def read_image(item: Any, size: int) -> Pixels:
    """Decode an image into uint8 (size, size, 3): centre-cropped square, scaled, RGB.

    Raises `ConfigError` naming a file that is no readable image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    opened = item() if callable(item) else item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = (
                Image.fromarray(opened) if isinstance(opened, np.ndarray) else _opened(opened)
            ).convert("RGB")
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
        OSError,
        ValueError,
        SyntaxError,  # what a broken PNG raises
    ) as error:
        raise ConfigError(f"image {str(opened)!r:.200} cannot be read: {error}") from error
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR), np.uint8)


def _opened(source: Any) -> Any:
    from PIL import Image

    return Image.open(source) if isinstance(source, Path) else source


# --- folders of classes --------------------------------------------------------------------


def _images_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            yield path


def _read_class_folders(folder: Path, group: str) -> RawSets:
    names = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    if "train" not in names:
        return _read_split(folder, group), None
    test = next((names[name] for name in TEST_SPLITS if name in names), None)
    return _read_split(names["train"], group), _read_split(test, group) if test else None


def _read_split(folder: Path, group: str) -> list[RawRow]:
    """Rows of one split: the label is the first subfolder's name."""
    groups = _read_groups(folder, group) if group else None
    rows: list[RawRow] = []
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in _images_below(kind):
            name = path.relative_to(folder).as_posix()
            if groups is not None and name not in groups:
                raise ConfigError(f"{folder / METADATA} has no row for {name!r}; add one")
            rows.append((path, kind.name, groups[name] if groups else ""))
    if not rows:
        raise ConfigError(
            f"data {str(folder)!r} holds no images ({', '.join(IMAGE_SUFFIXES[:4])}, …) in "
            "subfolders; put the images of each class into a subfolder of its name"
        )
    return rows


def _read_groups(folder: Path, column: str) -> dict[str, str]:
    path = folder / METADATA
    if not path.is_file():
        raise ConfigError(
            f"partition-by {column!r} needs {str(path)!r} with the columns file_name and {column}"
        )
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        names = rows.fieldnames or ()
        for wanted in ("file_name", column):
            if wanted not in names:
                raise ConfigError(
                    f"{str(path)!r} has no column {wanted!r}{did_you_mean(wanted, names)}"
                )
        return {row["file_name"]: str(row[column]) for row in rows}


# --- MNIST's IDX files ---------------------------------------------------------------------


def _idx_file(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_idx_folder(folder: Path, names: Sequence[str]) -> RawSets:
    def split(image_name: str, label_name: str) -> list[RawRow] | None:
        images, labels = _idx_file(folder, image_name), _idx_file(folder, label_name)
        if images is None:
            return None
        if labels is None:
            raise ConfigError(f"data {str(folder)!r} has {images.name} but no {label_name}")
        pixels, numbers = _read_idx(images, 3), _read_idx(labels, 1)
        if len(pixels) != len(numbers):
            raise ConfigError(
                f"data {str(folder)!r} has {len(pixels)} images but {len(numbers)} labels"
            )
        return [
            (image, names[number] if number < len(names) else str(number), "")
            for image, number in zip(pixels, numbers.tolist(), strict=True)
        ]

    return split(*_IDX_NAMES) or [], split(*_IDX_TEST)


def _read_idx(path: Path, dimensions: int) -> Pixels:
    """Read an IDX file of bytes: magic 0 0 8 d, d big-endian sizes, data."""
    try:
        blob = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read: {error}") from error
    start = 4 + 4 * dimensions
    if blob[:4] != bytes([0, 0, 8, dimensions]) or len(blob) < start:
        raise ConfigError(f"data file {str(path)!r} is no IDX file of {dimensions} dimensions")
    shape = [int(size) for size in np.frombuffer(blob, ">u4", dimensions, 4)]
    wanted = int(np.prod(shape, dtype=object))
    if len(blob) - start != wanted:
        raise ConfigError(
            f"data file {str(path)!r} holds {len(blob) - start} bytes; its header says {wanted}"
        )
    return np.frombuffer(blob, np.uint8, offset=start).reshape(shape)


# --- the datasets library ------------------------------------------------------------------


def _saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _has_image_feature(path: Path) -> bool:
    try:
        features = read_json(path).get("features", {})
    except (OSError, ValueError):
        return False
    return any(isinstance(f, dict) and f.get("_type") == "Image" for f in features.values())


def _from_datasets(source: str, label: str, group: str) -> RawSets:
    from client.data import open_datasets

    def rows(split: Any) -> list[RawRow]:
        features = split.features
        images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        if len(images) != 1:
            raise ConfigError(f"data {source!r} has image columns {images}; exactly one is needed")
        for wanted in (label, *((group,) if group else ())):
            if wanted not in features:
                raise ConfigError(
                    f"data {source!r} has no column {wanted!r}{did_you_mean(wanted, features)}"
                )
        names = getattr(features[label], "names", None)
        labels = [str(names[v] if names else v) for v in split[label][:]]
        groups = [str(v) for v in split[group][:]] if group else [""] * len(labels)

        def cell(number: int) -> Callable[[], Any]:
            return lambda: split[number][images[0]]

        return [(cell(i), y, g) for i, (y, g) in enumerate(zip(labels, groups, strict=True))]

    train, test = open_datasets(source, BUILT_IN_IMAGES)
    return rows(train), rows(test) if test is not None else None
