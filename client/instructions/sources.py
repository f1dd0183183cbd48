"""Where conversations come from: built-in sets, files, `datasets` names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from client.cells import label_of, text_of
from client.config import DEFAULTS, TaskConfig
from client.data import named_labels, open_datasets
from client.instructions.columns import columns_of
from client.instructions.conversations import (
    FLAWS,
    Conversation,
    flaw,
    from_columns,
    from_messages,
    with_system,
)
from client.missing_columns import likely_pair, no_column
from client.rows import RawRow, RawSets
from client.tables.read import SUFFIXES, read_table
from client.tables.table import Table
from client.text_files import kind_of
from dare_agg.errors import ConfigError

MESSAGES = "messages"
# Files whose beginning names every column.
_TOLD = (".csv", ".tsv", ".tab", ".parquet")


@dataclass(frozen=True)
class BuiltInConversations:
    """A row of the table of conversations that are made on the spot."""

    what: str
    load: Callable[[int], tuple[Sequence[Conversation], Sequence[Conversation]]]


def _arithmetic(
    seed: int, *, worked: bool = False
) -> tuple[Sequence[Conversation], Sequence[Conversation]]:
    from client.instructions.arithmetic import problems

    train = problems(4000, seed=seed, split="train", worked=worked)
    return train, problems(1000, seed=seed, split="test", worked=worked)


BUILT_IN_CONVERSATIONS: Mapping[str, BuiltInConversations] = {
    "arithmetic": BuiltInConversations("word problems with a number as the answer", _arithmetic),
    "arithmetic-worked": BuiltInConversations(
        "the same with an equation as the answer", partial(_arithmetic, worked=True)
    ),
}


def holds_conversations(config: TaskConfig) -> bool:
    """Whether the columns of the configuration's data, as far as they are here, are such."""
    if config.data in BUILT_IN_CONVERSATIONS:
        return True
    seen = columns_of(Path(config.data), config.delimiter)
    return any(_fit(names, config) for names in seen) or _meant(seen, config)


def _fit(names: Sequence[str], config: TaskConfig) -> bool:
    return MESSAGES in names or {config.prompt_column, config.answer_column} <= set(names)


def _meant(seen: Sequence[Sequence[str]], config: TaskConfig) -> bool:
    """Whether columns of conversations are named of data without a text, be it wrongly."""
    usual = (DEFAULTS["prompt-column"], DEFAULTS["answer-column"])
    told = (config.prompt_column, config.answer_column) != usual
    return bool(seen) and told and not any(config.text_column in names for names in seen)


def load_conversations(config: TaskConfig) -> tuple[RawSets, list[str]]:
    """As `_load`, with the test rows of ``test-data`` where the configuration names that."""
    sets, notes = _load(config)
    if config.test_data:
        tested = replace(config, data=config.test_data, test_data="", partition_by="")
        found, more = _load(tested)
        sets, notes = (sets[0], found[0]), [*notes, *more]
    return sets, notes


def _load(config: TaskConfig) -> tuple[RawSets, list[str]]:
    """The training and test rows that a configuration names, and what is to be said of them.

    A row is a conversation, its label (the name of the data where there is no such column) and
    its group. Rows from which nothing can be learned are left out and counted. Raises
    `ConfigError` for what cannot be read, and where no row is left.
    """
    notes: list[str] = []
    source = config.data
    if source in BUILT_IN_CONVERSATIONS:
        train, test = BUILT_IN_CONVERSATIONS[source].load(config.seed)
        made = [
            [(with_system(c, config.system_prompt), source, "") for c in s] for s in (train, test)
        ]
        return (made[0], made[1]), notes
    path = Path(source)
    if kind_of(path) in SUFFIXES:
        return (_from_file(path, config, notes), None), notes
    if path.is_file():
        raise ConfigError(
            f"data {source!r} is a file of a kind that holds no conversations; known: "
            f"{', '.join(SUFFIXES)}: save or export it as one of them"
        )

    def rows(split: Any, name: str) -> list[RawRow]:
        def column(wanted: str) -> Sequence[Any]:
            if wanted == config.label_column:
                return named_labels(split, wanted)
            return list(split[wanted][:])

        table = Table(split.column_names, column)
        return _pick(f"data {source!r} ({name})", table, config, notes)

    train_split, test_split = open_datasets(source, BUILT_IN_CONVERSATIONS)
    test_rows = rows(test_split, "test") if test_split is not None else None
    return (rows(train_split, "train"), test_rows), notes


