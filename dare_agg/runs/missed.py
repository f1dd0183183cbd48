"""Which clients did not count in a run (rejected, lost, away), how often, and why first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dare_agg.runs.rows import RunRow

MISSED_TITLE = "Clients that were rejected or lost"
MISSED_COLUMNS = ("Client", "Rounds", "First", "Why, the first time")
_MOST_CHARACTERS = 200


@dataclass
class Missed:
    """A client of a run, the rounds (method, number) it did not count in, and why first."""

    client: str
    why: str
    rounds: dict[tuple[str, int], None] = field(default_factory=dict)


def missed_clients(rows: Sequence[RunRow]) -> list[Missed]:
    """One entry a client that did not count in some round, the most frequent first."""
    found: dict[str, Missed] = {}
    for row in rows:
        for client, why in _missed_in(row):
            one = found.setdefault(client, Missed(client, why))
            one.rounds[(row.method, row.round)] = None
    return sorted(found.values(), key=lambda one: -len(one.rounds))


def _missed_in(row: RunRow) -> Iterator[tuple[str, str]]:
    for what, entries in (
        ("", row.rejected),
        ("evaluation: ", row.evaluate_failed),
        ("turned away: ", row.refused),
    ):
        for one in entries:
            why = [str(one[key]) for key in ("reason", "detail") if one.get(key)]
            name = str(one.get("name") or f"client {one.get('client')}")
            yield name, what + ": ".join(why)
    for name in row.away:
        yield name, "away: it was online before, and no more"


def missed_cells(rows: Sequence[RunRow]) -> list[tuple[str, str, str, str]]:
    """`missed_clients` as the rows of a table under `MISSED_COLUMNS`."""
    several = len({row.method for row in rows}) > 1
    cells = []
    for one in missed_clients(rows):
        method, number = next(iter(one.rounds))
        first = f"{method}, round {number}" if several else f"round {number}"
        why = one.why if len(one.why) <= _MOST_CHARACTERS else f"{one.why[:_MOST_CHARACTERS]}…"
        cells.append((one.client, f"{len(one.rounds)} of {len(rows)}", first, why))
    return cells
