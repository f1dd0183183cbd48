"""`dare-agg run --dry-run`: what a run would do, as people read it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dare_agg.runs.words import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_WIDE = 48  # cells of the client with most rows
_SHOWN = 16  # clients shown one by one
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_REST = "·"
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


def letters(clients: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A letter for each label, the most frequent first; the rest share a dot."""
    counts: dict[str, int] = {}
    for client in clients:
        for name, rows in client["labels"].items():
            counts[name] = counts.get(name, 0) + rows
    names = sorted(counts, key=lambda name: (-counts[name], name))
    return {n: _LETTERS[i] if i < len(_LETTERS) else _REST for i, n in enumerate(names)}


def bar(client: Mapping[str, Any], by: Mapping[str, str], most: int) -> str:
    """A client's rows as a bar, each cell the letter of a label, in proportion.

    >>> bar({"rows": 4, "labels": {"x": 3, "y": 1}}, {"x": "a", "y": "b"}, 4)[::12]
    'aaab'
    """
    cells = round(_WIDE * client["rows"] / max(1, most))
    labelled = sum(client["labels"].values())
    if not labelled:
        return "#" * max(1, cells)
    said, seen = "", 0
    for name in by:
        seen += client["labels"].get(name, 0)
        said += by[name] * (round(cells * seen / labelled) - len(said))
    return said or by[max(client["labels"], key=client["labels"].__getitem__)]


def show_outlook(
    found: Mapping[str, Any], settings: Mapping[str, Any], cpus: int, console: Console
) -> None:
    """Print the division, each method with its bytes, memory and a guess of the time."""
    from rich.table import Table
    from rich.text import Text

    clients = found.get("clients", [])
    if clients:
        by = letters(clients)
        most = max(client["rows"] for client in clients)
        table = Table(title=f"{settings['data']}: training rows of {len(clients)} clients")
        for name in ("client", "rows", "labels"):
            table.add_column(name, justify="left" if name == "labels" else "right", no_wrap=True)
        for number, client in enumerate(clients[:_SHOWN]):
            table.add_row(str(number), f"{client['rows']:,}", _coloured(bar(client, by, most)))
        console.print(table)
        rows = [client["rows"] for client in clients]
        if len(clients) > _SHOWN:
            console.print(
                f"{len(clients) - _SHOWN} more; fewest rows {min(rows):,}, median "
                f"{statistics.median(rows):,.0f}, most {max(rows):,}"
            )
        if by:
            console.print(Text(", ".join(f"{c} {name}" for name, c in list(by.items())[:26])))
        console.print(f"{sum(rows):,} rows to train on, {found['test_rows']:,} to test on")
        for note in found.get("notes", []):
            console.print(Text(f"note: {note}"))
    rounds, count = settings["num-rounds"], int(settings["min-clients"])
    table = Table(title=f"{settings['model']}, {rounds} rounds a method")
    for name in ("method", "up", "down", "in all"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for one in found["methods"]:
        table.add_row(one["name"], *_bytes_of(one, rounds, count))
    console.print(table)
    console.print("up and down: a client and round; in all: both ways, all clients and rounds")
    for one in found["methods"]:
        console.print(Text(f"{one['name']}: {one['says']}"))
    for line in cost_lines(found, settings, cpus):
        console.print(line)


def _coloured(cells: str) -> Text:
    from rich.text import Text

    text = Text()
    for cell in cells:
        place = _LETTERS.find(cell)
        text.append(cell, _COLOURS[place % len(_COLOURS)] if place >= 0 else "")
    return text


def _bytes_of(one: Mapping[str, Any], rounds: int, clients: int) -> tuple[str, str, str]:
    if one["up"] is None:
        return "–", "–", "–"
    down, later = one["down"], one.get("down_later")
    if later is None:
        return human_bytes(one["up"]), f"{human_bytes(down)} once, then steps", "–"
    total = clients * (one["up"] * rounds + down + later * (rounds - 1))
    said = human_bytes(down)
    if later != down:
        said = f"{said} once, then at most {human_bytes(later)}"
    return human_bytes(one["up"]), said, human_bytes(total)


def cost_lines(
    found: Mapping[str, Any], settings: Mapping[str, Any], cpus: int, here: int | None = None
) -> list[str]:
    """Memory and time of a simulation on this machine, from what was measured on it."""
    step = found.get("step_seconds")
    if step is None:
        return ["memory and time: not looked at (the clients are elsewhere, or the model is large)"]
    count = int(settings["min-clients"])
    parallel = max(1, min(count, (here or os.cpu_count() or 1) // cpus))
    memory = found["client_bytes"]
    seconds = run_seconds(found, settings, parallel)
    return [
        f"memory: {human_bytes(memory)} a client process, {parallel} side by side: "
        f"{human_bytes(memory * parallel)}, and as much for the server as for one",
        f"time: about {human_seconds(seconds)} of training and evaluation ({step:.2g} s a step, "
        "measured just now); Flower adds some seconds a round, other work on this machine more",
    ]


def run_seconds(found: Mapping[str, Any], settings: Mapping[str, Any], parallel: int) -> float:
    """Seconds that all methods train and evaluate, ``parallel`` clients at a time.

    Steps of a client are the run config's, or as many as its rows make in its epochs.
    """
    epochs, batch = settings["epochs"], settings["batch"]
    steps = [
        settings["steps"] if not epochs else -(-client["rows"] * epochs // batch)
        for client in found["clients"]
    ]
    share = float(settings["fraction-train"])
    train = sum(steps) * share * found["step_seconds"]
    test = found["test_rows"] * (found["row_seconds"] or 0.0) if settings["evaluate"] else 0.0
    longest = max(steps) * found["step_seconds"]
    one = max(train / parallel, longest) + test / parallel
    return one * settings["num-rounds"] * len(found["methods"])
