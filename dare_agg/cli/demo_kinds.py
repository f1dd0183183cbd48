"""What `dare-agg demo` can show: one row a demo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Demo:
    """A row of the table of demos.

    Attributes
    ----------
    methods: that are compared, in the order in which they run.
    settings: the run config.
    clients, rounds: unless the command says other numbers.
    title, lead: of the report; ``{clients}`` and ``{rounds}`` stand for the numbers.
    answered: test questions that the models answer side by side, before the run and after it.
    """

    methods: tuple[str, ...]
    settings: Mapping[str, Any]
    clients: int
    rounds: int
    title: str
    lead: str
    answered: int = 0


DEMOS: Mapping[str, Demo] = {
    # Small enough for two cores, real enough to need the encoder: head only stays far below, and
    # comes first, so that something is seen soon.
    "text": Demo(
        methods=("head-only", "fedavg", "dare-task-arithmetic", "dare-ties"),
        settings={
            "data": "reuters-r8",
            "partition": "dirichlet",
            "alpha": 0.5,
            "drop-rate": "0.9",
            "values": "b1",
            "length": 16,
            "batch": 16,
            "steps": 4,
            "learning-rate": 4e-4,
            "head-learning-rate": 1e-3,
            "test-rows": 600,
        },
        clients=10,
        rounds=3,
        title="{clients} clients fine-tune one encoder",
        lead=(
            "News topics (Reuters R8) on the 22.7-million-parameter MiniLM encoder: {clients} "
            "clients with different label mixtures (Dirichlet 0.5), {rounds} through "
            "Flower on this machine, the same data and seeds for every row. FedAvg sends the "
            "whole model; DARE sends one random tenth of the change, one bit a value."
        ),
    ),
    # The template's own system prompt would be half of each row's tokens.
    "language": Demo(
        methods=("fedavg", "dare-task-arithmetic"),
        settings={
            "model": "smollm2",
            "data": "arithmetic-worked",
            "partition": "iid",
            "drop-rate": "0.9",
            "values": "b1",
            "train": "lora",
            "lora-rank": 16,
            "lora-alpha": 32,
            "lora-targets": "all-linear",
            "system-prompt": " ",
            "length": 96,
            "batch": 8,
            "steps": 5,
            "learning-rate": 5e-4,
            "train-rows": 600,
            "test-rows": 48,
            "generate-rows": 8,
            "generate-tokens": 24,
            "answer-form": "number",
        },
        clients=6,
        rounds=4,
        title="{clients} clients fine-tune one language model",
        lead=(
            "Word problems of one or two steps on the 135-million-parameter SmolLM2, LoRA adapters "
            "of rank 16 in every layer: {clients} clients, {rounds} through Flower on this "
            "machine, the same data and seeds for every row, loss on the answers alone. FedAvg "
            "sends whole adapters; DARE sends one random tenth of their change, one bit a value."
        ),
        answered=8,
    ),
}  # fmt: skip
