"""Watching a run: what its log carries, a copy of its measurements elsewhere, Prometheus.

A server may run on another machine than whoever follows its log. So each row of measurements,
each state of the run and what it does right now also go into the log, one line of JSON behind a
mark, and `Mirror` makes the run folder of the follower from it: progress, report and resume work
there.

What clients say is in that log too. Each of our lines therefore carries the run's token, drawn
by the server, told in its first line before any client is asked anything, and never sent to one:
a line without it is talk.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import parse_json, read_json
from dare_agg.runs.now import NOW_FILE, now_text
from dare_agg.runs.rows import METRICS_FILE, STATE_FILE, RunRow, read_rows
from dare_agg.runs.variants import variants

_LINE = re.compile(r"dare-agg (row|state|now) ([0-9a-f]{16,64}) (\{.*)")


def row_line(row: RunRow, token: str) -> str:
    """The log line of a round's measurements, of the run with this token (hex)."""
    return f"dare-agg row {token} {json.dumps(row.values, allow_nan=False)}"


def state_line(state: Mapping[str, Any]) -> str:
    """The log line of the run's state, as run.json holds it; its ``token`` is the run's."""
    return f"dare-agg state {state['token']} {json.dumps(state)}"


def now_line(now: Mapping[str, Any], token: str) -> str:
    """The log line of what the run with this token does right now."""
    return f"dare-agg now {token} {json.dumps(now)}"


@dataclass
class Mirror:
    """Copies rows and states from log lines into ``folder``, unless they are written there.

    The folder is the server's own when its run.json has the token that the log names. The
    first state in the log gives the token that all further lines must have.
    """

    folder: Path
    _token: str = ""
    _foreign: bool = False

    def take(self, line: str) -> bool:
        """Read one log line; returns whether it was one of ours."""
        found = _LINE.search(line)
        if found is None:
            return False
        kind, token, text = found.groups()
        try:
            value = parse_json(text)
        except ValueError:  # cut off
            value = None
        if not self._token and kind == "state" and isinstance(value, dict):
            self._token = token
        if token != self._token:
            return False
        if isinstance(value, dict):
            {"state": self._state, "row": self._row, "now": self._now}[kind](value)
        return True

    def _state(self, state: dict[str, Any]) -> None:
        path = self.folder / STATE_FILE
        try:
            here = read_json(path).get("token")
        except (OSError, ValueError, AttributeError):
            here = None
        self._foreign = self._foreign or here != state.get("token")
        if self._foreign:
            replace_file(path, ((json.dumps(state, indent=1) + "\n").encode(),))

    def _row(self, row: dict[str, Any]) -> None:
        if not self._foreign:
            return
        path = self.folder / METRICS_FILE
        rows = read_rows(path, strict=False) if path.is_file() else []
        # A resumed run makes its last rounds again.
        kept = [old.values for old in rows if not _again(old, RunRow(row))]
        replace_file(path, ((json.dumps(one) + "\n").encode() for one in [*kept, row]))

    def _now(self, now: dict[str, Any]) -> None:
        if self._foreign:
            replace_file(self.folder / NOW_FILE, (now_text(self._token, now),))


def _again(old: RunRow, new: RunRow) -> bool:
    return old.method == new.method and old.round >= new.round


def is_ours(line: str) -> bool:
    """Whether a log line has the form of those that carry measurements."""
    return _LINE.search(line) is not None


def planned_methods(config: Mapping[str, Any]) -> list[str]:
    """The rows that a run compares, in order; empty where that is not known."""
    methods = config.get("methods")
    return [one.name for one in variants(config)] if _listed(methods) else []


def planned_rounds(config: Mapping[str, Any]) -> int:
    """Return how many rounds each method takes, 0 where that is unknown; a merge takes one."""
    rounds = config.get("num-rounds")
    return 1 if config.get("secure-merge") else rounds if type(rounds) is int else 0


def seconds_left(rows: Sequence[RunRow], config: Mapping[str, Any]) -> float | None:
    """Estimate the rest of a run from its last rounds; None before there is one.

    ``config`` is the run config (``num-rounds``, ``methods``). Rounds of one method are alike,
    those of another may not be: of methods that have not begun they count as those seen last.
    """
    planned = planned_rounds(config)
    if not rows or not planned:
        return None
    method = rows[-1].method
    later = max(0, len(planned_methods(config)) - len({row.method for row in rows}))
    left = max(0, planned - rows[-1].round) + planned * later
    return left * _usual_length([row for row in rows if row.method == method])


def _listed(methods: object) -> TypeGuard[Sequence[str]]:
    return isinstance(methods, list | tuple)


def _usual_length(rows: Sequence[RunRow]) -> float:
    """How long a round of one method takes, evaluation and waiting included, in seconds.

    The longest is left out, a client that is lost costs its round the whole deadline; so is the
    first once there are two others: the model travels as a whole and processes start.
    """
    lengths = [_length(row, before) for before, row in zip((None, *rows), rows, strict=False)]
    counted = sorted(lengths if len(lengths) < 3 else lengths[1:][-10:])
    return statistics.fmean(counted[:-1] or counted)


def _length(row: RunRow, before: RunRow | None) -> float:
    """From the end of the round before to the end of this one; ``round_seconds`` is training."""
    since = row.seconds - (before.seconds if before else 0.0)
    # In older runs the clock begins again where one was resumed.
    return max(row.round_seconds, since if since > 0 else row.seconds)


def rejections(row: RunRow) -> str:
    """Who does not count in a round and why: "north: late; south: signature"."""
    return "; ".join(
        f"{one.get('name') or one.get('client')}: {one.get('reason')}" for one in row.rejected
    )
