"""What one client's plain update tells the server, on the real encoder and by the real codec.

``python -m simulations.bench.plain_privacy [--json]`` trains clients of 1 to 64 examples as the
app does (MiniLM, Reuters R8, its defaults), sends each update in several ways, reads it by the
attacks of `simulations.runs.reading`, and writes ``results/plain_privacy.jsonl``: a row a client.
What is there is not measured again. Seeds, sizes and ways are the constants below; members and
others of the membership tests have the same labels.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import RoundPlan, make_plans
from dare_agg.rounds.server import Accepted, Rejection, advance, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import Arrays, GlobalModel, global_model
from simulations.runs.known_model import KnownModel, Rows
from simulations.runs.reading import (
    auc,
    correlation,
    features_read,
    interval,
    label_scores,
    label_scores_by_encoder,
    words_read,
)
from simulations.runs.rows import RESULTS, append_row, read_rows, versions

SIZES = (1, 4, 16, 64)
CLIENTS = 10  # of each size
FEWER_STEPS = (1, 2)  # beside the app's 5
CANDIDATES = 8  # members tested of a client, where it has so many, and as many others
POOL = 300  # texts of the test split among which a client's own is to be found
LABEL_MIXTURE = 0.5  # Dirichlet's α, the app's
ROUNDS, ROUND_CLIENTS, SHOWN_ROUNDS = 10, 5, (1, 3, 10)
YES_OR_NO = ("label", "label by encoder", "picked")
HEAD = r"^head\."
EMBEDDING = "encoder.embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Way:
    """A way to send an update; ``noise`` is as many times as long as the delta of a group."""

    name: str
    drop_rate: str
    values: str = "b1"
    dense: tuple[str, ...] = (HEAD,)
    noise: float = 0.0

    @property
    def settings(self) -> FederatedSettings:
        return FederatedSettings(
            UpdateTerms(
                drop_rate=parse_drop_rate(self.drop_rate), values=self.values, dense=self.dense
            )
        )


DEFAULT = Way("p=.9", "0.9")
WAYS = (
    Way("FedAvg", "0", "f32"),
    DEFAULT,
    Way("p=.99", "0.99"),
    Way("p=.999", "0.999"),
    Way("p=.9, noise 1", "0.9", noise=1.0),
    Way("p=.9, noise 4", "0.9", noise=4.0),
    Way("p=.9, head in the delta", "0.9", dense=()),
    Way("p=.99, head in the delta", "0.99", dense=()),
)
OVER_ROUNDS = (WAYS[-1], Way("p=.999, head in the delta", "0.999", dense=()))


def client_rows(
    labels: Rows, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw a client's rows, a mixture of labels of its own, and others of the same labels."""
    classes = int(labels.max()) + 1
    shares = rng.dirichlet(np.full(classes, LABEL_MIXTURE))
    halves = [
        np.array_split(rng.permutation(np.flatnonzero(labels == c)), 2) for c in range(classes)
    ]
    own, spare = ([list(half[i]) for half in halves] for i in (0, 1))
    rows: list[int] = []
    while len(rows) < size:
        left = shares * [bool(stock) for stock in own]
        if not left.sum() > 0:
            left = np.array([bool(stock) for stock in own], np.float64)
        rows.append(own[int(rng.choice(classes, p=left / left.sum()))].pop())
    tested = [labels[rows[i % size]] for i in range(CANDIDATES)]
    return np.array(rows), np.array([spare[label].pop() for label in tested])


@dataclass(frozen=True)
class Received:
    """One client's update as the server has it, and its decoded vectors."""

    model: GlobalModel
    reply: Accepted
    body: NDArray[np.float32]
    head: NDArray[np.float32]

    @property
    def delta(self) -> dict[str, Any]:
        """The delta of every tensor that was sent; views."""
        groups = self.model.groups
        named = dict(groups.layout.unflatten(self.body))
        named.update(groups.dense_layout.unflatten(self.head))
        return named


def plans_of(way: Way, model: GlobalModel, number: int, seed: int, clients: int) -> list[RoundPlan]:
    """The round plans of a way's settings."""
    secret = derive_key(seed_secret(seed), "round", number)
    return make_plans(secret, number, [None] * clients, way.settings.terms, model.ref)


