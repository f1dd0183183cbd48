"""Live progress of a run, read from its metrics.jsonl, and its table at the end."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_agg.errors import StateError, plain_line
from dare_agg.files.json_text import read_json
from dare_agg.runs.by_task import TASK_COLUMNS, TASK_TITLE, task_cells
from dare_agg.runs.live import live_facts, live_line
from dare_agg.runs.log import Mirror, planned_rounds, rejections, seconds_left
from dare_agg.runs.missed import MISSED_COLUMNS, MISSED_TITLE, missed_cells
from dare_agg.runs.rows import METRICS_FILE, STATE_FILE, RunRow, read_rows, sent_words
from dare_agg.runs.words import human_bytes, human_seconds, smaller_by

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# The whole line: what a client says stands behind other words, and is no progress.
_INFO = r"INFO[\s:]*"
_ROUND = re.compile(_INFO + r"\[ROUND (\d+)/(\d+)\]\s*$")
_WARNING = re.compile(r"WARNING\s*:\s*(\S.*)")
# What Flower warns of in every run, and in every one that fails.
_USUAL = ("Since flwr ", "Stopping Simulation Runtime")
_WAITING = re.compile(
    _INFO
    + r"(waiting for clients \([\w ,]+\)|unpacking model [\w.-]+, once; its folder is kept)\s*$"
)


def load_rows(folder: Path) -> list[RunRow]:
    """Read a run's rows; a line that is still being written is left out."""
    path = folder / METRICS_FILE
    return read_rows(path, strict=False) if path.is_file() else []


@contextlib.contextmanager
def following(folder: Path, console: Console) -> Iterator[Callable[[str], None]]:
    """`follow`, on a terminal with a last line that says how the run stands right now.

    A terminal without colours (NO_COLOR) has no such line: it is written with control codes.
    """
    if not console.is_terminal or console.color_system is None:
        yield follow(folder, console)
        return
    with console.status("") as status:
        yield follow(folder, console, status.update)


def follow(
    folder: Path, console: Console, stand: Callable[[Text], None] | None = None
) -> Callable[[str], None]:
    """Return a watcher of a run's log that prints each finished round and each warning once.

    ``stand`` is given one line of how the run stands, whenever its server says so. Where the
    server keeps its run folder on another machine, ``folder`` becomes its copy.
    """
    mirror = Mirror(folder)
    shown = len(load_rows(folder))
    warned: set[str] = set()

    def say(text: str, style: str) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def watch(line: str) -> None:
        nonlocal shown
        line = plain_line(line)
        ours = mirror.take(line)
        rows = load_rows(folder)
        # A resumed run drops rows that it is about to make again.
        shown = min(shown, len(rows))
        for place in range(shown, len(rows)):
            said = _round_line(rows[place], rows[: place + 1], load_config(folder))
            console.print(said, soft_wrap=True)
        shown = len(rows)
        if ours:
            if stand is not None:
                with contextlib.suppress(StateError):
                    stand(_text(live_line(live_facts(folder))))
            return
        # Errors are not shown: what ended a run is said in the end, tracebacks stay in the log.
        if (found := _WARNING.match(line)) and not found[1].startswith(_USUAL):
            if found[1] not in warned:
                warned.add(found[1])
                say(found[1], "yellow")
        elif found := _ROUND.match(line):
            say(f"round {found[1]} of {found[2]} …", "dim")
        elif found := _WAITING.match(line):
            say(f"{found[1]} …", "dim")

    return watch


def _text(line: str) -> Text:
    from rich.text import Text

    return Text(line)


