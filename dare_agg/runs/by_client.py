"""What each client of a round sent: bytes, examples, drop rate and value format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of more clients than this a row tells sums alone.
MOST_CLIENTS = 512


def by_client(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One object for each client whose update counted, in the order of clients.

    ``measured`` are a round's measurements, as lists in that order. Of a buffer each has its "age",
    the merges since its client was asked. Empty for rounds that do not
    tell them all (secure sums), for private ones, where who took part is no one's business, and
    for rounds of more than `MOST_CLIENTS`.
    """
    names = measured.get("clients", ())
    columns = [
        measured.get(key, ())
        for key in ("update_bytes", "dense_bytes", "examples", "drop_rates", "values")
    ]
    whole = all(len(column) == len(names) for column in columns)
    if not whole or "privacy" in measured or len(names) > MOST_CLIENTS:
        return []
    rows = [
        {"client": name, "bytes": update + dense, "examples": examples, "p": p, "values": values}
        for name, update, dense, examples, p, values in zip(names, *columns, strict=True)
    ]
    ages = measured.get("buffer", {}).get("staleness", ())
    for row, age in zip(rows, ages, strict=False):
        row["age"] = age
    return rows
