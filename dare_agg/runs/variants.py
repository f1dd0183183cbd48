"""What a run compares: its methods, and each drop rate and value format of those that have them.

``drop-rate = "0.9,0.99"`` and ``values = "b1,b4"`` are lists: each method that drops is run with
every pair of them, one after another, as rows of one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# They send every value whole, whatever the run config says.
WHOLE = ("fedavg", "head-only")
_MARK = "_"


@dataclass(frozen=True)
class Variant:
    """One row of a run: ``name`` stands in its rows and is that of its folders."""

    name: str
    method: str
    drop_rate: str
    values: str


def listed(value: Any) -> list[str]:
    """The words of a list written as one text."""
    return [word.strip() for word in str(value).split(",") if word.strip()]


def variants(config: Mapping[str, Any]) -> list[Variant]:
    """The rows of a run config, in the order in which they are run."""
    methods = config.get("methods")
    names = listed(methods) if isinstance(methods, str) else list(map(str, methods or ()))
    rates = listed(config.get("drop-rate", "")) or [""]
    formats = listed(config.get("values", "")) or [""]
    found = []
    for method in names:
        if method in WHOLE:
            found.append(Variant(method, method, rates[0], formats[0]))
            continue
        for rate in rates:
            for form in formats:
                marks = [f"p{rate.replace('/', '-of-')}"] if len(rates) > 1 else []
                marks += [form] if len(formats) > 1 else []
                found.append(Variant(_MARK.join([method, *marks]), method, rate, form))
    return found


def parts_of(name: str) -> tuple[str, str]:
    """A variant's method, and what tells it from its like, in words.

    >>> parts_of("dare-ties_p0.99_b1")
    ('dare-ties', 'p = 0.99, b1')
    """
    method, *marks = name.split(_MARK)
    words = [f"p = {m[1:].replace('-of-', '/')}" if m.startswith("p") else m for m in marks]
    return method, ", ".join(words)
