"""Abilities tuned, sent, merged and measured, on a tiny random Llama that reads bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import layout_of
from simulations.pages import abilities as pages
from simulations.run import run_row
from simulations.runs import ability_data, ability_models
from simulations.runs.directions import kept_directions, sent_directions
from simulations.runs.scenario import KINDS, SCENARIOS, Row, read_scenario

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
ABILITIES = {
    "arithmetic": {"steps": 3, "batch": 4, "learning_rate": 1e-2, "test_rows": 6},
    "code": {"steps": 3, "batch": 4, "learning_rate": 1e-2, "test_rows": 5},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bytes-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture
def row(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))
    monkeypatch.setattr(ability_data, "_MOST_CHARACTERS", 1 << 14)
    monkeypatch.setattr(ability_data, "_MOST_PROBLEMS", 64)

    def make(kind: str = "abilities", **settings: Any) -> Row:
        task = {"model": str(model), "train": "full", "length": 16, "precision": "float32"}
        given = {**KINDS[kind][1], "abilities": ABILITIES, "task": task, **settings}
        return Row("test", kind, "cell", 0, given)

    return make


def methods(*specs: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"sets": [["arithmetic", "code"]], "methods": list(specs), **settings}


def test_models_alone_learn_their_ability_and_are_kept(row, tmp_path):
    found = run_row(row())["points"]
    scores = {point["model"]: point["scores"] for point in found}
    assert set(scores) == {"base", *ABILITIES}
    for name in ABILITIES:
        assert scores[name][name]["loss"] < scores["base"][name]["loss"] - 0.1
    assert scores["base"]["arithmetic"]["exact"] == 0
    assert {f.name.partition("-")[0] for f in tmp_path.rglob("*.npy")} == set(ABILITIES)
    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.npy")}
    assert run_row(row())["points"] == found
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.npy")} == stamps


def test_a_set_of_one_whole_delta_is_the_model_itself(row):
    alone = run_row(row())["points"]
    own = next(point["scores"]["code"] for point in alone if point["model"] == "code")
    words = {"sets": [["code"]], "methods": [{"method": "average"}, {"method": "ties"}]}
    average, ties = run_row(row(**words, update={"drop_rate": "0"}))["points"]
    assert average["scores"]["code"] == own
    assert ties["scores"]["code"] != own  # a fifth of the delta is left
    assert average["bits_per_parameter"] == 32


def test_updates_are_the_librarys_own_and_their_bits_are_counted(row):
    average = {"method": "average"}
    wudi = {"method": "wudi", "options": {"ridge": 0.1}}
    update = {"drop_rate": "0.5", "values": "b1", "rank": 2, "bits": 4}
    found = run_row(
        row(
            **methods(
                average, {**wudi, "gram": "own"}, {**wudi, "gram": "whole"},
                {**wudi, "gram": "directions"}, update=update,
            )
        )
    )["points"]  # fmt: skip
    bits = [point["bits_per_parameter"] for point in found]
    assert 0.5 < bits[0] == bits[1] == bits[2] < bits[3]
    losses = {point["gram"]: point["scores"]["code"]["loss"] for point in found}
    assert len(set(losses.values())) == 4


def test_grams_of_inputs_serve_regmean(row):
    spec = {"method": "regmean", "gram": "inputs"}
    (point,) = run_row(row(**methods(spec, update={})))["points"]
    assert np.isfinite(point["scores"]["code"]["loss"])
    with pytest.raises(ConfigError, match="gram 'outputs' is unknown"):
        run_row(row(**methods({"method": "wudi", "gram": "outputs"})))
    with pytest.raises(ConfigError, match="needs rank and bits"):
        run_row(row(**methods({"method": "wudi", "gram": "directions"})))


def test_answers_do_not_depend_on_who_is_asked_beside_them(row, model):
    task = row().settings["task"]
    decoder = ability_models.Decoder(task, 0)
    config = ability_models.ability_config(task, ABILITIES["arithmetic"], 0)
    rows = ability_data.ability_data("arithmetic", config, ("test",))["test"]
    together = decoder.answers(rows)
    alone = [decoder.answers(rows.take(np.array([i])))[0] for i in range(len(rows))]
    assert together == alone
    assert len(set(together)) > 1 or together[0] != ""


def test_a_masked_loss_is_that_of_the_answers_alone(row):
    import torch

    task = row().settings["task"]
    decoder = ability_models.Decoder(task, 0)
    config = ability_models.ability_config(task, ABILITIES["arithmetic"], 0)
    rows = ability_data.ability_data("arithmetic", config, ("test",))["test"]
    total, count = 0.0, 0
    for coded in rows.inputs:
        ids = torch.tensor([coded.ids])
        with torch.no_grad():
            logs = decoder.network(input_ids=ids).logits[0].log_softmax(-1)
        for at in range(coded.prompt, coded.size):
            total -= float(logs[at - 1, coded.ids[at]])
            count += 1
    assert decoder.loss("arithmetic", config, rows) == pytest.approx(total / count, rel=1e-5)


def test_splits_of_the_standard_library_share_no_file():
    found = {split: ability_data.python_library(split) for split in ability_data.SPLITS}
    assert all(sum(map(len, texts)) > 1 << 18 for texts in found.values())
    for one, other in (("train", "tuning"), ("train", "test"), ("tuning", "test")):
        same = set(found[one]) & set(found[other])
        assert all(len(text) < 100 for text in same)  # empty packages and their like


def test_rounds_of_abilities_lower_every_loss(row):
    words = {"rounds": 3, "evaluate_every": 3, "each": 2, "drop_rate": "0.5"}
    dense = run_row(row("federated-abilities", method="fedavg", **words))
    few = run_row(row("federated-abilities", method="dare", **words))
    for found in (dense, few):
        first, last = found["curve"][0]["scores"], found["curve"][-1]["scores"]
        for name in ABILITIES:
            assert last[name]["loss"] < first[name]["loss"]
    assert dense["clients"] == 4
    assert dense["upload_bytes_per_client_round"] == 4 * dense["parameters"]
    assert few["upload_bytes_per_client_round"] < dense["upload_bytes_per_client_round"] / 20


def test_directions_arrive_near_and_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    layout = layout_of({"embed.weight": (9, 24), "a.weight": (40, 24), "norm.weight": (24,)})
    delta = rng.standard_normal(layout.size).astype(np.float32)
    exact = kept_directions(tmp_path / "kept", layout, delta, 4)
    assert set(exact) == {"a.weight"} and exact["a.weight"].shape == (4, 24)
    again = kept_directions(tmp_path / "kept", layout, np.zeros_like(delta), 4)
    np.testing.assert_array_equal(again["a.weight"], exact["a.weight"])
    rows = exact["a.weight"][:2]
    errors = []
    for bits in (4, 8):
        found, spent = sent_directions(exact, layout, 2, bits, bytes(16))
        assert 2 * 24 * bits < spent < 2 * 24 * bits + 2 * 2048 + 8 * 64
        errors.append(np.square(found["a.weight"] - rows).sum() / np.square(rows).sum())
    assert errors[1] < errors[0] / 20 < 0.005


def test_scenarios_can_be_read():
    for name in ("abilities", "abilities-federated"):
        scenario = read_scenario(SCENARIOS / f"{name}.toml")
        assert len({row.key for row in scenario.rows()}) == len(list(scenario.rows()))


def test_pages_show_what_each_ability_keeps(row, tmp_path):
    specs = ({"method": "average"}, {"method": "wudi", "gram": "directions"})
    update = {"drop_rate": "0.5", "values": "b1", "rank": 2, "bits": 4}
    rows = [
        {**run_row(row()), "seed": 0, "cell": "alone"},
        {**run_row(row(**methods(*specs, update=update))), "seed": 0, "cell": "updates"},
    ]
    single = pages.alone(rows)
    (spec, *_), points = next(iter(pages.merged(rows).items()))
    assert spec == ("arithmetic", "code")
    shares = pages.kept(points[0][1], 0, {0: {**single[0], "arithmetic": RIGHT, "base": WRONG}})
    scores = points[0][1]["scores"]
    assert shares["arithmetic"] == scores["arithmetic"]["exact"]
    assert shares["code"] == pytest.approx(
        (scores["code"]["loss"] - 6) / (single[0]["code"]["code"]["loss"] - 6)
    )
    own = dict(single[0])
    whole = {"set": ["code"], "scores": own["code"]}
    assert pages.kept(whole, 0, single) == {"code": 1}
    assert "p=.5, 1 bit + 2 directions of 4 bits" in pages.pairs_table(_able(rows))


RIGHT = {"arithmetic": {"exact": 1.0, "loss": 0.1}}
WRONG = {"arithmetic": {"exact": 0.0, "loss": 9.0}, "code": {"loss": 6.0}}


def _able(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which the tiny model's arithmetic got something right, so that gains can be told."""
    for row in rows:
        for point in row["points"]:
            if point.get("model") == "arithmetic":
                point["scores"]["arithmetic"]["exact"] = 0.5
    return rows


