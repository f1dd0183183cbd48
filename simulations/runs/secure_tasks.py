"""Four parties, four tasks, one encoder: secure sums beside plain merging.

``python -m simulations.runs.secure_tasks [--limit N] [--kind rounds]`` tunes each task once (kept
in the cache), merges the encoders in one shot and over ten rounds, each party with its own
local head, and appends to ``simulations/results/secure_tasks.jsonl``; rows that are there are
skipped, so a run that was cut off goes on. ``--table`` prints the rows as Markdown.

The secure rows go through the whole protocol, message by message. Beside each stands the
plain merge of the same survivors in floating point, and the merge with masks of each
party's own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dare_agg.codec.derive import Keystream, derive_key, seed_secret
from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.merge.by_tensor import read_matrix
from dare_agg.merge.directions import directions_of, leading_directions
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.secure import Identity, LocalSum, make_roster, secure_sum
from dare_agg.secure.aggregate import MAX_BITS
from dare_agg.secure.aggregates import SECURE_METHODS
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.sketch import sketch_of
from dare_agg.secure.stream import packed_bytes
from dare_agg.vectors.layout import FloatVector, Layout, fingerprint
from dare_agg.vectors.sources import array_source
from simulations.runs.rows import RESULTS, append_row, read_rows, versions
from simulations.runs.sparsifiers import dare

OUT = RESULTS / "secure_tasks.jsonl"
TASKS = {
    "Reuters R8": "reuters-r8",
    "election author": "election",
    "Rotten Tomatoes": "rotten-tomatoes",
    "SMS spam": "sms",
}
COMMON = {"length": 24, "batch": 16, "learning_rate": 2e-4, "precision": "bfloat16"}
TUNE_STEPS, ROUND_STEPS, ROUNDS = 80, 3, 10
TRAIN_ROWS, TEST_ROWS = 1000, 300
METHODS = {"task-arithmetic": 0.5, "ties": 1.0}
# In one shot alone; directions of each Linear that a party adds.
SCALINGS = {**METHODS, "wudi": 1.0}
DIRECTIONS = 8
CLIP, BITS = 0.02, 16


def rows(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of the table: each names everything that decides its result."""
    found: list[dict[str, Any]] = []
    for seed in seeds:
        for method in METHODS:
            for rate in ("0", "0.5", "0.9"):
                found.append({"kind": "one-shot", "method": method, "drop_rate": rate})
                found[-1]["seed"] = seed
        for rate in ("0.9", "0.99", "0"):
            found.append({"kind": "one-shot", "method": "wudi", "drop_rate": rate, "seed": seed})
        for rate, masks in (("0.9", "secure"), ("0", "plain"), ("0.9", "independent")):
            for method in METHODS:
                found.append(
                    {"kind": "rounds", "method": method, "drop_rate": rate, "masks": masks}
                )
                found[-1]["seed"] = seed
    return found


def settings_of(name: str, steps: int) -> dict[str, Any]:
    return {
        "data": TASKS[name],
        "train_rows": TRAIN_ROWS,
        "test_rows": TEST_ROWS,
        "steps": steps,
        **COMMON,
    }


def seeded_random(seed: int) -> Callable[[int], bytes]:
    """Reproducible bytes in place of the system's, so that a row can be made again."""
    stream = Keystream(derive_key(seed_secret(seed), "secure tasks"))
    at = 0

    def read(count: int) -> bytes:
        nonlocal at
        at += count
        return stream.read(at - count, count).tobytes()

    return read


def secure_merge(
    deltas: Sequence[FloatVector], base: str, layout: Layout, row: dict[str, Any], number: int
) -> LocalSum:
    """Merge by the protocol; party i of the roster holds ``deltas[i]`` by key order."""
    random = seeded_random(1000 * row["seed"] + number)
    identities = [Identity(name, random(32)) for name in TASKS]
    roster = make_roster("four tasks", [(i.name, i.public) for i in identities])
    by_id = {roster.id_of(i.public): i for i in identities}
    held = {roster.id_of(i.public): d for i, d in zip(identities, deltas, strict=True)}
    grams = row["method"] == "wudi"
    settings = SecureSettings(
        row["method"],
        drop_rate=row["drop_rate"],
        bits=0 if grams else BITS,
        clip=CLIP,
        directions=DIRECTIONS,
    )
    terms = settings.terms(
        run="secure-tasks",
        round_number=number,
        roster=roster,
        cohort=list(by_id),
        base=base,
        layout=layout.fingerprint,
        size=layout.size,
        model=layout,
    )

    def values(party: int, mask: Mask) -> FloatVector:
        survivors = mask.gather(held[party])
        if not grams:
            return survivors
        return np.concatenate([survivors, sketch_of(terms.sketch_plan(layout), held[party])])

    return secure_sum(terms, roster, by_id, values, random=random)


