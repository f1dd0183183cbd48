"""`dare_agg.simulate`: the same bits as under Flower, arrays and torch, wrong words."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import dare_agg
from dare_agg.errors import ConfigError, LayoutError, RunError

ROOT = Path(__file__).resolve().parents[2]


def _flower_tests():
    for name in ("toy", "conftest"):
        path = ROOT / "tests" / "flower" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"flower_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[f"flower_{name}"] = module
        if name == "toy":
            sys.modules.setdefault("toy", module)
        spec.loader.exec_module(module)
        yield module


def learned(toy, arrays, partition, number):
    """What the toy app's clients make of the arrays."""
    tuned = {}
    for name, array in arrays.items():
        step = toy.toy_delta(name, array.shape, partition, number) if array.dtype.kind == "f" else 1
        tuned[name] = np.asarray(array + step)
    return tuned, 10 * (partition + 1)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"drop_rate": 0.5, "values": "i8", "method": "ties", "dense": (r"^head\.",)},
        {"server_step": "adam", "mask": "bernoulli", "exclude": (r"^head\.",)},
        {"keep_rates": "last", "weighting": "equal", "scaling": 0.7},
        {"fraction_train": 0.5, "weight_bound": 1.0},
        {"method": "wudi", "drop_rate": 0.5},
    ],
    ids=str,
)
def test_the_same_bits_as_under_flower(words):
    from dare_agg.flower import DareStrategy
    from simulations.runs.memory_grid import pretend_task

    toy, conftest = _flower_tests()
    pretend_task()
    from flwr.app import ArrayRecord

    count = 5
    words = {"drop_rate": 0.9, "values": "b1", **words}
    strategy = DareStrategy(seed=7, fraction_evaluate=0.0, min_evaluate_nodes=0, **words)
    result = strategy.start(
        conftest.MemoryGrid(toy.toy_app(), count),
        ArrayRecord({n: _array(a) for n, a in toy.toy_arrays().items()}),
        num_rounds=3,
        timeout=600,
    )
    found = dare_agg.simulate(
        toy.toy_arrays(),
        range(count),
        lambda arrays, client, number: learned(toy, arrays, client, number),
        rounds=3,
        seed=7,
        **words,
    )
    expected = {name: array.numpy() for name, array in result.arrays.items()}
    assert list(found.arrays) == list(expected)
    for name, array in expected.items():
        assert np.array_equal(found.arrays[name], array), name
    assert len(found.rounds) == 3 and found.upload_bytes > 0


def _array(array):
    from flwr.app import Array

    return Array(array)


def test_the_readme_quick_starts_run(capsys):
    page = (ROOT / "docs" / "PYTHON.md").read_text(encoding="utf-8")
    codes = re.findall(r"```python\n(.*?)```", page, re.S)
    assert codes and all(len(code.splitlines()) <= 25 for code in codes)
    for code in codes:
        exec(code, {})
    said = capsys.readouterr().out
    shares = [float(found) for found in re.findall(r"accuracy (\d\.\d+)", said)]
    assert len(shares) >= 2 and min(shares) > 0.85


def test_a_torch_module_is_trained_in_place():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 2)
    seen = []

    def train(module, client, number):
        seen.append((client, number))
        with torch.no_grad():
            module.weight += 0.1 * client
        return 1

    start = model.weight.detach().clone()
    found = dare_agg.simulate(
        model, [1.0, 3.0], train, lambda module: {"first": module.weight[0, 0].item()},
        rounds=2, drop_rate=0, values="f32",
    )  # fmt: skip
    assert seen == [(1.0, 1), (3.0, 1), (1.0, 2), (3.0, 2)]
    assert torch.allclose(model.weight, start + 0.4, atol=1e-5)
    assert np.array_equal(found.arrays["weight"], model.weight.detach().numpy())
    assert found.metrics["first"] == model.weight[0, 0].item()


def test_a_client_without_numbers_counts_by_its_length_and_a_nan_not_at_all():
    start = {"w": np.zeros(50, np.float32)}

    def train(arrays, rows, number):
        return {"w": arrays["w"] + np.float32(np.mean(rows))}

    words = {"rounds": 1, "drop_rate": 0, "values": "f32"}
    found = dare_agg.simulate(start, [[1.0, 1.0, 1.0], [5.0]], train, **words)
    assert np.allclose(found.arrays["w"], 2.0)
    with np.errstate(invalid="ignore"):
        found = dare_agg.simulate(start, [[1.0], [float("nan")]], train, **words)
    assert np.allclose(found.arrays["w"], 1.0)
    assert [one.reason for one in found.rounds[0].rejected] == ["non-finite"]
    with pytest.raises(RunError, match="no client's update counts"):
        dare_agg.simulate(start, [[float("nan")]], train, **words)
    assert not start["w"].any()


@pytest.mark.parametrize(
    ("words", "error", "why"),
    [
        ({"rounds": 0}, ConfigError, "at least 1"),
        ({"fraction_train": 2.0}, ConfigError, "at most 1"),
        ({"method": "fisher"}, ConfigError, "DareStrategy"),
        ({"method": "tiess"}, ConfigError, "did you mean 'ties'"),
        ({"seed": -1}, ConfigError, "seed"),
    ],
)
def test_wrong_words(words, error, why):
    with pytest.raises(error, match=why):
        dare_agg.simulate({"w": np.zeros(9, np.float32)}, [1, 2], lambda a, c, n: a, **words)


def test_wrong_models_and_returns():
    start = {"w": np.zeros(9, np.float32)}
    with pytest.raises(ConfigError, match="arrays by name or a torch module"):
        dare_agg.simulate(3, [1], lambda a, c, n: a)
    with pytest.raises(ConfigError, match="no clients"):
        dare_agg.simulate(start, [], lambda a, c, n: a)
    with pytest.raises(ConfigError, match="train returned a NoneType"):
        dare_agg.simulate(start, [1], lambda a, c, n: None)
    with pytest.raises(LayoutError):
        dare_agg.simulate(start, [1], lambda a, c, n: {"w": np.zeros(4, np.float32)})
    with pytest.raises(AttributeError, match="no attribute"):
        dare_agg.nothing  # noqa: B018