def test_a_base_model_without_a_template_answers_in_plain_turns(model):
    from client.tasks import causal_lm

    bare = causal_lm.load_tokenizer(str(model))
    bare.chat_template = None
    bare.save_pretrained(model / "bare")
    (model / "bare" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = ability_data.ability_tokenizer(str(model / "bare"))
    talk = (("user", "2+3?"), ("assistant", "5"))
    row = ability_data.coded_exchanges(tokenizer, [talk])[0]
    assert tokenizer.decode(row.ids) == "user:\n2+3?\nassistant:\n5<end>"
    assert tokenizer.decode(row.ids[row.prompt :]) == "5<end>"
    assert ability_data.ability_tokenizer(str(model)).chat_template == TEMPLATE


def test_rounds_are_told_by_what_fedavg_gained_and_what_was_sent():
    def row(cell, method, upload, ends):
        begin = {"arithmetic": {"exact": 0.0}, "code": {"loss": 3.0}, "dialogue": {"loss": 5.0}}
        end = {"arithmetic": {"exact": ends[0]}, "code": {"loss": ends[1]},
               "dialogue": {"loss": ends[2]}}  # fmt: skip
        return {
            "cell": cell, "method": method, "seed": 0, "parameters": 1000,
            "upload_bytes_per_client_round": upload, "curve": [{"scores": begin}, {"scores": end}],
        }  # fmt: skip

    rows = [
        row("FedAvg", "fedavg", 4000, (0.5, 2.8, 4.0)),
        row("DARE", "dare", 40, (0.4, 3.1, 4.5)),
    ]
    before, dense, dare = pages.rounds_table(rows).splitlines()[2:]
    assert before.split(" | ")[3:6] == ["0.0", "3.000", "5.000"]
    assert dense.split(" | ")[2:6] == ["1×", "50.0", "2.800", "4.000"]
    assert dare.split(" | ")[2:6] == ["100×", "40.0 (80)", "3.100 (-50)", "4.500 (50)"]