def load_config(folder: Path) -> dict[str, Any]:
    """The run config as run.json keeps it; empty where there is none yet."""
    try:
        config = read_json(folder / STATE_FILE)["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return config if isinstance(config, dict) else {}


def _round_line(row: RunRow, rows: list[RunRow], config: dict[str, Any]) -> str:
    shown = measured(row)
    shown += ", " if shown else ""
    total = f" of {planned}" if (planned := planned_rounds(config)) else ""
    left_out = f" ({len(row.rejected)} left out: {rejections(row)})" if row.rejected else ""
    if row.weights_cut:
        left_out += f" (weight cut: {', '.join(row.weights_cut)})"
    if unheard := row.robust.get("unheard"):
        left_out += f" (hardly heard: {', '.join(map(str, unheard))})"
    left_out += _ages(row)
    left = seconds_left(rows, config)
    up, down = map(human_bytes, (row.upload_bytes_per_client, row.download_bytes_per_client))
    noise = row.noise_of_change
    told = f", noise {noise:.2g} times the change" if noise else ""
    return (
        f"[bold]{row.method}[/] round {row.round}{total}: {shown}"
        f"{row.accepted} updates{left_out}, {up} up and {down} down per client{told}, "
        f"{row.seconds:.0f} s" + (f", about {human_seconds(left)} left" if left else "")
    )


def _ages(row: RunRow) -> str:
    """How old the updates of a buffer were, "" in rounds."""
    ages, training = row.buffer.get("staleness"), row.buffer.get("in_flight")
    if not isinstance(ages, list) or not all(type(age) is int for age in ages) or not ages:
        return ""
    return f" ({min(ages)} to {max(ages)} merges old; {training} clients train on)"


def measured(row: RunRow) -> str:
    """What clients measured in a round, in words; of language models perplexity, not accuracy."""
    said = []
    if row.perplexity is not None:
        said.append(f"perplexity {row.perplexity:,.2f}")
    elif row.accuracy is not None:
        said.append(f"accuracy {row.accuracy:.3f}")
    if row.exact_match is not None:
        said.append(f"exact match {row.exact_match:.3f}")
    return ", ".join(said)


def last_rows(rows: list[RunRow]) -> dict[str, RunRow]:
    """The last round of each method, in the order in which methods ran."""
    return {row.method: row for row in rows}


def summary_table(rows: list[RunRow]) -> Table:
    """Render one line a method: accuracy, bytes per client and round, ratio, seconds."""
    from rich.table import Table

    last = last_rows(rows)
    language = any(row.perplexity is not None for row in last.values())
    said = any(sent_words(row) for row in last.values())
    matched = any(row.exact_match is not None for row in last.values())
    table = Table(title="After the last round")
    table.add_column("method")
    first = "perplexity" if language else "accuracy"
    for name in (
        first, *(["exact match"] if matched else []), "rounds",
        *(["sent"] if said else []), "update up", "head up", "ratio", "down", "seconds",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    dense = last["fedavg"].update_bytes_per_client if "fedavg" in last else 0
    for method, row in last.items():
        update = row.update_bytes_per_client
        own = method != "head-only"
        # Without FedAvg beside it, against its parameters in float32, as in the report.
        whole = dense or 4 * (row.parameters or 0)
        table.add_row(
            method,
            _shown(row.perplexity, ",.2f") if language else _shown(row.accuracy, ".3f"),
            *([_shown(row.exact_match, ".3f")] if matched else []),
            str(row.round),
            *([sent_words(row) or "–"] if said else []),
            human_bytes(update) if own else "–",
            human_bytes(row.dense_bytes_per_client if own else update),
            smaller_by(whole, update) if own else "–",
            human_bytes(row.download_bytes_per_client),
            f"{row.seconds:.0f}",
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def task_tables(rows: list[RunRow]) -> list[Table]:
    """By client and task, a table a method; empty where clients told nothing by task."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for method, row in last_rows(rows).items():
        if cells := task_cells(row):
            table = Table(title=f"{method}: {TASK_TITLE[0].lower()}{TASK_TITLE[1:]}")
            for place, name in enumerate(TASK_COLUMNS):
                table.add_column(name.lower(), justify="left" if place < 2 else "right")
            for line in cells:
                table.add_row(*map(Text, line))
            tables.append(table)
    return tables


def missed_table(rows: list[RunRow]) -> Table | None:
    """The clients that did not count in some round, and why; None where all always did."""
    from rich.table import Table
    from rich.text import Text

    if not (cells := missed_cells(rows)):
        return None
    table = Table(title=MISSED_TITLE)
    for name in MISSED_COLUMNS:
        table.add_column(name.lower(), overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def missed_lines(rows: list[RunRow]) -> list[str]:
    """The rounds of each method in which nobody's update counted; empty where there are none."""
    lines = []
    for method in last_rows(rows):
        own = [row for row in rows if row.method == method]
        missed = [row for row in own if not row.accepted]
        if missed:
            told = ", ".join(str(row.round) for row in missed[:10]) + ", …" * (len(missed) > 10)
            first = f": {rejections(missed[0])}" if missed[0].rejected else ""
            lines.append(
                f"{method}: {len(missed)} of {len(own)} rounds left the model as it was, since "
                f"nobody's update counted (round {told}{first})"
            )
    return lines


def secure_lines(rows: list[RunRow], folder: Path) -> list[str]:
    """What a secure run's user must know beside the table; empty for a plain run."""
    lines = []
    for method, row in last_rows(rows).items():
        if row.secure_clipped_share is None:
            continue
        lone = row.secure_lone_share
        shown = "hidden in the sum" if lone is None else f"alone at {lone:.1%} of the elements"
        lines.append(
            f"{method}: single values are {shown}; {row.secure_clipped_share:.2g} were clipped"
        )
        if (results := row.secure_results) is not None:
            lines.append(f"{results} of {row.accepted} parties hold the merged model")
            for name, what in (("merged", "with the base's names"), ("parties", "with own heads")):
                if (folder / name).exists():
                    lines.append(f"Merged, {what}: {folder / name}")
    return lines
