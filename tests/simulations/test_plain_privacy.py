"""What one client's plain update tells: the attacks on a model small enough to do by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Accepted, check_reply
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model
from simulations.bench import plain_privacy
from simulations.runs.reading import (
    auc,
    correlation,
    features_read,
    interval,
    label_scores,
    label_scores_by_encoder,
    words_read,
)
from simulations.runs.rows import RESULTS, read_rows

ROOT = Path(__file__).parents[2]
WORDS, WIDTH, CLASSES, LENGTH, CLIENTS = 400, 32, 4, 6, 40
LAST = "encoder.last.bias"
Named = dict[str, np.ndarray]


def base() -> Named:
    rng = np.random.default_rng(0)
    return {
        "encoder.words": rng.normal(size=(WORDS, WIDTH)).astype(np.float32),
        LAST: rng.normal(0.3, 0.1, WIDTH).astype(np.float32),
        "head.weight": rng.normal(0, 0.02, (CLASSES, WIDTH)).astype(np.float32),
        "head.bias": np.zeros(CLASSES, np.float32),
    }


def gradient(model: Named, text: np.ndarray, label: int) -> tuple[Named, np.ndarray]:
    """By hand: mean of the words' vectors and a term, under a linear head; and the features."""
    features = model["encoder.words"][text].mean(axis=0) + model[LAST]
    scores = model["head.weight"] @ features + model["head.bias"]
    error = np.exp(scores - scores.max())
    error /= error.sum()
    error[label] -= 1
    back = model["head.weight"].T @ error
    words = np.zeros_like(model["encoder.words"])
    np.add.at(words, text, back / len(text))
    found = {"encoder.words": words, LAST: back, "head.weight": np.outer(error, features)}
    return {**found, "head.bias": error}, features


def client(number: int, examples: int = 1) -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng([1, number])
    texts = [rng.choice(WORDS, LENGTH, replace=False) for _ in range(examples)]
    return texts, rng.integers(CLASSES, size=examples)


def received(number: int, p: str, examples: int = 1, **terms: Any) -> tuple[Named, Accepted]:
    """A client's update after one step of SGD, by the real codec; its delta as the server's."""
    model = base()
    pulls = [gradient(model, *one)[0] for one in zip(*client(number, examples), strict=True)]
    tuned = {
        n: (a - 0.1 * np.mean([g[n] for g in pulls], axis=0)).astype("f4") for n, a in model.items()
    }
    agreed = UpdateTerms(drop_rate=parse_drop_rate(p), values="f32", **terms)
    whole = global_model(model, dense=agreed.dense, exclude=agreed.exclude)
    key = number.to_bytes(32, "little")
    (plan,) = make_plans(key, 1, [None], agreed, whole.ref)
    sent = make_client_update(plan, model, tuned)
    reply = check_reply(plan, sent.blob, sent.dense_blob, 1)
    assert isinstance(reply, Accepted)
    delta: Named = {}
    for source, layout in (
        (reply.update, whole.groups.layout),
        (reply.dense, whole.groups.dense_layout),
    ):
        if source is not None:
            vector = np.empty(layout.size, np.float32)
            source.read(0, layout.size, vector)
            delta.update(layout.unflatten(vector))
    return delta, reply


def mean_features() -> np.ndarray:
    return base()["encoder.words"].mean(axis=0) + base()[LAST]


@pytest.mark.parametrize("p", ["0.9", "0.99"])
def test_a_head_that_travels_whole_tells_a_lone_examples_label_and_features(p):
    for number in range(CLIENTS):
        (text,), (label,) = client(number)
        delta, _ = received(number, p, dense=("^head",))
        scores = label_scores(delta["head.weight"], delta["head.bias"], mean_features())
        assert np.argmax(scores) == label
        guess = features_read(delta["head.weight"], scores, 1)
        _, own = gradient(base(), text, label)
        assert correlation(guess, own[None])[0] > 0.999


def test_a_local_head_is_in_no_update_yet_the_encoder_tells_the_label_until_much_is_dropped():
    named = {}
    for p in ("0", "0.9", "0.999"):
        right = 0
        for number in range(CLIENTS):
            delta, reply = received(number, p, exclude=("^head",))
            assert reply.dense is None and not [name for name in delta if "head" in name]
            survived = reply.update.present(0, WIDTH)  # the first tensor by name
            scores = label_scores_by_encoder(delta[LAST], survived, base()["head.weight"])
            right += int(np.argmax(scores)) == client(number)[1][0]
        named[p] = right / CLIENTS
    assert named["0"] == 1 and named["0.9"] > 0.8
    assert named["0.999"] < 0.5  # guessing names 0.25


