"""Gradients of single rows: one row after another, beside Opacus's hooks, on a real encoder.

``python -m simulations.bench.row_gradients`` prints CPU seconds of a step on 16 rows, and by how
much the norms of Opacus's gradients differ from those of the rows' own. Needs ``opacus``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from client.config import configure
from client.learning import Lesson
from client.privately import clipped_sum
from client.training import FineTuning, build_task


def lesson_of(task: FineTuning) -> Lesson:
    """A task's lesson, its network set up as private training has it."""
    named = task._place(task.initial_state())
    network = task._load()
    network.eval()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in named)
    return Lesson(
        task.config,
        task.compute,
        network,
        named,
        read=lambda at: task._read("train", at),
        loss=task._loss,
    )


def opacus_norms(task: FineTuning, lesson: Lesson, rows: np.ndarray) -> tuple[np.ndarray, list]:
    """Norm of each row's gradient as Opacus has it, and the parameters without an axis of rows."""
    import torch
    from opacus import GradSampleModule

    for module in lesson.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    lesson.network.train()  # its hooks do nothing else
    hooked = GradSampleModule(lesson.network, strict=False)
    try:
        read = lesson.read(rows)
        scores = task.kind.scores(hooked, read.batch).float().flatten(0, -2)
        task.kind.loss(scores, read.targets).backward()
        samples = {
            name: p.grad_sample
            for name, p in lesson.named.items()
            if getattr(p, "grad_sample", None) is not None
        }
        good = [g for g in samples.values() if g.shape[0] == len(rows)]
        odd = [name for name, g in samples.items() if g.shape[0] != len(rows)]
        squares = sum((g.flatten(1) ** 2).sum(1) for g in good)
        return squares.sqrt().numpy(), odd  # type: ignore[union-attr]
    finally:
        for parameter in lesson.named.values():
            parameter.grad_sample = None
        hooked.remove_hooks()
        lesson.network.eval()


def own_norms(lesson: Lesson, rows: np.ndarray) -> np.ndarray:
    """Norm of each row's gradient, of a pass of that row alone."""
    found = []
    for row in rows:
        sums: Mapping[str, Any] = clipped_sum(lesson, np.array([row]), 1e9)
        found.append(np.sqrt(sum(float((part**2).sum()) for part in sums.values())))
    return np.array(found)


def seconds(action: Callable[[], Any]) -> float:
    """CPU seconds of the faster of two calls after a first one."""
    action()
    taken = []
    for _ in range(2):
        began = time.process_time()
        action()
        taken.append(time.process_time() - began)
    return min(taken)


def main() -> None:
    """Print one line for each way to train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--data", default="reuters-r8")
    words = parser.parse_args()
    warnings.filterwarnings("ignore")
    rows = np.arange(words.rows)
    for train in ("lora", "full"):
        task = build_task(
            configure(model=words.model, data=words.data, train=train, train_rows=64, test_rows=8)
        )
        lesson = lesson_of(task)
        own = own_norms(lesson, rows)
        one_by_one = seconds(lambda lesson=lesson: clipped_sum(lesson, rows, 1.0))
        theirs, odd = opacus_norms(task, lesson, rows)
        hooks = seconds(lambda task=task, lesson=lesson: opacus_norms(task, lesson, rows))
        apart = float(np.abs(theirs / own - 1).max())
        print(
            f"{words.model} {train}, {words.rows} rows: {one_by_one:.2f} s row by row, {hooks:.2f} "
            f"s by Opacus's hooks; norms differ by {apart:.1e} at most; without an axis of rows: "
            f"{', '.join(odd) or 'none'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