def send(
    way: Way, model: GlobalModel, plan: RoundPlan, base: Arrays, tuned: Arrays, seed: Sequence[int]
) -> Received:
    """Send a trained state in a way, and check it as the server does."""
    if way.noise:
        tuned = noisy(way.noise, model, tuned, np.random.default_rng(list(seed)))
    sent = make_client_update(plan, base, tuned)
    reply = check_reply(plan, sent.blob, sent.dense_blob, 1.0)
    if isinstance(reply, Rejection):
        raise SystemExit(f"{way.name}: {reply.reason}: {reply.detail}")
    body, head = np.empty(model.delta.size, np.float32), np.empty(model.dense.size, np.float32)
    reply.update.read(0, body.size, body)
    if reply.dense is not None:
        reply.dense.read(0, head.size, head)
    return Received(model, reply, body, head)


def noisy(times: float, model: GlobalModel, tuned: Arrays, rng: np.random.Generator) -> Arrays:
    """Add normal noise, ``times`` as long as the delta, to each group of a trained state."""
    named: dict[str, Any] = {}
    groups = model.groups
    for layout, base in ((groups.layout, model.delta), (groups.dense_layout, model.dense)):
        vector = layout.flatten(tuned)
        sigma = times * float(np.linalg.norm(vector - base)) / max(1, layout.size) ** 0.5
        vector += np.float32(sigma) * rng.standard_normal(vector.size, np.float32)
        named.update(layout.unflatten(vector))
    return named


def read_head(
    known: KnownModel, delta: Mapping[str, Any], rows: Rows, own: NDArray
) -> dict[str, float]:
    """Label and features of a client from the head's delta. ``own`` are its texts' features."""
    weight, bias = delta["head.weight"], delta["head.bias"]
    scores = label_scores(weight, bias, known.mean)
    guess = features_read(weight, scores, len(rows))
    near = correlation(guess, own).max()
    others = correlation(guess, known.public)
    return {
        "label": commonest(known.labels[rows], scores),
        "features": float(near),
        "features of others": float(others[: len(rows)].max()),
        "picked": float(near > others.max()),
    }


def commonest(labels: Rows, scores: NDArray) -> float:
    """1 where the class that rose most is the client's commonest label, or one of those."""
    counts = np.bincount(labels, minlength=len(scores))
    return float(counts[int(np.argmax(scores))] == counts.max())


def last_bias(base: Arrays) -> str:
    """The name of the last layer's additive term before pooling."""
    layers = [n for n in base if n.endswith("output.LayerNorm.bias") and "attention" not in n]
    return max(layers, key=lambda name: int(name.split(".layer.")[1].split(".")[0]))


def read_body(known: KnownModel, got: Received, rows: Rows) -> dict[str, float]:
    """Label and words of a client from the encoder's delta alone."""
    name, delta = last_bias(known.base), got.delta
    entry = got.model.groups.layout[name]
    survived = got.reply.update.present(entry.offset, entry.stop)
    head = known.base["head.weight"]
    words = {w for row in known.tokens("train", rows) for w in row}
    return {
        "label by encoder": commonest(
            known.labels[rows], label_scores_by_encoder(delta[name], survived, head)
        ),
        "words": words_read(delta[EMBEDDING], sorted(words), known.common),
    }


def read_members(
    known: KnownModel, received: Mapping[str, Received], members: Rows, others: Rows
) -> dict[str, dict[str, float]]:
    """AUC of telling members from others, by the gradient's cosine and by the loss's fall."""
    tested = np.concatenate([members, others])
    groups = next(iter(received.values())).model.groups
    places = {}
    for name, got in received.items():
        survivors = got.reply.update.mask.indices(0, got.body.size)
        places[name] = None if survivors.size == got.body.size else survivors
    pull, head_pull = (np.empty(x.size, np.float32) for x in (groups.layout, groups.dense_layout))
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in received}
    for gradient in known.gradients(tested):
        groups.layout.flatten(gradient, pull)
        groups.dense_layout.flatten(gradient, head_pull)
        for name, got in received.items():
            found = scores[name]
            found.setdefault("cosine", []).append(_cosine(pull, got.body, places[name]))
            found.setdefault("cosine of the head", []).append(_cosine(head_pull, got.head))
    before = known.losses(known.base, tested)
    for name, got in received.items():
        delta = got.delta
        heads = {n: known.base[n] + delta[n] for n in groups.dense_layout.names}
        body = {**known.base, **{n: known.base[n] + delta[n] for n in groups.layout.names}}
        scores[name]["loss by encoder"] = list(before - known.losses(body, tested))
        scores[name]["loss"] = list(before - known.losses({**body, **heads}, tested))
    split = len(members)
    return {
        name: {what: auc(s[:split], s[split:]) for what, s in found.items()}
        for name, found in scores.items()
    }


