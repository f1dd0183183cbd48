"""A federated fine-tuning round of SmolLM2 on a GPU: equal bits, and what encoding takes.

    bash scripts/gpu_check.sh                            # on a machine with a GPU; sets itself up
    python -m simulations.bench.gpu --device cpu         # the same on a CPU

Two clients fine-tune the model on this repository's documents, through the strategy and the mod,
each with its parameters on the device. Every update is compared with the one that NumPy makes of
the same numbers on the host; a difference is an error. Seconds are medians: of a training step, of
putting a version into the model, of measuring the delta and of encoding it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from client.models import model_path
from dare_agg.codec.update import encode_update
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.flower.records import UPDATE_KEY
from dare_agg.flower.transport import unpack
from dare_agg.flower.turns import Turn, open_turn
from dare_agg.vectors.model import GlobalModel
from simulations.runs.memory_grid import MemoryGrid, pretend_task

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 2
_REPEATS = 3


@dataclass
class Bench:
    """A client app that trains on a device, and what it measured."""

    device: str
    dtype: str
    steps: int
    batch: int
    length: int
    model: str = "smollm2"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    equal: int = 0
    survivors: int = 0

    def new_model(self) -> Any:
        """The pretrained model on the device."""
        import torch
        from transformers import AutoModelForCausalLM

        path = model_path(self.model)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, self.dtype))
        return model.to(self.device)

    def blocks(self, client: int) -> Any:
        """A client's rows of tokens: every second document of this repository."""
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_path(self.model))
        files = sorted((ROOT / "docs").glob("*.md"))[client::CLIENTS]
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        tokens = torch.tensor(tokenizer(text)["input_ids"])
        rows = self.steps * self.batch
        wanted = rows * self.length
        return tokens.repeat(-(-wanted // len(tokens)))[:wanted].reshape(rows, self.length)

    def app(self) -> ClientApp:
        """The ClientApp, as one would write it, but for the clock and the comparison."""
        from dare_agg.torch import federated_model

        app = ClientApp(mods=[dare_mod])

        @app.train()
        def train(msg: Message, context: Context) -> Message:
            model, taken = self.new_model(), open_turn()
            assert taken is not None
            with federated_model(model, msg, context) as turn:
                self.train(model, int(context.node_config["partition-id"]))
            reply = turn.reply(num_examples=self.steps * self.batch)
            self.compare(model, taken, reply)
            return reply

        return app

    def train(self, model: Any, client: int) -> None:
        """Some steps of AdamW, each timed."""
        import torch

        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
        for rows in self.blocks(client).split(self.batch):
            tokens = rows.to(self.device)

            def step(tokens: Any = tokens) -> None:
                optimizer.zero_grad(set_to_none=True)
                model(input_ids=tokens, labels=tokens).loss.backward()
                optimizer.step()

            self.timed("step", step)

    def compare(self, model: Any, taken: Turn, reply: Message) -> None:
        """Compare the update with NumPy's; time what made it."""
        from dare_agg.torch.delta import TrainedDelta
        from dare_agg.torch.loading import as_held, as_source, load_into
        from dare_agg.torch.named import matched_tensors, named_tensors
        from dare_agg.torch.places import held

        plan, version = taken.order.plan, taken.version()
        assert plan is not None
        tensors = matched_tensors(version.groups, named_tensors(model))
        parts = {name: held(tensor) for name, tensor in tensors.items()}
        start = as_held(version, parts)
        delta = TrainedDelta(version.groups.layout, parts, as_source(start.delta))
        begun, after = _flat(start), version.groups.layout.flatten(_on_host(tensors))
        right = encode_update(plan.spec(), (begun, after))
        record = reply.content[UPDATE_KEY]
        assert isinstance(record, ArrayRecord)
        if unpack(record, len(right)) != right:
            raise SystemExit(f"the update made on {self.device} is another one than the host's")
        self.equal += 1
        self.survivors = plan.spec().draw_mask().survivors
        for _ in range(_REPEATS):
            self.timed("encode", lambda: encode_update(plan.spec(), delta))
            self.timed("measure", delta.measure)
            self.timed("encode-on-host", lambda: encode_update(plan.spec(), (begun, after)))
        for _ in range(_REPEATS):
            self.timed("load", lambda: load_into(version, parts))

    def timed(self, name: str, work: Callable[[], object]) -> None:
        """Do something and keep its seconds, the device's included."""
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begun)

    def row(self) -> dict[str, Any]:
        """What was measured, seconds as medians; the first step of a client warms up."""
        found = {name: statistics.median(times) for name, times in self.seconds.items()}
        return {
            "device": self.device,
            "dtype": self.dtype,
            "batch": [self.batch, self.length],
            "updates_equal": self.equal,
            "survivors": self.survivors,
            "seconds": {name: round(value, 5) for name, value in found.items()},
            "encode_share_of_a_step": round(found["encode"] / found["step"], 4),
            "measure_share_of_a_step": round(found["measure"] / found["step"], 4),
        }


def _on_host(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in tensors.items()}


def _flat(model: GlobalModel) -> np.ndarray:
    return np.array(model.delta[:])


def run(bench: Bench, drop_rate: str, values: str) -> dict[str, Any]:
    """One round; returns the row."""
    from dare_agg.torch.named import named_tensors

    pretend_task()
    arrays = _on_host(named_tensors(bench.new_model()))
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    strategy = DareStrategy(seed=1, drop_rate=drop_rate, values=values, fraction_evaluate=0.0)
    grid = MemoryGrid(bench.app(), CLIENTS)
    result = strategy.start(grid, record, num_rounds=1)
    moved = sum(not np.array_equal(result.arrays[n].numpy(), arrays[n]) for n in arrays)
    facts = {"parameters": sum(array.size for array in arrays.values()), "tensors_moved": moved}
    return {**bench.row(), **facts, "drop_rate": drop_rate, "values": values}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", default="smollm2", help="a built-in model, or a folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--drop-rate", default="0.99")
    parser.add_argument("--values", default="b1")
    options = parser.parse_args()
    for dtype in options.dtypes:
        bench = Bench(
            options.device, dtype, options.steps, options.batch, options.length, options.model
        )
        print(json.dumps(run(bench, options.drop_rate, options.values)), flush=True)


if __name__ == "__main__":
    main()
