"""How rows are divided among simulated clients: IID, Dirichlet by label, or by a column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError

Indices = NDArray[np.int64]


def iid(count: int, clients: int, seed: int) -> list[Indices]:
    """Shuffle rows 0 … count − 1 and cut them into ``clients`` equal parts."""
    order = np.random.default_rng(np.random.SeedSequence([seed, 10])).permutation(count)
    return [np.sort(part) for part in np.array_split(order, clients)]


def dirichlet(
    labels: NDArray[np.int64], clients: int, alpha: float, seed: int, *, least: int = 10
) -> list[Indices]:
    """Give each client its own mixture of labels, shares drawn from Dirichlet(alpha).

    Draws again, with the next seed, until every client has at least ``least`` rows (Hsu et
    al., arXiv 1909.06335). Raises `ConfigError` when that cannot be.
    """
    if (drawn := _drawn(labels, clients, alpha, seed, least)) is not None:
        return drawn
    # Ten clients are the default, so a number that fits is found and told.
    most = min(clients // 2, labels.size // least)
    while most > 1 and _drawn(labels, most, alpha, seed, least) is None:
        most //= 2
    if labels.size < clients * least:
        why = f"{labels.size} rows for {clients} clients; at least {least} each are needed"
        raise ConfigError(why + _fewer(most))
    raise ConfigError(
        f"no Dirichlet({alpha}) partition over {clients} clients gives each {least} rows; raise "
        f"alpha{_fewer(most, ' or ')}"
    )


def _drawn(
    labels: NDArray[np.int64], clients: int, alpha: float, seed: int, least: int
) -> list[Indices] | None:
    """The first draw in which each client has ``least`` rows; None where a thousand have not."""
    if labels.size < clients * least:
        return None
    for attempt in range(1000):
        rng = np.random.default_rng(np.random.SeedSequence([seed, 11, attempt]))
        parts: list[list[Indices]] = [[] for _ in range(clients)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(clients, alpha))
            cuts = (np.cumsum(shares)[:-1] * rows.size).astype(np.int64)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        whole = [np.sort(np.concatenate(part)) for part in parts]
        if min(part.size for part in whole) >= least:
            return whole
    return None


def _fewer(most: int, link: str = "; ") -> str:
    return f"{link}lower the number of clients, such as --clients {most}" if most else ""


def by_column(groups: Sequence[str], clients: int) -> list[Indices]:
    """Give each client whole groups (authors, sites): the largest group goes to the emptiest."""
    values, inverse = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(values) < clients:
        raise ConfigError(
            f"the partition column has {len(values)} values for {clients} clients"
            + _fewer(len(values))
            + ", or choose another column"
        )
    sizes = np.bincount(inverse)
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    load = np.zeros(clients, np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        target = int(np.argmin(load))
        parts[target].append(np.flatnonzero(inverse == group))
        load[target] += sizes[group]
    return [np.sort(np.concatenate(part)) for part in parts]


def hold_out(
    rows: Indices, held: float, seed: Sequence[int], *, word: str = "held-out"
) -> tuple[Indices, Indices]:
    """Divide a client's rows into those it trains on and those it is evaluated on.

    ``held`` below 1 is a share (of at least one row), else a number of rows; 0 holds none out.
    ``word`` is the run config's for it. Raises `ConfigError` where no row would be left to train
    on.
    """
    if not held:
        return rows, np.empty(0, np.int64)
    count = max(1, round(held * len(rows))) if held < 1 else int(held)
    if count >= len(rows):
        raise ConfigError(
            f"{word} = {held:g} takes all {len(rows)} rows of a client; lower it, or use fewer "
            "clients or more data"
        )
    order = np.random.default_rng(np.random.SeedSequence([*seed, 40])).permutation(rows)
    return np.sort(order[count:]), np.sort(order[:count])


def partition(
    rule: str,
    labels: NDArray[np.int64],
    groups: Sequence[str],
    clients: int,
    *,
    alpha: float = 0.5,
    seed: int = 0,
) -> list[Indices]:
    """Divide rows by the rule "iid", "dirichlet" or "column"."""
    if clients < 1:
        raise ConfigError(f"{clients} clients; at least 1 is needed")
    if rule == "iid":
        return iid(labels.size, clients, seed)
    if rule == "dirichlet":
        return dirichlet(labels, clients, alpha, seed)
    if rule == "column":
        return by_column(groups, clients)
    raise ConfigError(f"partition {rule!r} is unknown; known: iid, dirichlet, column")