def _cosine(pull: NDArray, delta: NDArray, places: NDArray | None = None) -> float:
    """Of a candidate's pull with the update, over the places that were sent."""
    if places is not None:
        pull, delta = pull[places], delta[places]
    norms = float(np.linalg.norm(pull)) * float(np.linalg.norm(delta))
    return float(pull @ delta) / norms if norms else 0.0


def measure(known: KnownModel, size: int, client: int) -> dict[str, Any]:
    """Everything of one client."""
    rng = np.random.default_rng(np.random.SeedSequence([0, 70, size, client]))
    rows, others = client_rows(known.labels, size, rng)
    own = known.features("train", rows)
    base, seed = known.base, (0, size, client)
    models = {dense: global_model(base, dense=dense) for dense in {way.dense for way in WAYS}}

    def sent(way: Way, tuned: Arrays) -> Received:
        model = models[way.dense]
        plan = plans_of(way, model, 1, 1000 * size + client, 1)[0]
        return send(way, model, plan, base, tuned, seed)

    found: dict[str, dict[str, float]] = {}
    for steps in FEWER_STEPS:
        got = sent(WAYS[3], known.train(rows, seed, steps, base))
        found[f"steps {steps}"] = read_head(known, got.delta, rows, own)
    tuned = known.train(rows, seed, 5, base)
    received = {way.name: sent(way, tuned) for way in WAYS}
    for name, got in received.items():
        found[name] = read_head(known, got.delta, rows, own)
    whole = {way.name: received[way.name] for way in WAYS if way.dense}
    for name, figures in read_members(known, whole, rows[:CANDIDATES], others).items():
        found[name].update(read_body(known, whole[name], rows), **figures)
    return {"kind": "client", "examples": size, "client": client, "found": found}


def measure_rounds(known: KnownModel, way: Way) -> dict[str, Any]:
    """Words, label and features of clients of one example, from all their updates so far."""
    rows = [
        client_rows(known.labels, 1, np.random.default_rng(np.random.SeedSequence([0, 71, c])))[0]
        for c in range(ROUND_CLIENTS)
    ]
    words = [set(known.tokens("train", r)[0]) for r in rows]
    own = [known.features("train", r) for r in rows]
    model, state = global_model(known.base), StepState()
    seen: list[dict[str, Any]] = [{} for _ in rows]
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(1, ROUNDS + 1):
        base = {name: np.array(array) for name, array in model.arrays().items()}
        replies, plans = [], plans_of(way, model, number, 7, ROUND_CLIENTS)
        for c, plan in enumerate(plans):
            tuned = known.train(rows[c], (0, number, c), 5, base)
            got = send(way, model, plan, base, tuned, (0,))
            for name, delta in got.delta.items():
                if name == EMBEDDING or name.startswith("head."):
                    seen[c][name] = seen[c].get(name, 0) + delta
            replies.append(got.reply)
        merged = merge_round(model, replies, way.settings)
        model, state = advance(model, state, merged, way.settings)
        if number in SHOWN_ROUNDS:
            found[f"rounds {number}"] = [
                {
                    **read_head(known, seen[c], rows[c], own[c]),
                    "words": words_read(seen[c][EMBEDDING], sorted(words[c]), known.common),
                }
                for c in range(ROUND_CLIENTS)
            ]
    return {"kind": "rounds", "way": way.name, "found": found}


