"""Image data: a folder of classes, MNIST's file format, a built-in set, a `datasets` folder.

An input is a path, an array of pixels or a `datasets` cell; `client.pixels` decodes it when it
is first trained on.
"""

from __future__ import annotations

import gzip
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.cells import label_of
from client.pixels import Pixels, check_image
from client.rows import Data, RawRow, RawSets, make_data
from client.tables.read import read_table
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.files.json_text import read_json

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Folders' names, in small letters, of splits.
TRAIN_SPLITS = ("train", "training")
TEST_SPLITS = ("test", "testing", "validation", "valid", "val", "eval", "dev")
# What systems put into folders, beside names that begin with a dot.
_LITTER = ("__macosx", "thumbs.db", "desktop.ini")
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
    the `datasets` set. Files that are no images are left out; `Data.notes` says how many.
    Raises `ConfigError` for what is missing.
    """
    notes: list[str] = []
    row = BUILT_IN_IMAGES.get(source)
    folder = Path(row.folder if row else source)
    if row and not folder.is_dir():
        raise ConfigError(f"data {source!r} is not installed; get it with: {row.remedy}")
    if _idx_file(folder, _IDX_NAMES[0]):
        sets = _read_idx_folder(folder, row.label_names if row else ())
    elif folder.is_dir() and not _saved_dataset(folder):
        sets = _read_class_folders(folder, partition_by, notes)
    else:
        sets = _from_datasets(source, label_column, partition_by, notes)
    return make_data(
        source, sets, label_names=label_names, test_share=test_share, seed=seed, notes=notes
    )


# --- folders of classes --------------------------------------------------------------------


def _files_below(folder: Path) -> Iterator[Path]:
    """All files but what systems leave: hidden ones, thumbnails, an archive's second half."""
    for path in sorted(folder.rglob("*")):
        if not any(map(_is_litter, path.relative_to(folder).parts)) and path.is_file():
            yield path


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _images_below(folder: Path) -> Iterator[Path]:
    return filter(_is_image, _files_below(folder))


def _folders_in(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and not _is_litter(p.name)]


def _is_split(folder: Path) -> bool:
    """Whether images are divided into subfolders there; else the folder is a class itself."""
    return not any(_is_image(p) for p in folder.iterdir()) and bool(_folders_in(folder))


def _read_class_folders(folder: Path, group: str, notes: list[str]) -> RawSets:
    splits = {path.name.lower(): path for path in _folders_in(folder) if _is_split(path)}
    train = next((splits[name] for name in TRAIN_SPLITS if name in splits), None)
    if train is None:
        return _read_split(folder, group, notes), None
    test = next((splits[name] for name in TEST_SPLITS if name in splits), None)
    unused = [p.name for p in _folders_in(folder) if p not in (train, test)]
    if unused:
        notes.append(f"data {str(folder)!r}: {', '.join(unused)[:120]} beside the splits not used")
    return (
        _read_split(train, group, notes),
        _read_split(test, group, notes) if test else None,
    )


def _read_split(folder: Path, group: str, notes: list[str]) -> list[RawRow]:
    """Rows of one split: the label is the first subfolder's name."""
    groups = _read_groups(folder, group) if group else None
    rows: list[RawRow] = []
    others: Counter[str] = Counter()
    empty: list[str] = []
    broken: list[str] = []
    for kind in _folders_in(folder):
        before = len(rows) + len(broken)
        for path in _files_below(kind):
            if not _is_image(path):
                others[path.suffix.lower() or path.name] += 1
                continue
            if why := check_image(path):
                broken.append(why)
                continue
            name = path.relative_to(folder).as_posix()
            if groups is not None and name not in groups:
                raise ConfigError(f"{folder / METADATA} has no row for {name!r}; add one")
            # The same name from another system may be composed in another way.
            label = unicodedata.normalize("NFC", kind.name)
            rows.append((path, label, groups[name] if groups else ""))
        if len(rows) + len(broken) == before:
            empty.append(kind.name)
    what, loose = f"data {str(folder)!r}", sum(map(_is_image, folder.iterdir()))
    if broken:
        notes.append(f"{what}: {len(broken)} images are left out; {broken[0]}")
    if loose:
        notes.append(f"{what}: {loose} images in no class's subfolder are left out")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(4))
        notes.append(f"{what}: files of other kinds are left out ({kinds})")
    if empty and rows:
        notes.append(f"{what}: no images in {', '.join(empty)[:120]}, so no such class")
    if not rows and broken:
        raise ConfigError(f"{what}: none of its {len(broken)} images can be read; {broken[0]}")
    if not rows:
        raise ConfigError(
            f"{what} holds no images ({', '.join(IMAGE_SUFFIXES[:4])}, …) in "
            "subfolders; put the images of each class into a subfolder of its name"
        )
    return rows


def _read_groups(folder: Path, column: str) -> dict[str, str]:
    path = folder / METADATA
    if not path.is_file():
        raise ConfigError(
            f"partition-by {column!r} needs {str(path)!r} with the columns file_name and {column}"
        )
    table = read_table(path, ("file_name", column))
    return {
        str(name): str(value)
        for name, value in zip(table.column("file_name"), table.column(column), strict=True)
    }


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


def _from_datasets(source: str, label: str, group: str, notes: list[str]) -> RawSets:
    from client.data import named_labels, open_datasets

    def rows(split: Any, name: str) -> list[RawRow]:
        features = split.features
        images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        if len(images) != 1:
            raise ConfigError(f"data {source!r} has image columns {images}; exactly one is needed")
        for wanted in (label, *((group,) if group else ())):
            if wanted not in features:
                raise ConfigError(
                    f"data {source!r} has no column {wanted!r}{did_you_mean(wanted, features)}"
                )
        what = f"data {source!r} ({name})"
        labels = [label_of(v, f"{what}, column {label!r}") for v in named_labels(split, label)]
        groups = [str(v) for v in split[group][:]] if group else [""] * len(labels)

        def cell(number: int) -> Callable[[], Any]:
            return lambda: split[number][images[0]]

        if unlabelled := labels.count(None):
            notes.append(
                f"{what}: {unlabelled} of {len(labels)} rows are left out, without a label"
            )
        pairs = enumerate(zip(labels, groups, strict=True))
        return [(cell(i), y, g) for i, (y, g) in pairs if y is not None]

    train, test = open_datasets(source, BUILT_IN_IMAGES)
    return rows(train, "train"), (rows(test, "test") or None) if test is not None else None
