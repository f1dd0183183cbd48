"""Weights in bfloat16: rounding keeps small steps on average, and the base's own stays out."""

from dataclasses import replace

import numpy as np
import pytest
from plain_loop import lesson

from client.bfloat16 import round_stochastically
from client.config import configure
from client.kept_optimizer import KeptOptimizer
from client.learning import learn
from client.training import FineTuning, build_task
from dare_agg.errors import ConfigError

torch = pytest.importorskip("torch")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    values = torch.randn(40, generator=seeded()) * torch.logspace(-30, 30, 40)
    draws = values.repeat(20_000, 1)
    rounded = round_stochastically(draws, seeded(1))
    assert rounded.dtype == torch.bfloat16
    low = values.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)
    high = (values.view(torch.int32).bitwise_and(-(1 << 16)) + (1 << 16)).view(torch.float32)
    found = rounded.float()
    assert bool(((found == low) | (found == high)).all())
    gap = (high - low).abs().double()
    error = (found.double().mean(0) - values.double()).abs() / gap
    assert float(error.max()) < 0.02  # five deviations of a mean of 20,000
    nearest = values.bfloat16().double()
    assert float(((nearest - values.double()).abs() / gap).max()) > 0.3


def test_what_is_no_number_or_exact_stays():
    exact = torch.tensor([0.0, -0.0, 1.5, -256.0, float("inf"), -float("inf")])
    assert torch.equal(round_stochastically(exact, seeded()).float(), exact)
    strange = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert bool(round_stochastically(strange, seeded()).isnan().all())


def moved(weights, steps=200):
    """How far 4096 weights near 0.05 go by steps of 1e-5: by steps · 1e-5 in float32."""
    start = 0.04 + 0.02 * torch.rand(4096, generator=seeded())
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    weight = torch.nn.Parameter(start.to(dtype))
    begun = weight.detach().float().clone()
    config = configure(learning_rate=1e-5, weights=weights)
    learn(
        lesson({"w": weight}, lambda read: -weight.float().sum(), config, seed=(1, 2)),
        [np.arange(1)] * steps,
    )
    return float((weight.detach().float() - begun).mean()) / (steps * 1e-5)


def test_small_steps_arrive_on_average_and_vanish_to_the_nearest():
    assert moved("float32") == pytest.approx(1, abs=0.01)
    assert moved("bfloat16") == pytest.approx(1, abs=0.05)
    assert moved("bfloat16-nearest") == 0.0


@pytest.fixture(params=["bert", "llama"])
def task(request, tiny_model, tiny_language_model, review_files):
    kind, model = {
        "bert": ("text-classification", tiny_model),
        "llama": ("causal-lm", tiny_language_model),
    }[request.param]
    return build_task(
        configure(
            task=kind, model=str(model), data=str(review_files["csv"]), text_column="review",
            label_column="tone", length=12, steps=8, learning_rate=3e-4, weights="bfloat16",
        )
    )  # fmt: skip


def with_words(task, **words):
    return FineTuning(replace(task.config, **words), task.data, task.kind)


def test_weights_and_gradients_take_two_bytes_and_moments_stay_whole(task):
    from torch.optim.optimizer import register_optimizer_step_post_hook

    seen = []

    def watch(optimizer, *_):
        for group in optimizer.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                moments = {optimizer.state[p][k].dtype for k in ("exp_avg", "exp_avg_sq")}
                seen.append((p.dtype, p.grad.dtype, *moments))

    hook = register_optimizer_step_post_hook(watch)
    try:
        trained, _, _ = task.train(task.initial, np.arange(40), seed=[1])
    finally:
        hook.remove()
    named = dict(task._load().named_parameters())
    small = {n for n, p in named.items() if p.dtype == torch.bfloat16}
    assert small == {n for n in named if not n.startswith("head.")}
    assert set(seen) <= {(torch.bfloat16,) * 2 + (torch.float32,), (torch.float32,) * 3}
    assert (torch.bfloat16, torch.bfloat16, torch.float32) in seen
    assert all(array.dtype == np.float32 for array in trained.values())
    assert all(array.dtype == np.float32 for array in task.initial.values())


def test_the_bases_own_rounding_is_no_part_of_the_change(task):
    start = task.initial_state()
    still = with_words(task, learning_rate=1e-30, head_learning_rate=1e-30)
    same, _, _ = still.train(start, np.arange(40), seed=[1])
    rough = any(not np.array_equal(torch.tensor(a).bfloat16().float(), a) for a in start.values())
    assert rough and all(np.abs(same[name] - start[name]).max() < 1e-9 for name in start)


def test_a_round_is_near_that_of_float32_and_repeats(task):
    start, rows = task.initial_state(), np.arange(60)
    first, _, _ = task.train(start, rows, seed=[1])
    again, _, _ = with_words(task).train(start, rows, seed=[1])
    assert all(np.array_equal(first[name], again[name]) for name in start)
    whole, _, _ = with_words(task, weights="float32", precision="bfloat16").train(
        start, rows, seed=[1]
    )
    nearest, _, _ = with_words(task, weights="bfloat16-nearest").train(start, rows, seed=[1])
    names = [name for name in start if start[name].ndim == 2 and not name.startswith("head.")]

    def along(state):
        """The change along that of float32, as a share of it."""
        pairs = [(state[n] - start[n], whole[n] - start[n]) for n in names]
        return sum((a * b).sum() for a, b in pairs) / sum((b * b).sum() for _, b in pairs)

    assert along(first) > 0.8
    assert along(nearest) < along(first)
    assert task.evaluate(first)["loss"] < task.evaluate(start)["loss"]


def test_adapters_stay_float32_over_weights_in_bfloat16(task):
    lora = with_words(task, train="lora", lora_rank=2)
    start = lora.initial_state()
    trained, _, _ = lora.train(start, np.arange(40), seed=[1])
    named = dict(lora._load().named_parameters())
    assert {p.dtype for n, p in named.items() if n in start} == {torch.float32}
    assert {p.dtype for n, p in named.items() if n not in start} == {torch.bfloat16}
    assert any(not np.array_equal(trained[name], start[name]) for name in start)
    assert np.isfinite(lora.evaluate(trained)["loss"])


def test_kept_moments_keep_their_precision(task, tmp_path):
    rows = np.arange(40)
    kept = [KeptOptimizer(tmp_path, "0", ("run",), number) for number in (1, 2)]
    first, _, _ = task.train(task.initial, rows, seed=[1], moments=kept[0])
    anew, _, _ = task.train(first, rows, seed=[2])
    second, _, _ = task.train(first, rows, seed=[2], moments=kept[1])
    assert any(not np.array_equal(anew[name], second[name]) for name in anew)


def test_words():
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        configure(weights="bfloat")
    with pytest.raises(ConfigError, match="multiplied in bfloat16: leave precision out"):
        configure(weights="bfloat16", precision="float16")


@pytest.mark.parametrize("train", ["full", "lora"])
def test_such_a_model_generates(tiny_language_model, review_files, train):
    task = build_task(
        configure(
            task="causal-lm", model=str(tiny_language_model), data=str(review_files["csv"]),
            text_column="review", label_column="tone", length=12, weights="bfloat16", train=train,
        )
    )  # fmt: skip
    network, _ = task.network(task.initial, "test")
    ids = torch.tensor([[2, 3, 4]])
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        found = network.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3)
    assert found.shape == (1, 6)
