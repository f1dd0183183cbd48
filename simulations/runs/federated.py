"""One federated run in this process: the real task, the real codec, no network.

Every method trains the same clients on the same rows in the same order; only what travels
differs. Bytes are those of the payloads that were made; the small dense head is counted
apart.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.runs.channels import HEAD, make_channel


@lru_cache(maxsize=2)
def _task(items: tuple[tuple[str, Any], ...], seed: int) -> Any:
    from client.config import configure
    from client.training import build_task

    return build_task(configure(**dict(items), seed=seed))


def build(settings: dict[str, Any], seed: int) -> Any:
    """Build the task of a row; processes keep the last ones, tokenised or decoded."""
    items = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return _task(tuple(sorted(items.items())), seed)


def divide(task: Any, settings: Any, seed: int) -> list[NDArray[np.int64]]:
    """Divide the task's training rows among the clients."""
    from client.partition import partition

    rows = task.train_rows
    return partition(
        settings["partition"],
        rows.labels,
        rows.groups,
        settings["clients"],
        alpha=settings["alpha"],
        seed=seed,
    )


def run_row(row: Any) -> dict[str, Any]:
    """Run one (cell, seed); returns accuracy, its curve and the bytes of both directions."""
    from client.schedule import Progress

    settings = row.settings
    task_settings = dict(settings["task"])
    if settings["method"] == "head-only":
        task_settings["train"] = "head"
    task = build(task_settings, row.seed)
    parts = divide(task, settings, row.seed)
    clients = settings["clients"]
    sample = settings["sample"] or clients
    channel = make_channel(settings, task.initial_state(), row.seed, clients)
    measure = np.arange(min(settings["evaluate_rows"], len(task.test_rows)))

    curve: list[dict[str, Any]] = []
    up = down = up_head = down_head = 0
    losses: list[float] = []

    def note(number: int, *, whole: bool) -> None:
        scores, match = task.evaluate(channel.state(), None if whole else measure), "exact-match"
        curve.append(
            {
                "round": number,
                "accuracy": round(scores["accuracy"], 4),
                "loss": round(scores["loss"], 4),
                **({"exact_match": round(scores[match], 4)} if match in scores else {}),
                "rows": len(task.test_rows) if whole else len(measure),
                "train_loss": round(float(np.mean(losses)), 4) if losses else None,
                "upload_bytes": up + up_head,
                "download_bytes": down + down_head,
            }
        )
        losses.clear()

    # "untouched" is the control in which nothing is trained: the base as it came.
    rounds = 0 if settings["method"] == "untouched" else settings["rounds"]
    for number in range(1, rounds + 1):
        rng = np.random.default_rng(np.random.SeedSequence([row.seed, 40, number]))
        chosen = sorted(int(c) for c in rng.choice(clients, sample, replace=False))
        received = channel.begin(number, chosen)
        down += received.delta
        down_head += received.dense
        for client in chosen:
            tuned, weight, measured = task.train(
                channel.state(),
                parts[client],
                seed=(row.seed, number, client),
                progress=Progress(number, rounds),
            )
            losses.append(measured["train-loss"])
            sent = channel.send(client, tuned, float(weight))
            up += sent.delta
            up_head += sent.dense
        channel.finish()
        whole = number == rounds or number in settings["milestones"]
        if whole or number % settings["evaluate_every"] == 0:
            note(number, whole=whole)
    if not rounds:
        note(0, whole=True)
    turns = sample * max(1, rounds)
    return {
        "method": settings["method"],
        "accuracy": curve[-1]["accuracy"],
        "test_rows": len(task.test_rows),
        "rounds": rounds,
        "clients": clients,
        "parameters": channel.size,
        "head_parameters": channel.head_size,
        "upload_bytes": up + up_head,
        "download_bytes": down + down_head,
        "head_upload_bytes": up_head,
        "head_download_bytes": down_head,
        "upload_bytes_per_client_round": up // turns,
        "download_bytes_per_client_round": down // turns,
        "head_bytes_per_client_round": up_head // turns,
        "curve": curve,
        "fingerprint": channel.fingerprint(),
        "measurements": channel.measurements(),
    }


__all__ = ["HEAD", "build", "divide", "run_row"]