def run(out: Path, **task: Any) -> list[dict[str, Any]]:
    """Measure what is missing of the results file; returns all rows."""
    rows = read_rows(out)
    done = {(r.get("examples"), r.get("client"), r.get("way")) for r in rows}
    known: KnownModel | None = None
    wanted: list[tuple[Any, ...]] = [(n, c, None) for c in range(CLIENTS) for n in SIZES]
    wanted += [(None, None, way.name) for way in OVER_ROUNDS]
    for size, client, name in (key for key in wanted if key not in done):
        known = known or KnownModel(POOL, **task)
        if name is None:
            row = measure(known, size, client)
        else:
            row = measure_rounds(known, next(w for w in OVER_ROUNDS if w.name == name))
        append_row(out, {**row, "versions": versions()})
    return read_rows(out)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % interval of every figure by number of examples and way."""
    values: dict[tuple[Any, str, str], list[float]] = {}
    for row in rows:
        for way, found in row["found"].items():
            label = way if row["kind"] == "client" else f"{row['way']}, {way}"
            for figures in found if isinstance(found, list) else [found]:
                for what, value in figures.items():
                    values.setdefault((row.get("examples", 1), label, what), []).append(value)
    table = []
    for (examples, way, what), found in sorted(values.items()):
        mean, low, high = (round(v, 3) for v in interval(found, yes_or_no=what in YES_OR_NO))
        entry = {"examples": examples, "way": way, "figure": what, "clients": len(found)}
        table.append({**entry, "mean": mean, "low": low, "high": high})
    return table


# What SECURITY.md shows: (what is read, how it was sent, way, figure).
_SHOWN = (
    ("its commonest label (guessing: 0.13)", "head whole, any p", "p=.9", "label"),
    ("", "head whole, noise 4", "p=.9, noise 4", "label"),
    ("", "head in the delta, p=.9", "p=.9, head in the delta", "label"),
    ("", "head in the delta, p=.99", "p=.99, head in the delta", "label"),
    ("", "head local, p=.9", "p=.9", "label by encoder"),
    ("", "head local, p=.99", "p=.99", "label by encoder"),
    ("", "head local, p=.999", "p=.999", "label by encoder"),
    (
        "one of its texts, among 300 others (0.00, 0.01, 0.05, 0.18)",
        "head whole, any p",
        "p=.9",
        "picked",
    ),
    ("", "head whole, noise 4", "p=.9, noise 4", "picked"),
    ("", "head in the delta, p=.99", "p=.99, head in the delta", "picked"),
    ("share of its words (below 0.05)", "p=0", "FedAvg", "words"),
    ("", "p=.9", "p=.9", "words"),
    ("", "p=.99", "p=.99", "words"),
    ("", "p=.999", "p=.999", "words"),
    ("", "p=.9, noise 4", "p=.9, noise 4", "words"),
    ("membership, AUC (0.50)", "head whole, any p", "p=.9", "cosine of the head"),
    ("", "head local, p=0", "FedAvg", "cosine"),
    ("", "head local, p=.9", "p=.9", "cosine"),
    ("", "head local, p=.999", "p=.999", "cosine"),
    ("", "head local, p=.9, noise 4", "p=.9, noise 4", "cosine"),
)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of SECURITY.md: mean (95 % interval) by number of examples."""
    known = {(r["examples"], r["way"], r["figure"]): r for r in summary(rows)}
    lines = [
        "| what is read | how it was sent | " + " | ".join(f"{n}" for n in SIZES) + " |",
        "|---|---|" + "---|" * len(SIZES),
    ]
    for what, how, way, figure in _SHOWN:
        found = [known[n, way, figure] for n in SIZES]
        cells = [f"{f['mean']:.2f} ({max(0, f['low']):.2f}–{min(1, f['high']):.2f})" for f in found]
        lines.append(f"| {what} | {how} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.plain_privacy", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument("--table", action="store_true", help="print the table of SECURITY.md")
    parser.add_argument("--out", type=Path, default=RESULTS / "plain_privacy.jsonl")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = run(options.out)
    table = summary(rows)
    if options.table:
        print(markdown(rows))
        return
    if options.json:
        print(json.dumps({"rows": table}))
        return
    for row in table:
        print(
            f"{row['examples']:3} examples  {row['way']:38} {row['figure']:20} "
            f"{row['mean']:6.3f}  [{row['low']:.3f}, {row['high']:.3f}]  n={row['clients']}"
        )


if __name__ == "__main__":
    main()
