"""What will survive learns, nothing else; the update brings it, and says where more moved."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from dare_agg.codec.update_file import read_update_file  # noqa: E402
from dare_agg.errors import CheckpointError, ConfigError, LayoutError, NonFiniteError  # noqa: E402
from dare_agg.offline.diff import apply_update  # noqa: E402
from dare_agg.torch import learn_survivors  # noqa: E402
from tests.torch.small_model import Small  # noqa: E402


def made(head: int = 0, dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(0)
    return Small(50, 12, 2, head).to(dtype)


def train(model: Small, steps: int = 3, rate: float = 0.05, decay: float = 0.0) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    for step in range(steps):
        tokens = torch.arange(40).reshape(4, 10) + step
        optimizer.zero_grad()
        model(tokens % 10).backward()
        optimizer.step()


def saved(model: Small, path) -> None:
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(named, path, metadata={"format": "pt"})


def flat(model: Small) -> np.ndarray:
    named = sorted(model.named_parameters(), key=lambda one: one[0].encode())
    return np.concatenate([p.detach().float().reshape(-1).numpy() for _, p in named])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_brings_what_was_learned_and_nothing_else_moved(tmp_path, dtype):
    model = made(dtype=dtype)
    saved(model, tmp_path / "base.safetensors")
    before = flat(model)
    with learn_survivors(model, drop_rate="0.9", seed=3) as kept:
        train(model)
    moved = np.flatnonzero(flat(model) != before)
    assert moved.size > 0 and np.isin(moved, kept.places).all()
    assert abs(kept.places.size - before.size / 10) <= 1

    header = kept.write(tmp_path / "x.dare", values="f32")
    assert (header.rescale, header.values, header.seed) == (False, "f32", 3)
    apply_update(tmp_path / "base.safetensors", tmp_path / "x.dare", tmp_path / "out.safetensors")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out.safetensors")
    for name, parameter in model.named_parameters():
        # In float32 the difference is rounded, by half a unit in the last place.
        near = 2e-7 if dtype == torch.float32 else 0.0
        assert torch.allclose(found[name], parameter.detach(), rtol=near, atol=near), name


@pytest.mark.parametrize("values", ["b1", "b2", "i8"])
def test_few_bits_bring_it_nearly_and_unscaled(tmp_path, values):
    model = made()
    before = flat(model)
    with learn_survivors(model, drop_rate="0.9") as kept:
        train(model)
    kept.write(tmp_path / "x.dare", values=values)
    update, header = read_update_file(tmp_path / "x.dare")
    out = np.empty(before.size, np.float32)
    update.read(0, before.size, out)
    change = flat(model) - before
    error = np.square(out - change).sum() / np.square(change).sum()
    assert error < {"b1": 0.7, "b2": 0.25, "i8": 0.01}[values]
    assert header.base == kept.base and header.layout.fingerprint == kept.layout.fingerprint


def test_what_is_excluded_learns_whole_and_stays_out(tmp_path):
    model = made(head=7)
    head, before = model.score.weight.detach().clone(), flat(model)
    with learn_survivors(model, drop_rate="0.99", exclude=[r"^score\."]) as kept:
        model(torch.arange(7).reshape(1, 7)).backward()
        assert torch.count_nonzero(model.score.weight.grad) == model.score.weight.numel()
        model.zero_grad()
        torch.nn.init.zeros_(model.score.weight)
    assert not any(name.startswith("score.") for name in kept.layout.names)
    kept.write(tmp_path / "x.dare")
    assert not torch.equal(model.score.weight, head) and before.size > kept.layout.size


@pytest.mark.parametrize("seed, same", [(0, True), (1, False)])
def test_the_seed_draws_the_mask(seed, same):
    with learn_survivors(made(), drop_rate="0.9", seed=0) as one:
        pass
    with learn_survivors(made(), drop_rate="0.9", seed=seed) as other:
        pass
    assert np.array_equal(one.places, other.places) is same


def test_the_same_training_makes_the_same_bytes(tmp_path):
    for name in "ab":
        model = made()
        with learn_survivors(model, drop_rate="0.95") as kept:
            train(model)
        kept.write(tmp_path / f"{name}.dare")
    assert (tmp_path / "a.dare").read_bytes() == (tmp_path / "b.dare").read_bytes()


def test_gradients_are_whole_again_afterwards():
    model = made()
    with learn_survivors(model, drop_rate="0.99"):
        pass
    model(torch.arange(20).reshape(2, 10)).backward()
    inner = model.layers[0][0].weight.grad
    assert torch.count_nonzero(inner) == inner.numel()


def test_what_moved_outside_the_mask_is_no_update(tmp_path):
    model = made()
    with learn_survivors(model, drop_rate="0.9") as kept:
        train(model, decay=0.1)
    with pytest.raises(LayoutError, match="weight_decay to 0"):
        kept.write(tmp_path / "x.dare")
    assert not (tmp_path / "x.dare").exists()


def test_a_survivor_that_is_no_number_is_refused(tmp_path):
    model = made()
    with learn_survivors(model, drop_rate="0") as kept, torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError):
        kept.write(tmp_path / "x.dare")


def test_what_cannot_be_sent_is_refused_before_training(tmp_path):
    with (
        pytest.raises(LayoutError, match="exclude less"),
        learn_survivors(made(), exclude=[r"."]),
    ):
        pass
    double = made(dtype=torch.float64)
    with pytest.raises(LayoutError, match=r"torch\.float64"), learn_survivors(double):
        pass
    with learn_survivors(made(), drop_rate="0.9") as kept:
        pass
    with pytest.raises(ConfigError, match="b3"):
        kept.write(tmp_path / "x.dare", values="b3")
    (tmp_path / "x.dare").touch()
    with pytest.raises(CheckpointError, match="exists"):
        kept.write(tmp_path / "x.dare")
    kept.write(tmp_path / "x.dare", overwrite=True)


def test_a_model_in_pieces_is_refused():
    import torch.distributed as processes
    from torch.distributed.fsdp import fully_shard

    processes.init_process_group("gloo", store=processes.HashStore(), rank=0, world_size=1)
    try:
        model = made()
        mesh = processes.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(LayoutError, match="sharded over processes"), learn_survivors(model):
            pass
    finally:
        processes.destroy_process_group()
