"""The clients of a run's newest round: what each sent, who was left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dare_agg.runs.now import Now
from dare_agg.runs.rows import RunRow
from dare_agg.runs.words import human_bytes

CLIENT_COLUMNS = ("Client", "Examples", "Sent", "Of each value", "State")
_MOST_SHOWN = 200
_MOST_CHARACTERS = 200


def client_cells(row: RunRow | None, now: Now | None = None) -> list[dict[str, Any]]:
    """One object a client: ``cells`` under `CLIENT_COLUMNS`, ``share`` of the most examples.

    ``good`` is false where the client did not count. Whom ``now`` waits for is said of it.
    """
    waiting = dict.fromkeys(now.waiting, True) if now is not None else {}
    found: dict[str, dict[str, Any]] = {}
    sent: Sequence[Mapping[str, Any]] = row.by_client if row is not None else ()
    most = max((_number(one.get("examples")) or 0.0 for one in sent), default=0.0)
    for one in sent[:_MOST_SHOWN]:
        name, examples = str(one.get("client", "")), _number(one.get("examples"))
        p, nbytes = _number(one.get("p")), _number(one.get("bytes"))
        found[name] = {
            "cells": [
                name,
                "–" if examples is None else f"{examples:,.6g}",
                "–" if nbytes is None else human_bytes(nbytes),
                "–" if p is None else f"p = {p:.4g}, {one.get('values', '')}",
                _merged(one),
            ],
            "share": (examples or 0.0) / most if most else 0.0,
            "good": True,
        }
    for name, why in _left_out(row):
        state = why if len(why) <= _MOST_CHARACTERS else why[:_MOST_CHARACTERS] + "…"
        if name in found and found[name]["good"]:
            found[name]["cells"][-1] += f"; {state}"
            continue
        found[name] = {"cells": [name, "–", "–", "–", state], "share": 0.0, "good": False}
    for name in waiting:
        one = found.setdefault(name, {"cells": [name, "–", "–", "–", ""], "share": 0, "good": True})
        one["cells"][-1] = "waited for now"
        one["waited"] = True
    return list(found.values())


def _merged(one: Mapping[str, Any]) -> str:
    age = one.get("age")
    if type(age) is not int or age < 0:
        return "merged"
    return f"merged, {age} merge{'' if age == 1 else 's'} old"


def _left_out(row: RunRow | None) -> list[tuple[str, str]]:
    if row is None:
        return []
    said = []
    for what, entries in (
        ("rejected: ", row.rejected),
        ("not evaluated: ", row.evaluate_failed),
        ("turned away: ", row.refused),
    ):
        for one in entries:
            why = ": ".join(str(one[key]) for key in ("reason", "detail") if one.get(key))
            said.append((str(one.get("name") or f"client {one.get('client')}"), what + why))
    said += [(name, "away: it was online before") for name in row.away]
    said += [(name, "its weight was cut to the bound") for name in row.weights_cut]
    unheard = row.robust.get("unheard")
    if isinstance(unheard, list):
        said += [(str(name), "hardly heard by the robust rule") for name in unheard]
    return said


def _number(value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if fits and abs(value) < 1e18 else None
