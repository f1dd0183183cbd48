"""A run while it goes: its page's facts and one line of them, read from its folder alone."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dare_agg.errors import DareError, StateError, plain_line
from dare_agg.runs.answers import ANSWERS_FILE, read_answers
from dare_agg.runs.claim import LOG_FILE, is_claimed, run_state
from dare_agg.runs.ending import RUNNING
from dare_agg.runs.log import is_ours, planned_methods, planned_rounds, seconds_left
from dare_agg.runs.now import NOW_FILE, Now, read_now
from dare_agg.runs.report.facts import page_facts
from dare_agg.runs.report.measures import measure_of
from dare_agg.runs.report.records import RunRecord, read_run, title_of
from dare_agg.runs.rows import METRICS_FILE, STATE_FILE, RunRow
from dare_agg.runs.words import human_bytes, human_seconds, without_paths

# What is read of a run's folder.
FILES = (METRICS_FILE, STATE_FILE, NOW_FILE, LOG_FILE, ANSWERS_FILE)
_LOG_BYTES = 64 << 10
_LOG_LINES = 200
_LOG_CHARACTERS = 400
# What is said before the first round, and while too few clients are online.
_WAITING = re.compile(r"INFO[\s:]*((?:waiting for clients \(|unpacking model )[^\n]{1,200})")


def newest_run(here: Path) -> Path | None:
    """The run at ``here`` or below it that was written to last; None where there is none.

    ``runs/``, a demo's folder and the folders right here are looked into.
    """
    places = [here, *_folders(here), *_folders(here / "runs"), here / "dare-agg-demo" / "run"]
    found = [(when, place) for place in places if (when := _written(place)) > 0]
    return max(found)[1] if found else None


def _folders(place: Path) -> list[Path]:
    try:
        return [one for one in place.iterdir() if one.is_dir()]
    except OSError:
        return []


def _written(place: Path) -> float:
    """When a run's files in ``place`` were last written; 0 where none are there."""
    when = 0.0
    for name in (METRICS_FILE, STATE_FILE, LOG_FILE):
        with contextlib.suppress(OSError):
            when = max(when, (place / name).stat().st_mtime)
    return when


def check_watched(folder: Path) -> None:
    """Raise `StateError` where ``folder`` is no run's, or where a file of it leads elsewhere."""
    if not folder.is_dir():
        raise StateError(f"{folder} is no folder; give the one that dare-agg run --output named")
    _refuse_links(folder)


def _refuse_links(folder: Path) -> None:
    for name in FILES:
        if (folder / name).is_symlink():
            raise StateError(f"{folder / name} is a link to elsewhere, and is not read; remove it")