def plain_merge(
    layout: Layout, deltas: Sequence[FloatVector], method: str, scaling: float, keep: float
) -> FloatVector:
    """Merge in floating point, without trim; ``keep`` below 1 counts the expected entries."""
    options: dict[str, Any] = {}
    if method == "ties":
        options = {"density": 1.0, "normalize": "expected" if keep < 1 else "agreeing"}
    merged, _ = merge_deltas(
        layout,
        [array_source(delta) for delta in deltas],
        method,
        scaling=scaling,
        options=options,
        keep=[keep] * len(deltas),
    )
    return merged


def plain_wudi(layout: Layout, deltas: Sequence[FloatVector]) -> FloatVector:
    """The merge of whole deltas by as many directions as a party adds, in floating point."""
    sources = [array_source(delta) for delta in deltas]
    linears = model_linears(layout)
    statistics = [
        {name: rows for name, rows, _ in directions_of(source, linears, DIRECTIONS)}
        for source in sources
    ]
    return merge_deltas(layout, sources, "wudi", statistics=statistics, measure=False)[0]


def shown(layout: Layout, result: LocalSum, deltas: Sequence[FloatVector]) -> dict[str, float]:
    """What the sums of Gram matrices show of single parties, as a server would read them.

    ``cosine`` is that of a sum's leading eigenvector with the nearest party's leading direction,
    ``output`` of what the sums say this direction is mapped to with what that party maps it to,
    and ``kept`` the share of a party's change of Linears (squares) that lies in its directions;
    means over Linears, and parties.
    """
    terms, behind = result.terms, result.terms.survivors + result.terms.dense
    plan = terms.sketch_plan(layout)
    sums = result.sums.total[behind : terms.values] * (terms.clip / terms.quantiser.top)
    cosines, outputs, kept = [], [], []
    for one, grams, values in plan.parts():
        linear, signs = one.linear, plan.signs(one)
        y = sums[grams].reshape(-1, one.width) / plan.unit(one)
        core = signs.T @ y
        sizes, vectors = np.linalg.eigh((core + core.T) / 2)
        few = sizes > 1e-4 * sizes[-1]
        basis, _, _ = np.linalg.svd(
            y @ (vectors[:, few] / np.sqrt(sizes[few])), full_matrices=False
        )
        mapped = np.linalg.lstsq((basis.T @ signs).T, sums[values].reshape(-1, one.width).T)[0].T
        best = (0.0, 0.0)
        for delta in deltas:
            matrix = read_matrix(array_source(delta), linear.entry, 0, linear.transposed)
            rows = leading_directions(matrix, terms.directions)
            if not len(rows):
                continue
            kept.append(float(np.square(rows).sum() / np.square(matrix).sum()))
            first = rows[0] / np.linalg.norm(rows[0])
            out = matrix @ first
            cosine = float(abs(first @ basis[:, 0]))
            same = float(abs(out @ mapped[:, 0]) / np.linalg.norm(out))
            best = max(best, (cosine, same / float(np.linalg.norm(mapped[:, 0]))))
        cosines.append(best[0])
        outputs.append(best[1])
    return {
        "cosine": round(float(np.mean(cosines)), 4),
        "output": round(float(np.mean(outputs)), 4),
        "kept": round(float(np.mean(kept)), 4),
    }