def _from_file(path: Path, config: TaskConfig, notes: list[str]) -> list[RawRow]:
    what = f"data file {str(path)!r}"
    if not path.is_file():
        raise ConfigError(f"{what} does not exist; check the path")
    seen = columns_of(path, config.delimiter)
    pair = (config.prompt_column, config.answer_column)
    wanted = (MESSAGES,) if any(MESSAGES in names for names in seen) else pair
    if seen and not any(_fit(names, config) for names in seen) and kind_of(path) in _TOLD:
        raise ConfigError(_no_conversations(what, config, max(seen, key=len)))
    group = (config.partition_by,) if config.partition_by else ()
    table = read_table(
        path, (*wanted, *group), delimiter=config.delimiter, encoding=config.encoding
    )
    notes += table.notes
    return _pick(what, table, config, notes)


def _no_conversations(what: str, config: TaskConfig, names: Sequence[str]) -> str:
    missing = next(n for n in (config.prompt_column, config.answer_column) if n not in names)
    said = no_column(what, missing, names)
    if said.endswith("?"):
        return said
    asked, told = likely_pair(names) or ("NAME", "NAME")
    return (
        f"{said}, and no column {MESSAGES!r}; name prompt-column={asked} and answer-column={told}"
    )


def _pick(what: str, table: Table, config: TaskConfig, notes: list[str]) -> list[RawRow]:
    if not _fit(table.names, config):
        raise ConfigError(_no_conversations(what, config, table.names))
    group = config.partition_by
    if group and group not in table.names:
        raise ConfigError(no_column(what, group, table.names))
    talks = _conversations(what, table, config)
    count = len(talks)
    labelled = config.label_column in table.names
    labels = table.column(config.label_column) if labelled else [""] * count
    groups = table.column(group) if group else [""] * count
    usual = Path(config.data).stem or config.data
    rows: list[RawRow] = []
    bad: Counter[str] = Counter()
    first: dict[str, str] = {}
    for number, (talk, y, g) in enumerate(zip(talks, labels, groups, strict=True)):
        where = f"{what}, {table.row(number)}"
        if why := flaw(talk):
            bad[why] += 1
            first.setdefault(why, table.row(number))
            continue
        label = label_of(y, f"{where}, column {config.label_column!r}", config.encoding)
        of = text_of(g, f"{where}, column {group!r}", config.encoding) or ""
        rows.append((with_system(talk, config.system_prompt), label or usual, of))
    if bad:
        told = ", ".join(f"{bad[w]} {w} (first: {first[w]})" for w in FLAWS if bad[w])
        if not rows:
            raise ConfigError(
                f"{what} has no row to learn from: of {count} rows {told}; an answer with text "
                "below a question is needed"
            )
        notes.append(f"{what}: {bad.total()} of {count} rows are left out: {told}")
    if again := len(rows) - len({row[0] for row in rows}):
        notes.append(f"{what}: {again} of {len(rows)} rows repeat an earlier one, and are kept")
    return rows


def _conversations(what: str, table: Table, config: TaskConfig) -> list[Conversation]:
    def where(number: int) -> str:
        return f"{what}, {table.row(number)}"

    if MESSAGES in table.names:
        cells = table.column(MESSAGES)
        return [
            from_messages(cell, f"{where(n)}, column {MESSAGES!r}", config.encoding)
            for n, cell in enumerate(cells)
        ]
    asked, told = table.column(config.prompt_column), table.column(config.answer_column)
    return [
        from_columns(q, a, where(n), config.encoding)
        for n, (q, a) in enumerate(zip(asked, told, strict=True))
    ]