def run_stamp(folder: Path) -> tuple[Any, ...]:
    """What changes when any of a run's files does."""
    found: list[Any] = [is_claimed(folder)]
    for name in FILES:
        try:
            told = os.stat(folder / name, follow_symlinks=False)
            found.append((told.st_mtime_ns, told.st_size, told.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)


def live_facts(folder: Path) -> dict[str, Any]:
    """The facts of a run's page, with ``live``: how the run stands right now.

    A folder that is not there yet, or half a file, gives what there is. Raises `StateError` where
    a file of the run leads elsewhere.
    """
    _refuse_links(folder)
    state = run_state(folder)
    config = state.get("config")
    config = config if isinstance(config, dict) else {}
    status = str(state.get("status", ""))
    now = read_now(folder, str(state.get("token"))) if status in (RUNNING, "") else None
    error = str(state.get("error", ""))
    runs: Sequence[RunRecord] = ()
    answers: Sequence[Any] = ()
    if (folder / METRICS_FILE).is_file():
        try:
            runs = read_run(folder)
            answers = read_answers(folder)
        except DareError as wrong:
            error = error or str(wrong)
    rows = [row for run in runs for row in run.rows]
    # In the order in which they were made: of the method that runs now last.
    rows.sort(key=lambda row: now is not None and row.method == now.method)
    lines = log_lines(folder)
    methods, planned = planned_methods(config), planned_rounds(config)
    said = _now_words(now, status, rows, lines)
    shown = without_paths(config)
    facts = page_facts(
        runs,
        title=f"Run {folder.resolve().name}",
        lead=f"{shown.get('model', 'a model')} on {shown.get('data', 'data')}; "
        f"{', '.join(title_of(m) for m in methods) or 'methods are not known yet'}.",
        answers=answers,
        now=now,
    )
    facts["cards"] = live_cards(runs, rows, config, now, status)
    facts["live"] = {
        "state": _state_words(folder, status, bool(lines)),
        "error": plain_line(error),
        "now": plain_line(said),
        "done": len(rows),
        "planned": planned * max(1, len(methods)),
        "log": "\n".join(lines),
    }
    return facts


def _state_words(folder: Path, status: str, log: bool) -> str:
    here = is_claimed(folder)
    if not status:
        return "starting" if here or log else "nothing has begun yet"
    if status == RUNNING and not here:
        # Its server is elsewhere, or was killed.
        return "running, as its folder says; no process of it is at work on this machine"
    return status


def _now_words(now: Now | None, status: str, rows: Sequence[RunRow], lines: Sequence[str]) -> str:
    if status not in (RUNNING, ""):
        return f"{len(rows)} rounds were finished" if rows else "no round was finished"
    told = [found[1] for line in lines[-3:] if (found := _WAITING.fullmatch(line))]
    if told:
        return told[-1]
    if now is None:
        return "before the first round" if status == RUNNING and not rows else ""
    total = f" of {now.rounds}" if now.rounds else ""
    return f"{title_of(now.method)}, round {now.round}{total}: {now.words()}"


def live_cards(
    runs: Sequence[RunRecord],
    rows: Sequence[RunRow],
    config: Mapping[str, Any],
    now: Now | None,
    status: str,
) -> list[dict[str, str]]:
    """Figures of the method that runs: round, measure, bytes of both ways, noise, time left."""
    planned = planned_rounds(config)
    last = rows[-1] if rows else None
    number = now.round if now is not None else last.round if last is not None else 0
    total = f" of {planned}" if planned else ""
    cards = [{"figure": f"{number}{total}" if number else "–", "text": "round"}]
    if last is None:
        return cards
    own = [row for row in rows if row.method == last.method]
    record = next(run for run in runs if run.method == last.method)
    measure = measure_of(runs)
    value = measure.last(record)
    cards.append(
        {
            "figure": "–" if value is None else measure.shown(value),
            "text": f"{measure.title.lower()}, {record.name}",
        }
    )
    up, down = (sum(getattr(row, f"{way}load_bytes") for row in own) for way in ("up", "down"))
    cards.append({"figure": human_bytes(up), "text": "up so far, by all clients"})
    cards.append({"figure": human_bytes(down), "text": "down so far, to all clients"})
    if last.noise_of_change is not None:
        cards.append(
            {"figure": f"{last.noise_of_change:.2g}×", "text": "noise of what was not sent, to "
             "the merged change"}
        )  # fmt: skip
    left = seconds_left(rows, config)
    if status == RUNNING and left:
        cards.append({"figure": f"about {human_seconds(left)}", "text": "left"})
    return cards


def live_line(facts: Mapping[str, Any]) -> str:
    """The facts of a page in one line, for a terminal."""
    live = facts["live"]
    state = live["state"] if live["state"] != RUNNING else ""
    error = live["error"] if live["error"] != state else ""
    words = [state, error, live["now"]]
    words += [f"{card['figure']} {card['text']}" for card in facts["cards"][1:]]
    return " · ".join(filter(None, words))


def log_lines(folder: Path) -> list[str]:
    """The end of a run's log, without the lines that carry measurements."""
    try:
        with (folder / LOG_FILE).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LOG_BYTES))
            lines = file.read(_LOG_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    if size > _LOG_BYTES:
        lines = lines[1:]  # cut
    plain = [plain_line(line).rstrip() for line in lines if not is_ours(line)]
    return [line[:_LOG_CHARACTERS] for line in plain if line][-_LOG_LINES:]