def one_shot(row: dict[str, Any]) -> dict[str, Any]:
    """Merge four tuned models; accuracy of each task with its own head."""
    from simulations.runs.tuned_tasks import tuned_tasks

    tuned = tuned_tasks({name: settings_of(name, TUNE_STEPS) for name in TASKS}, row["seed"])
    layout, start, deltas = tuned.layout, tuned.start, list(tuned.deltas.values())
    method, scaling = row["method"], SCALINGS[row["method"]]
    rate = parse_drop_rate(row["drop_rate"])

    def score(delta: FloatVector, only: str = "") -> dict[str, float]:
        return tuned.scores(start + delta, (only,) if only else None)

    began = time.process_time()
    result = secure_merge(deltas, fingerprint(layout, start), layout, row, 0)
    secure, measured = result.merged(SECURE_METHODS[method].rule, scaling, layout)
    seconds = time.process_time() - began
    found: dict[str, Any] = {
        "lone_share": measured.lone_share,
        "clipped_share": measured.clipped_share,
        "secure_cpu_seconds": round(seconds, 1),
        "word_bits": result.terms.quantiser.word_bits,
        "words": result.terms.words,
        "vector_bytes": packed_bytes(result.terms.words, result.terms.quantiser.word_bits),
    }
    if method == "wudi":
        found["directions"] = result.terms.directions
        found["shown"] = shown(layout, result, deltas)
        found["accuracies"] = {"secure": score(secure)}
        if row["drop_rate"] == "0":
            plain = plain_wudi(layout, deltas)
            found["relative_error"] = float(np.linalg.norm(secure - plain) / np.linalg.norm(plain))
        return found
    shared = [dare(delta, result.mask) for delta in deltas]
    same = plain_merge(layout, shared, method, scaling, 1.0)
    accuracies = {"secure": score(secure), "plain, same mask": score(same)}
    error = float(np.linalg.norm(secure - same) / np.linalg.norm(same))
    if row["drop_rate"] != "0":
        keys = [derive_key(seed_secret(row["seed"]), "mask", i) for i in range(len(deltas))]
        own = [
            dare(delta, Mask("stratified", layout.size, rate, key))
            for delta, key in zip(deltas, keys, strict=True)
        ]
        accuracies["plain, own masks"] = score(plain_merge(layout, own, method, scaling, rate.keep))
    if row["drop_rate"] == "0" and method == "task-arithmetic":
        accuracies["tuned alone"] = {
            name: score(delta, name)[name] for name, delta in tuned.deltas.items()
        }
        accuracies["base"] = score(np.zeros_like(start))
    return {"accuracies": accuracies, "relative_error": error, **found}


def rounds(row: dict[str, Any]) -> dict[str, Any]:
    """Train and merge over rounds: each party its own task and head, one common encoder."""
    from simulations.runs.federated import build
    from simulations.runs.single import body_layout

    tasks = [build(settings_of(name, ROUND_STEPS), 0) for name in TASKS]
    states = [task.initial_state() for task in tasks]
    layout = body_layout(states[0])
    body = layout.flatten(states[0])
    heads = [{n: a for n, a in s.items() if n not in layout} for s in states]
    method, scaling = row["method"], METHODS[row["method"]]
    rate = parse_drop_rate(row["drop_rate"])
    lone, curve = [], []
    for number in range(1, ROUNDS + 1):
        deltas = []
        for party, task in enumerate(tasks):
            state = {**layout.unflatten(body), **heads[party]}
            tuned, _, _ = task.train(
                state, np.arange(len(task.train_rows)), seed=(row["seed"], number, party)
            )
            heads[party] = {n: a for n, a in tuned.items() if n not in layout}
            deltas.append(layout.flatten(tuned) - body)
        if row["masks"] == "secure":
            result = secure_merge(deltas, fingerprint(layout, body), layout, row, number)
            step, measured = result.merged(SECURE_METHODS[method].rule, scaling)
            lone.append(measured.lone_share)
        else:
            if row["masks"] == "independent":
                secret = seed_secret(row["seed"])
                keys = [derive_key(secret, "mask", number, i) for i in range(len(deltas))]
                deltas = [
                    dare(delta, Mask("stratified", layout.size, rate, key))
                    for delta, key in zip(deltas, keys, strict=True)
                ]
            step = plain_merge(layout, deltas, method, scaling, rate.keep)
        body = body + step
        if number in (5, ROUNDS):
            accuracies = {
                name: round(task.evaluate({**layout.unflatten(body), **head})["accuracy"], 4)
                for name, task, head in zip(TASKS, tasks, heads, strict=True)
            }
            curve.append({"round": number, "accuracies": accuracies})
    return {"curve": curve, "lone_share": lone[-1] if lone and lone[-1] is not None else None}


