"""Statistics, end to end against the reference code's merges, and against autograd."""

import json
from pathlib import Path

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from dare_agg.merge.collect import collect_fisher, collect_grams
from dare_agg.merge.engine import merge_deltas
from dare_agg.offline.statistics import read_texts, write_statistics
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source
from simulations.runs.sparsifiers import dare_given

torch = pytest.importorskip("torch")
DATA = Path(__file__).resolve().parents[1] / "data" / "mergelm"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file}


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k[len(prefix) + 1 :]: v for k, v in arrays.items() if k.startswith(prefix + "/")}


class Tiny(torch.nn.Module):
    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(11, 6)
        self.enc = torch.nn.Module()
        self.enc.fc1 = torch.nn.Linear(6, 8)
        self.enc.norm = torch.nn.LayerNorm(8)
        self.enc.fc2 = torch.nn.Linear(8, 6, bias=False)
        self.conv = torch.nn.Conv1d(6, 6, 3, padding=1)
        self.temperature = torch.nn.Parameter(torch.zeros(()))
        self.gain = torch.nn.Parameter(torch.zeros(1))
        self.classifier = torch.nn.Linear(6, 3)
        self.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.emb(ids)
        h = h + self.enc.fc2(torch.tanh(self.enc.norm(self.enc.fc1(h))))
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.classifier((h * self.gain).mean(1)) * self.temperature


def tiny(model: int) -> Tiny:
    weights = under(load("models_A"), f"m{model}")
    weights.pop("param_order", None)
    return Tiny(weights)


def batches(arrays: dict[str, np.ndarray], model: int) -> list[dict[str, torch.Tensor]]:
    found = under(arrays, f"m{model}")
    return [{"ids": torch.tensor(found[key])} for key in sorted(found) if key.endswith("/ids")]


def merged(expected: dict, method: str, statistics: list, **options: object) -> tuple:
    layout = layout_of({name: array.shape for name, array in expected.items()})
    models = load("models_A")
    base = layout.flatten(under(models, "base"))
    sources = [array_source(layout.flatten(under(models, f"m{i}")) - base) for i in range(2)]
    delta, _ = merge_deltas(layout, sources, method, statistics=statistics, options=options)
    return base + delta, layout.flatten(expected)


@pytest.mark.parametrize("examples", [12, 8, 5])
@pytest.mark.parametrize("norm", [0, 1])
def test_fisher_end_to_end(examples: int, norm: int) -> None:
    arrays = load("fisher_end_to_end")
    expected = under(arrays, f"nums{examples}/norm{norm}")
    statistics = []
    for i in range(2):
        found = collect_fisher(tiny(i), batches(arrays, i), rule="reference", examples=examples)
        statistics.append({name: found[name] for name in expected})
    got, wanted = merged(expected, "fisher", statistics, normalize=bool(norm))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_of_dropped_models(method: str) -> None:
    arrays = under(load("dare_regmean_fisher"), f"{method}_merging")
    ids = load("dare_regmean_fisher")
    expected = {k: v for k, v in arrays.items() if not k.startswith("drop_mask/")}
    layout = layout_of({name: array.shape for name, array in expected.items()})
    models = load("models_A")
    base = under(models, "base")
    sources, statistics = [], []
    for i in range(2):
        weights = under(models, f"m{i}")
        for name, drop in under(arrays, f"drop_mask/m{i}").items():
            delta = (weights[name] - base[name]).reshape(-1)
            kept = dare_given(delta, drop.reshape(-1) != 0, "0.5").reshape(drop.shape)
            weights[name] = base[name] + kept
        weights.pop("param_order", None)
        sources.append(array_source(layout.flatten(weights) - layout.flatten(base)))
        if method == "fisher":
            found = collect_fisher(Tiny(weights), batches(ids, i), rule="reference", examples=16)
        else:
            found = collect_grams(Tiny(weights), batches(ids, i), examples=16)
        statistics.append({k: v for k, v in found.items() if k in expected})
    options = {"normalize": True} if method == "fisher" else {"off-diagonal": 0.9, "ridge": 0}
    delta, _ = merge_deltas(layout, sources, method, statistics=statistics, options=options)
    np.testing.assert_allclose(
        layout.flatten(base) + delta, layout.flatten(expected), rtol=0,
        atol=1e-6 if method == "fisher" else 2e-4,
    )  # fmt: skip


@pytest.mark.parametrize("norm", [0, 1])
@pytest.mark.parametrize("weights", [None, [0.3, 0.9]])
def test_fisher_of_a_regression(norm: int, weights: list[float] | None) -> None:
    arrays = load("fisher_regression")
    models, statistics = [], []
    for i in range(2):
        named = {k: arrays[f"m{i}/{k}"] for k in ("l.weight", "l.bias")}
        network = torch.nn.Module()
        network.l = torch.nn.Linear(3, 1)
        network.load_state_dict({k: torch.tensor(v) for k, v in named.items()})
        rows = [
            {key: torch.tensor(arrays[f"m{i}/batch{b}/{key}"]) for key in ("x", "y")}
            for b in range(2)
        ]
        rows = [{"x": row["x"], "labels": row["y"]} for row in rows]
        statistics.append(
            collect_fisher(network, rows, rule="reference", forward=lambda m, b: m.l(b["x"]))
        )
        models.append(named)
    layout = layout_of({k: v.shape for k, v in models[0].items()})
    sources = [array_source(layout.flatten(m)) for m in models]
    got, _ = merge_deltas(
        layout, sources, "fisher", statistics=statistics, weights=weights,
        options={"normalize": bool(norm)},
    )  # fmt: skip
    named = "none" if weights is None else "0.3_0.9"
    expected = layout.flatten(under(arrays, f"norm{norm}/coef_{named}"))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("examples", [16, 8, 6])
