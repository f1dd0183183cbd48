"""The tables of docs/ROBUST.md: ``python -m simulations.pages.robust`` writes them in place."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations.pages.tables import shown as of_shares
from simulations.runs.attacks import ATTACKS
from simulations.runs.flower_rules import FLOWER_RULES
from simulations.runs.rows import RESULTS, read_rows

PAGE = Path(__file__).parents[2] / "docs" / "ROBUST.md"
MARKS = {
    "robust": ("<!-- tables -->", "<!-- end -->"),
    "robust-strong": ("<!-- strong -->", "<!-- strong end -->"),
    "robust-groups": ("<!-- groups -->", "<!-- groups end -->"),
}
DEFAULT = "norm-bound+nnm+trimmed-mean"
Cell = tuple[int, int, str, str]
Losses = dict[str, list[Mapping[str, Any]]]


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def by_cell(rows: Iterable[Mapping[str, Any]]) -> dict[Cell, dict[str, list[Mapping[str, Any]]]]:
    """Rows by (n, f, drop rate, rule), then by attack."""
    found: dict[Cell, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["n"], row["f"], row["drop_rate"], row["rule"])
        found[key][row["attack"]].append(row)
    return found


def lost(rows: Sequence[Mapping[str, Any]]) -> float:
    """Points lost against the plain mean without an attack, mean of the seeds."""
    return 100 * mean([row["clean"] - row["accuracy"] for row in rows])


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page's tables as Markdown, of the attacks that were run."""
    cells = by_cell(rows)
    met = {attack for of_cell in cells.values() for attack in of_cell}
    attacks = [attack for attack in ATTACKS if attack in met]
    head = "| n, f | p | rule | seeds | mean | own masks | " + " | ".join(attacks) + " | worst |"
    lines = [head, "|---|---|---|---|---:|---:|" + "---:|" * (len(attacks) + 1)]
    for (n, f, rate, rule), of_cell in sorted(cells.items(), key=_order):
        every = [row for of_attack in of_cell.values() for row in of_attack]
        losses = {attack: lost(found) for attack, found in of_cell.items()}
        shown = [f"{losses[a]:.1f}" if a in losses else "–" for a in attacks]
        last = _worst(of_cell)
        clean, own = (100 * mean([row[k] for row in every]) for k in ("clean", "clean_rotated"))
        counts = [len({row["seed"] for row in found}) for found in of_cell.values()]
        seeds = str(min(counts)) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        lines.append(
            f"| {n}, {f} | {rate} | `{rule}` | {seeds} | {clean:.1f} | {own:.1f} | "
            f"{' | '.join(shown)} | {last} |"
        )
    opened = [
        f"p = {rate}: {100 * mean([row['backdoor'] for row in found['backdoor']]):.0f} %"
        for (n, f, rate, rule), found in sorted(cells.items())
        if rule == DEFAULT and (n, f) == (10, 2) and "backdoor" in found
    ]
    said = (
        f"The backdoor opens all the same: {', '.join(opened)} of stamped digits." if opened else ""
    )
    return "\n".join([*lines, "", f"{len(rows)} runs. {said}".strip()])


def strong(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of stronger attacks: what each rule lost, by label skew and number of clients."""
    kept = [row for row in rows if row["attack"] in ATTACKS]
    found: dict[tuple[Any, ...], Losses] = defaultdict(lambda: defaultdict(list))
    for row in kept:
        found[(row["n"], row["f"], -row["settings"]["alpha"], row["rule"])][row["attack"]].append(
            row
        )
    attacks = [a for a in ATTACKS if any(a in of for of in found.values())]
    lines = ["| Dirichlet | n, f | rule | seeds | mean | " + " | ".join(attacks) + " | worst |"]
    lines.append("|---|---|---|---|---:|" + "---:|" * (len(attacks) + 1))
    for (n, f, alpha, rule), of in sorted(found.items(), key=_default_first):
        shown, worst, seeds, clean = _losses(of, attacks)
        lines.append(
            f"| {-alpha:g} | {n}, {f} | `{rule}` | {seeds} | {clean:.1f} | {shown} | {worst} |"
        )
    return "\n".join([*lines, "", f"{len(kept)} runs."])


def groups(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of rules over groups: what was lost, by numbers of clients, liars and groups."""
    found: dict[tuple[Any, ...], Losses] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["n"], row["f"], row["groups"], row["division"])
        found[key][row["attack"]].append(row)
    attacks = [a for a in ATTACKS if any(a in of for of in found.values())]
    lines = ["| n | f | groups | of | division | seeds | mean | " + " | ".join(attacks)]
    lines[0] += " | worst |"
    lines.append("|---:|---:|---:|---|---|---|---:|" + "---:|" * (len(attacks) + 1))
    for (n, f, count, division), of in sorted(found.items()):
        shown, worst, seeds, clean = _losses(of, attacks)
        size = f"{n // count}" if n % count == 0 else f"{n // count} to {n // count + 1}"
        lines.append(
            f"| {n} | {f} | {count} | {size} | {division} | {seeds} | {clean:.1f} | {shown} | "
            f"{worst} |"
        )
    return "\n".join([*lines, "", f"{len(rows)} runs."])


def _losses(of: Losses, attacks: Sequence[str]) -> tuple[str, str, str, float]:
    """A row's cells of attacks, its worst, its seeds and the plain mean's accuracy in %."""
    losses = {attack: lost(found) for attack, found in of.items()}
    shown = " | ".join(f"{losses[a]:.1f}" if a in losses else "–" for a in attacks)
    counts = sorted({len({row["seed"] for row in found}) for found in of.values()})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    clean = 100 * mean([row["clean"] for found in of.values() for row in found])
    return shown, _worst(of), seeds, clean


def _worst(of: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What the worst attack took, with its interval over the seeds where there are several."""
    attacks = [attack for attack in of if attack != "none"]
    if not attacks:
        return "–"
    rows = of[max(attacks, key=lambda attack: lost(of[attack]))]
    figure = of_shares([row["clean"] - row["accuracy"] for row in rows])
    return f"**{figure}**"


def _default_first(item: tuple[tuple[Any, ...], Any]) -> tuple[Any, ...]:
    (n, f, alpha, rule), _ = item
    return n, f, alpha, rule != DEFAULT, rule


def _order(item: tuple[Cell, Any]) -> tuple[Any, ...]:
    (n, f, rate, rule), _ = item
    return n, f, rule != DEFAULT, rule in FLOWER_RULES, rule, rate


def main() -> None:
    """Put the tables between the page's marks."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    page = PAGE.read_text(encoding="utf-8")
    makers = {"robust": tables, "robust-strong": strong, "robust-groups": groups}
    for name, (begin, end) in MARKS.items():
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        text = makers[name](read_rows(RESULTS / f"{name}.jsonl"))
        page = f"{before}{begin}\n{text}\n{end}{after}"
        print(text, end="\n\n")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
