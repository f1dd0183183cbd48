"""One of the processes of `test_sharded.py`: trains a sharded model and encodes what it holds.

Run as ``python sharded_ranks.py RANK COUNT FOLDER DTYPE``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).parent))
from small_model import Small

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec
from dare_agg.errors import DareError
from dare_agg.torch.delta import TrainedDelta
from dare_agg.torch.loading import as_source, load_into
from dare_agg.torch.named import matched_tensors, named_tensors
from dare_agg.torch.places import held
from dare_agg.torch.ranks import SharedSource, all_ranks
from dare_agg.torch.sharded import encode_shared, measure_shared
from dare_agg.vectors.model import GlobalModel, global_model
from dare_agg.vectors.sources import ArraySource
from dare_agg.vectors.tiled import TiledVector


def the_model() -> torch.nn.Module:
    """A small model with tied weights."""
    torch.manual_seed(0)
    return Small(1001, 72, 3)


def spec_of(model: GlobalModel, values: str, mask: str, drop_rate: str) -> UpdateSpec:
    """What the update must be."""
    key = bytes(range(16))
    ref = model.ref
    rate = parse_drop_rate(drop_rate)
    return UpdateSpec(ref.size, rate, mask, key, key, 1, values, ref.base, ref.layout)


SPECS = [("b1", "stratified", "0.5"), ("f32", "bernoulli", "0.3"), ("i8", "stratified", "0")]


def main(rank: int, count: int, folder: Path, dtype: torch.dtype) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count
    )
    ranks = all_ranks()
    base = {n: t.detach().numpy().copy() for n, t in named_tensors(the_model()).items()}
    version = global_model(base, by_form=True)
    own = ArraySource(version.delta) if ranks.leads else None
    start = SharedSource(ranks, version.delta.size, own)
    model = the_model().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    mesh = init_device_mesh("cpu", (count,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    tensors = matched_tensors(version.groups, named_tensors(model))
    parts = {name: held(tensor, ranks.leads) for name, tensor in tensors.items()}
    shown = version.placed(TiledVector(start), version.dense, version.ref)
    begun = as_source(load_into(shown, parts).delta)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(64).reshape(4, 16) * 13 % 1001
    for _ in range(2):
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    if "embed" in sys.argv[5:]:
        del parts["embed.weight"], parts["score.weight"]
    delta = TrainedDelta(version.groups.layout, parts, begun, ranks.leads)
    measured = measure_shared(delta, ranks)
    updates = [encode_shared(spec_of(version, *spec), delta, ranks) for spec in SPECS]
    whole = {n: t.full_tensor().float().detach().numpy() for n, t in named_tensors(model).items()}
    if ranks.leads:
        for number, update in enumerate(updates):
            (folder / f"{number}.dare").write_bytes(update)
        np.savez(folder / "trained.npz", **whole)
        figures = [measured.norm, measured.largest, measured.above]
        (folder / "measured").write_text(" ".join(str(float(figure)) for figure in figures))
    if rank == count - 1:
        named_tensors(model)["norm.weight"].detach().to_local()[-1] = float("nan")
    try:
        measure_shared(delta, ranks)
    except DareError as error:
        (folder / f"refused-{rank}").write_text(str(error))
    dist.barrier()  # who goes first takes the others' store along
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), getattr(torch, sys.argv[4]))
    sys.stderr.flush()
    os._exit(0)  # threads of gloo now and then abort a process that ends by itself