def test_rows_of_the_embedding_tell_the_words_and_fewer_the_more_is_dropped():
    found = {}
    for p in ("0", "0.9", "0.99"):
        shares = []
        for number in range(CLIENTS):
            (text,), _ = client(number)
            delta, _ = received(number, p, exclude=("^head",))
            shares.append(words_read(delta["encoder.words"], text, ()))
        found[p] = np.mean(shares)
    assert found["0"] == 1 and found["0.9"] > 0.9
    assert LENGTH / WORDS < found["0.99"] < found["0.9"]
    assert words_read(delta["encoder.words"], text, [*text[1:]]) in (0.0, 1.0)


def membership(examples: int, p: str) -> float:
    """AUC of the cosine between an example's gradient and the encoder's update."""
    found = []
    for number in range(8):
        delta, _ = received(number, p, examples, exclude=("^head",))
        vector = np.concatenate([delta[LAST], delta["encoder.words"].ravel()])
        scores = []
        for who in (number, 1000 + number):
            pulls = [gradient(base(), *one)[0] for one in zip(*client(who, examples), strict=True)]
            flat = [np.concatenate([g[LAST], g["encoder.words"].ravel()]) for g in pulls]
            scores.append([-float(v @ vector) / float(np.linalg.norm(v)) for v in flat])
        found.append(auc(*scores))
    return float(np.mean(found))


def test_membership_is_told_less_by_larger_clients():
    assert membership(1, "0") == 1
    few, many = membership(4, "0"), membership(64, "0")
    assert 1 >= few > 0.9 > many > 0.5


def test_figures():
    assert auc([2, 3], [1, 2]) == 0.875 and auc([1], [1]) == 0.5
    assert correlation(np.ones(3), np.eye(3)).tolist() == [0, 0, 0]
    mean, low, high = interval([1.0] * 10, yes_or_no=True)  # Wilson 1927
    assert (mean, round(low, 3), round(high, 3)) == (1.0, 0.722, 1.0)
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], yes_or_no=False)
    half = 2.5706 * np.std([1, 2, 3, 4, 5, 6], ddof=1) / 6**0.5  # Student's t, 5 degrees
    assert mean == 3.5 and high - mean == pytest.approx(half, rel=2e-3)
    assert mean - low == pytest.approx(high - mean)


def test_the_table_in_security_md_is_that_of_the_rows():
    rows = read_rows(RESULTS / "plain_privacy.jsonl")
    wanted = len(plain_privacy.SIZES) * plain_privacy.CLIENTS + len(plain_privacy.OVER_ROUNDS)
    assert len(rows) == wanted
    assert plain_privacy.markdown(rows) in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def _files() -> Any:
    path = ROOT / "tests" / "client" / "conftest.py"
    spec = importlib.util.spec_from_file_location("client_files", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["client_files"] = module
    spec.loader.exec_module(module)
    return module


tiny_model = _files().tiny_model


def test_the_benchmark_on_a_tiny_encoder(tiny_model, tmp_path, monkeypatch):
    """Every way and every attack really runs, and a second call measures nothing again."""
    rng = np.random.default_rng(0)
    words = _files().WORDS
    texts = [" ".join(rng.choice(words, 4)) for _ in range(120)]
    lines = [f"{text},{'north' if i % 2 else 'south'}" for i, text in enumerate(texts)]
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["text,label", *lines]))
    for name, value in {"SIZES": (1, 4), "CLIENTS": 1, "ROUNDS": 3, "ROUND_CLIENTS": 2}.items():
        monkeypatch.setattr(plain_privacy, name, value)
    task = {"model": str(tiny_model), "data": str(data), "length": 4}
    out = tmp_path / "rows.jsonl"
    rows = plain_privacy.run(out, **task)
    assert [row["kind"] for row in rows] == ["client", "client", "rounds", "rounds"]
    assert rows == plain_privacy.run(out, **task)
    found = rows[0]["found"]
    assert found["FedAvg"]["words"] == 1 and found["p=.9"]["label"] == 1
    assert found["p=.9"]["cosine of the head"] > 0.5
    for row in plain_privacy.summary(rows):
        assert -1 <= row["mean"] <= 1, row
    table = plain_privacy.markdown(rows)
    assert table.splitlines()[0].endswith("| 1 | 4 |")
