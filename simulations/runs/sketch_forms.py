"""Which form Gram matrices take in a secure sum: accuracy by words, on rows no other table reports.

``python -m simulations.runs.sketch_forms [--seeds 0 1]`` merges the four models of
``simulations/runs/secure_tasks.py`` by whole Gram matrices, by blocks of their diagonal, and by
sketches of some directions a party, exact in floating point, and measures them on 250 test rows a
task behind the 300 of the results. Rows are appended to ``simulations/results/sketch_forms.jsonl``;
those that are there are skipped. ``--table`` prints them as Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.merge.by_tensor import Matrix, read_matrix
from dare_agg.merge.directions import leading_directions
from dare_agg.merge.linears import Linear, model_linears
from dare_agg.secure.sketch import sketched
from dare_agg.secure.solved import RIDGE
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import array_source
from simulations.runs.rows import RESULTS, append_row, read_rows, versions
from simulations.runs.secure_tasks import TASKS, TUNE_STEPS, plain_merge, settings_of
from simulations.runs.sparsifiers import dare
from simulations.runs.tuned_tasks import TunedTasks, tuned_tasks

OUT = RESULTS / "sketch_forms.jsonl"
REPORTED, MORE = 300, 250
# (form, directions a party or columns of a block; 0: all), and the drop rate of the survivors.
FORMS: list[tuple[str, int, str]] = [
    ("ties", 0, "0"),
    ("whole", 0, "0.9"),
    ("blocks", 64, "0.9"),
    ("blocks", 128, "0.9"),
    ("sketch of whole", 8, "0.9"),
    ("sketch", 4, "0.9"),
    ("sketch", 8, "0.9"),
    ("sketch", 16, "0.9"),
    ("sketch", 8, "0.5"),
    ("sketch", 4, "0.99"),
    ("sketch", 8, "0.99"),
    ("sketch", 16, "0.99"),
]


def solved(
    linear: Linear, middle: Matrix, matrices: Sequence[Matrix], form: str, size: int, width: int
) -> Matrix:
    """The merged delta of a Linear by one form."""
    inputs = linear.shape[1]
    gram, right = np.zeros((inputs, inputs)), np.zeros(linear.shape)
    for matrix in matrices:
        rows = leading_directions(matrix, size) if form == "sketch" else matrix
        norm = np.sqrt(np.square(rows).sum())
        if not norm > 0:
            continue
        own = rows.T @ rows / norm**2
        if form == "blocks":
            block = np.arange(inputs) // size
            own *= block[:, None] == block[None]
        gram += own
        right += matrix @ own
    if not np.trace(gram) > 0:
        return middle
    if form == "sketch of whole" and width < inputs:
        rng = np.random.default_rng(inputs)
        signs = rng.choice([-1.0, 1.0], (inputs, width)) / np.sqrt(inputs)
        y, z = gram @ signs, right @ signs
        sizes, vectors = np.linalg.eigh(signs.T @ y)
        kept = sizes > 1e-6 * sizes[-1]
        basis, roots, _ = np.linalg.svd(
            y @ (vectors[:, kept] / np.sqrt(sizes[kept])), full_matrices=False
        )
        mapped = np.linalg.lstsq((basis.T @ signs).T, z.T)[0].T
        ridge = RIDGE * np.trace(gram) / inputs
        left = (mapped - middle @ basis * roots**2) / (roots**2 + ridge)
        return middle + left @ basis.T
    total = gram + RIDGE * np.trace(gram) / inputs * np.eye(inputs)
    return middle + np.linalg.solve(total, (right - middle @ gram).T).T


def words_of(form: str, size: int, linears: Sequence[Linear], widths: Sequence[int]) -> int:
    """Words a party adds beside its survivors."""
    if form in ("sketch", "sketch of whole"):
        return sum(sum(one.shape) * width for one, width in zip(linears, widths, strict=True))
    if form == "ties":
        return 0
    found = 0
    for one in linears:
        outputs, inputs = one.shape
        found += outputs * inputs + inputs * ((size or inputs) + 1) // 2
    return found


def run_seed(seed: int, missing: Sequence[tuple[str, int, str]]) -> None:
    """Measure the forms of one seed that are missing."""
    from simulations.runs.federated import build

    settings = {name: settings_of(name, TUNE_STEPS) for name in TASKS}
    tuned = tuned_tasks(settings, seed)
    layout, start, deltas = tuned.layout, tuned.start, list(tuned.deltas.values())
    more = {name: build({**settings[name], "test_rows": REPORTED + MORE}, seed) for name in TASKS}
    linears = list(model_linears(layout).values())
    for form, size, rate in missing:
        began = time.process_time()
        exact = parse_drop_rate(rate)
        mask = Mask("stratified", layout.size, exact, derive_key(seed_secret(seed), "forms"))
        kept = [dare(delta, mask) for delta in deltas]
        widths = [one.width for one in sketched(layout, max(size, 1), len(deltas))]
        if form == "ties":
            merged = plain_merge(layout, kept, "ties", 1.0, 1.0)
        else:
            merged = np.mean(kept, axis=0)
            for linear, width in zip(linears, widths, strict=True):
                entry = linear.entry
                sources = [array_source(delta) for delta in (merged, *deltas)]
                middle, *own = (read_matrix(s, entry, 0, linear.transposed) for s in sources)
                found = solved(linear, middle, own, form, size, width)
                found = found.T if linear.transposed else found
                merged[entry.offset : entry.stop] = found.reshape(-1)
        scores = score(tuned, start + merged, more)
        append_row(
            OUT,
            {
                "form": form,
                "size": size,
                "drop_rate": rate,
                "seed": seed,
                "words": exact.survivors(layout.size) + words_of(form, size, linears, widths),
                "accuracies": scores,
                "accuracy": round(mean(scores.values()), 4),
                "cpu_seconds": round(time.process_time() - began, 1),
                "versions": versions(),
            },
        )
        print(f"{form} {size} p={rate}, seed {seed}", file=sys.stderr)


def score(tuned: TunedTasks, body: FloatVector, more: dict[str, Any]) -> dict[str, float]:
    """Accuracy of each task on the rows behind those that are reported."""
    again, found = replace(tuned, tasks=more), {}
    for name, task in more.items():
        found |= again.scores(body, (name,), np.arange(REPORTED, len(task.test_rows)))
    return found


def table() -> str:
    """The forms with their words and accuracies, seeds averaged."""
    text = "| form | p | words, millions | accuracy |\n|---|---|---:|---:|\n"
    found = read_rows(OUT)
    for form, size, rate in FORMS:
        key = (form, size, rate)
        rows = [r for r in found if (r["form"], r["size"], r["drop_rate"]) == key]
        if rows:
            scores = " / ".join(f"{100 * r['accuracy']:.1f}" for r in rows)
            name = f"{form} {size}" if size else form
            text += f"| {name} | {rate} | {rows[0]['words'] / 1e6:.2f} | {scores} |\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.runs.sketch_forms", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--table", action="store_true", help="print the results, run nothing")
    options = parser.parse_args()
    if options.table:
        print(table())
        return 0
    done = {(r["form"], r["size"], r["drop_rate"], r["seed"]) for r in read_rows(OUT)}
    for seed in options.seeds:
        missing = [form for form in FORMS if (*form, seed) not in done]
        if missing:
            run_seed(seed, missing)
    return 0


if __name__ == "__main__":
    sys.exit(main())
