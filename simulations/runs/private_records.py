"""Privacy of records: what a few parties reach whose trainings keep their rows to themselves.

Each party trains by DP-SGD as the client does (`client.privately`), charged to a ledger of its own,
and sends a DARE update; ε of 0 is the same without clipping, noise and ledger. What is learnt is
one matrix on the words of a text: a thousand buckets of words, the square roots of their counts.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.config import configure
from client.data import load_text
from client.devices import Compute
from client.learning import Lesson, Reading, learn
from client.partition import partition
from client.privately import PrivateSteps, learn_privately
from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.privacy.accountant import default_delta
from dare_agg.privacy.record_ledger import RecordLedger, open_ledger
from dare_agg.privacy.records import RecordPrivacy, Sitting, permit
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Rejection, advance, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model

BUCKETS = 1024


@dataclass(frozen=True)
class Table:
    """Rows of numbers and their labels."""

    train: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test: NDArray[np.float32]
    test_labels: NDArray[np.int64]


@lru_cache(maxsize=1)
def _table(data: str) -> Table:
    found = load_text(data)
    parts = [(_words(rows.inputs), rows.labels) for rows in (found.train, found.test)]
    return Table(*parts[0], *parts[1])


def _words(texts: Sequence[str]) -> NDArray[np.float32]:
    found = np.zeros((len(texts), BUCKETS), np.float32)
    for row, text in zip(found, texts, strict=True):
        for word in re.findall(r"[a-z]+", text.lower()):
            row[zlib.crc32(word.encode()) % BUCKETS] += 1
    found = np.sqrt(found)
    return np.asarray(found / np.maximum(1e-9, np.linalg.norm(found, axis=1, keepdims=True)))


def run_row(row: Any) -> dict[str, Any]:
    """Train in rounds and measure the accuracy on all test rows at the end."""
    import torch

    settings = row.settings
    table = _table(settings["data"])
    network = torch.nn.Linear(table.train.shape[1], int(table.train_labels.max()) + 1)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.zeros_(network.bias)
    named = dict(network.named_parameters())
    inputs, labels = torch.from_numpy(table.train), torch.from_numpy(table.train_labels)

    def read(at: NDArray[np.int64]) -> Reading:
        places = torch.from_numpy(at)
        return Reading({"x": inputs[places]}, labels[places], len(at))

    def loss(found: Reading) -> Any:
        return torch.nn.functional.cross_entropy(network(found.batch["x"]), found.targets)

    config = configure(learning_rate=settings["learning_rate"], weight_decay=0.0, device="cpu")
    lesson = Lesson(config, Compute("cpu"), network, named, read=read, loss=loss)
    dealt = partition(
        "dirichlet", table.train_labels, (), settings["parties"],
        alpha=settings["alpha"], seed=row.seed,
    )  # fmt: skip
    terms = UpdateTerms(
        drop_rate=parse_drop_rate(settings["drop_rate"]), values=settings["values"], dense=()
    )
    federated = FederatedSettings(terms, weighting="equal")
    model = global_model(_arrays(named), dense=(), exclude=())
    state = StepState()
    sent: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        ledgers = [
            open_ledger(
                Path(folder, f"{i}"), Path(folder, "marks"), f"party {i}",
                default_delta(len(rows)), False,
            )
            for i, rows in enumerate(dealt)
        ]  # fmt: skip
        for number in range(1, settings["rounds"] + 1):
            secret = derive_key(seed_secret(row.seed), "round", number, length=32)
            plans = make_plans(secret, number, [None] * len(dealt), terms, model.ref)
            accepted = []
            for party, (rows, plan) in enumerate(zip(dealt, plans, strict=True)):
                _place(named, model.arrays())
                ledgers[party] = _trained(lesson, rows, settings, ledgers[party], number, row.seed)
                update = make_client_update(plan, model.arrays(), _arrays(named))
                sent.append(update.nbytes)
                reply = check_reply(plan, update.blob, update.dense_blob, 1)
                if isinstance(reply, Rejection):
                    raise AssertionError(reply.detail)
                accepted.append(reply)
            model, state = advance(model, state, merge_round(model, accepted, federated), federated)
        spent = [ledger.spent.epsilon(ledger.delta) for ledger in ledgers if ledger.charges]
    _place(named, model.arrays())
    with torch.no_grad():
        found = network(torch.from_numpy(table.test)).argmax(1).numpy()
    return {
        "epsilon": settings["epsilon"],
        "spent": round(max(spent), 4) if spent else None,
        "accuracy": round(float(np.mean(found == table.test_labels)), 4),
        "rows": [len(rows) for rows in dealt],
        "parameters": sum(p.numel() for p in named.values()),
        "bytes": round(float(np.mean(sent))),
    }


def _trained(
    lesson: Lesson,
    rows: NDArray[np.int64],
    settings: Mapping[str, Any],
    ledger: RecordLedger,
    number: int,
    seed: int,
) -> RecordLedger:
    """Train a party's round; returns its ledger, with the round charged."""
    steps, batch = settings["steps"], min(settings["batch"], len(rows))
    if not settings["epsilon"]:
        draw = np.random.default_rng([seed, number, int(rows[0])])
        learn(lesson, [draw.choice(rows, batch, replace=False) for _ in range(steps)])
        return ledger
    privacy = RecordPrivacy(settings["epsilon"], clip=settings["clip"])
    left = steps * (settings["rounds"] - number + 1)
    what = b"%d %d" % (seed, number)
    allowed = permit(ledger, privacy, Sitting("run", what, len(rows), batch, steps, left))
    charge = allowed.charge
    how = PrivateSteps(charge.steps, batch, charge.rate, privacy.clip, charge.noise, allowed.key)
    learn_privately(lesson, rows, how, lambda at: at)
    return allowed.ledger


def _arrays(named: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    return {name: p.detach().numpy().copy() for name, p in named.items()}


def _place(named: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(np.asarray(arrays[name], np.float32)))