def run(seeds: Sequence[int], kind: str, limit: int, method: str = "", rate: str = "") -> int:
    names = ("kind", "method", "drop_rate", "masks", "seed")
    done = {tuple(r.get(n) for n in names) for r in read_rows(OUT)}
    missing = [
        r
        for r in rows(seeds)
        if kind in ("", r["kind"])
        and method in ("", r["method"])
        and rate in ("", r["drop_rate"])
        and tuple(r.get(n) for n in names) not in done
    ]
    for row in missing[: limit or None]:
        began = time.process_time()
        measured = one_shot(row) if row["kind"] == "one-shot" else rounds(row)
        append_row(
            OUT,
            {
                **row,
                **measured,
                "cpu_seconds": round(time.process_time() - began, 1),
                "settings": {
                    **COMMON,
                    "bits": MAX_BITS if row["method"] == "wudi" else BITS,
                    "clip": CLIP,
                    "rows": TRAIN_ROWS,
                },
                "versions": versions(),
            },
        )
        print(f"{row['kind']} {row['method']} p={row['drop_rate']}", file=sys.stderr)
    return 0


def table() -> str:
    """The results as two Markdown tables, seeds averaged."""
    found = read_rows(OUT)
    names = list(TASKS)
    head = f"| merge | p | how | seeds | {' | '.join(names)} | mean |\n"
    head += "|---|---|---|---|" + "---|" * (len(names) + 1) + "\n"

    def line(method: str, rate: str, how: str, scores: Sequence[dict[str, float]]) -> str:
        means = [float(np.mean([s[name] for s in scores])) for name in names]
        cells = " | ".join(f"{m:.3f}" for m in [*means, float(np.mean(means))])
        return f"| {method} | {rate} | {how} | {len(scores)} | {cells} |\n"

    text = "One shot:\n\n" + head
    groups: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for row in found:
        if row["kind"] == "one-shot":
            for how, scores in row["accuracies"].items():
                groups.setdefault((row["method"], row["drop_rate"], how), []).append(scores)
    for key in sorted(groups, key=lambda k: (k[2] not in ("base", "tuned alone"), k)):
        alone = key[2] in ("base", "tuned alone")
        text += line("–" if alone else key[0], "–" if alone else key[1], key[2], groups[key])
    text += "\n" + _by_seed(found)
    text += f"\nAfter {ROUNDS} rounds:\n\n" + head
    groups = {}
    for row in found:
        if row["kind"] == "rounds":
            key = (row["method"], row["drop_rate"], row["masks"])
            groups.setdefault(key, []).append(row["curve"][-1]["accuracies"])
    for key in sorted(groups):
        text += line(*key, groups[key])
    return text


def _by_seed(found: Sequence[dict[str, Any]]) -> str:
    """Secure one-shot merges on the seeds that all of them have, with bytes and what sums show."""
    secure = [r for r in found if r["kind"] == "one-shot" and r["method"] in ("ties", "wudi")]
    kinds = sorted({(r["method"], r["drop_rate"]) for r in secure})
    text = (
        "| merge | p | MB a party | mean of the tasks, by seed | cosine, output, kept | error |\n"
    )
    text += "|---|---|---:|---|---|---|\n"
    for method, rate in kinds:
        rows = [r for r in secure if (r["method"], r["drop_rate"]) == (method, rate)]
        means = [float(np.mean([*r["accuracies"]["secure"].values()])) for r in rows]
        size = next((f"{r['vector_bytes'] / 1e6:.1f}" for r in rows if "vector_bytes" in r), "–")
        shows = [[*r["shown"].values()] for r in rows if "shown" in r]
        show = ", ".join(f"{v:.2f}" for v in np.mean(shows, axis=0)) if shows else "–"
        errors = [r["relative_error"] for r in rows if "relative_error" in r]
        scores = " / ".join(f"{m:.3f}" for m in means) + f" → {np.mean(means):.3f}"
        error = f"{max(errors):.1e}" if errors else "–"
        text += f"| {method} | {rate} | {size} | {scores} | {show} | {error} |\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.runs.secure_tasks", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--kind", choices=["one-shot", "rounds"], default="", help="these alone")
    parser.add_argument("--method", choices=sorted(SCALINGS), default="", help="this one alone")
    parser.add_argument("--drop-rate", default="", help="this one alone")
    parser.add_argument("--limit", type=int, default=0, help="rows at most (0: all)")
    parser.add_argument("--table", action="store_true", help="print the results, run nothing")
    options = parser.parse_args()
    if options.table:
        print(table())
        return 0
    return run(options.seeds, options.kind, options.limit, options.method, options.drop_rate)


if __name__ == "__main__":
    sys.exit(main())