def test_regmean_end_to_end(examples: int) -> None:
    arrays = load("regmean_end_to_end")
    statistics = []
    for i in range(2):
        found = collect_grams(tiny(i), batches(arrays, i), examples=examples)
        inputs = under(arrays, f"nums{examples}/linear_input/m{i}")
        for name, x in inputs.items():
            np.testing.assert_allclose(found[f"{name}.weight"], x.T @ x / len(x), atol=1e-5)
        statistics.append({f"{name}.weight": found[f"{name}.weight"] for name in inputs})
    for alpha in ("1.0", "0.9"):
        expected = under(arrays, f"nums{examples}/alpha{alpha}")
        got, wanted = merged(
            expected, "regmean", statistics, **{"off-diagonal": float(alpha), "ridge": 0}
        )
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-4)


def test_the_true_fisher_is_the_expected_squared_score() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3)
    x = torch.randn(6, 4)
    found = collect_fisher(linear, [{"x": x[:4]}, {"x": x[4:]}], forward=lambda m, b: m(b["x"]))
    p = torch.softmax(linear(x), -1).detach()
    # d log p_c / d W_k = (1[c=k] - p_k)·x
    score = torch.eye(3)[None] - p[:, None, :]
    weights = (p[:, :, None] * score.square()).sum(1)
    np.testing.assert_allclose(found["bias"], weights.mean(0), rtol=1e-5)
    expected = (weights[:, :, None] * x.square()[:, None, :]).mean(0)
    np.testing.assert_allclose(found["weight"], expected, rtol=1e-5)


def test_padding_is_left_out() -> None:
    linear = torch.nn.Linear(3, 2)
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    batch = {"x": x, "attention_mask": mask}
    model = torch.nn.Sequential(linear)
    found = collect_grams(model, [batch], forward=lambda m, b: m(b["x"]))["0.weight"]
    kept = x[mask.bool()]
    np.testing.assert_allclose(found, kept.T @ kept / 5, rtol=1e-5)
    whole = collect_grams(model, [batch], include_padding=True, forward=lambda m, b: m(b["x"]))[
        "0.weight"
    ]
    assert not np.allclose(found, whole)


def test_files_and_errors(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n"one, two",1\n')
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one, two"}) + "\n")
    for name in ("a.csv", "a.jsonl"):
        assert list(read_texts(tmp_path / name, "text")) == ["one, two"]
        with pytest.raises(ConfigError, match="did you mean 'text'"):
            list(read_texts(tmp_path / name, "texts"))
    with pytest.raises(ConfigError, match="did you mean 'true'"):
        collect_fisher(torch.nn.Linear(1, 2), [], rule="ture")
    write_statistics(tmp_path / "s.safetensors", {"w": np.ones(2, np.float32)}, "fisher", {})
    assert (tmp_path / "s.safetensors").exists()


@pytest.mark.slow
def test_a_classifiers_folder_with_its_head_inside_or_beside_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.numpy import load_file, save_file

    from dare_agg.offline.statistics import statistics_of_folder

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "a.csv").write_text("text,label\none two,0\nthree,1\ntwo two one,1\n")
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    whole = transformers.BertForSequenceClassification(config)
    folder, plain = tmp_path / "whole", tmp_path / "plain"
    whole.save_pretrained(folder)
    whole.bert.save_pretrained(plain)
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    for place in (folder, plain):
        tokenizer.save_pretrained(place)
    data = tmp_path / "a.csv"
    names = set(load_file(folder / "model.safetensors"))
    for rule in ("true", "reference"):
        found = statistics_of_folder(folder, data, "fisher", rule=rule)
        assert set(found) == names and all((a >= 0).all() for a in found.values())
        assert found["classifier.weight"].any()
    # An encoder without its head: nothing is drawn at random.
    with pytest.raises(ConfigError, match=r"lacks 'classifier\.bias' \(2 tensors"):
        statistics_of_folder(plain, data, "fisher")
    # As `dare-agg run` writes it; a head of zeros is blind to the encoder.
    for factor in (1, 0):
        head = {"head.weight": np.full((3, 8), 0.1, np.float32), "head.bias": np.zeros(3, "f4")}
        head["head.weight"][1] *= -factor
        head["head.weight"] *= factor
        save_file(head, plain / "head.safetensors")
        found = statistics_of_folder(plain, data, "fisher")
        assert set(found) <= {n.removeprefix("bert.") for n in names}
        assert any(a.any() for a in found.values()) == bool(factor)
    grams = statistics_of_folder(plain, data, "gram")
    assert grams["encoder.layer.0.intermediate.dense.weight"].shape == (8, 8)
    assert "head.weight" not in grams
