"""One of the processes of a client whose model is sharded; the first one runs the federation.

Run as ``python federated_ranks.py RANK COUNT FOLDER``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from flwr.app import Array, ArrayRecord
from flwr.clientapp import ClientApp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from small_model import Small

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import DareError
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.torch import federated_model
from dare_agg.torch.named import named_tensors
from simulations.runs.memory_grid import MemoryGrid, pretend_task

CLIENTS, ROUNDS = 2, 2


def the_model() -> torch.nn.Module:
    """A small model with a head that stays with each client."""
    torch.manual_seed(0)
    return Small(101, 24, 2, head=3)


def train(model: torch.nn.Module) -> None:
    """Change every parameter by exact arithmetic, so that pieces change as wholes do."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0625).add_(0.001953125)


def app_of(make) -> ClientApp:
    """The app, whose code is that of one process."""
    app = ClientApp(mods=[dare_mod])

    @app.train()
    def on_train(msg, context):
        model = make()
        with federated_model(model, msg, context) as turn:
            train(model)
        return turn.reply(num_examples=4, metrics={"loss": 1.0})

    @app.evaluate()
    def on_evaluate(msg, context):
        model = make()
        with federated_model(model, msg, context) as turn:
            whole = [float(t.detach().sum()) for t in named_tensors(model).values()]
        return turn.reply(num_examples=4, metrics={"sum": sum(whole)})

    return app


def run(app: ClientApp) -> dict[str, np.ndarray]:
    """A federation in this process; the final arrays."""
    pretend_task()
    arrays = {n: t.detach().numpy().copy() for n, t in named_tensors(the_model()).items()}
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    strategy = DareStrategy(
        seed=1, drop_rate=0.5, exclude=["score"], downlink=make_downlink("auto")
    )
    result = strategy.start(MemoryGrid(app, CLIENTS), record, num_rounds=ROUNDS)
    assert result.evaluate_metrics_clientapp[ROUNDS]["sum"]
    return {name: array.numpy() for name, array in result.arrays.items()}


def main(rank: int, count: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )
    model, mesh = the_model(), init_device_mesh("cpu", (count,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if rank == 0:
        np.savez(folder / "final.npz", **run(app_of(lambda: model)))
    else:
        for number in range(2 * ROUNDS * CLIENTS):
            evaluates = number // CLIENTS % 2
            with federated_model(model) as turn:
                if evaluates:
                    [float(t.detach().sum()) for t in named_tensors(model).values()]
                else:
                    train(model)
            assert turn.reply(num_examples=4) is None
    # What the first process cannot do, all of them are told.
    try:
        with federated_model(model):
            pass
    except DareError as error:
        (folder / f"refused-{rank}").write_text(str(error))
    dist.barrier()  # who goes first takes the others' store along
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stderr.flush()
    os._exit(0)  # threads of gloo now and then abort a process that ends by itself
