"""The real ServerApp and ClientApp on a tiny model, over an in-memory grid."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from safetensors.numpy import load_file

from client import outlook as client_outlook
from client.app import app as client_app
from dare_agg.cli.outlook import cost_lines
from dare_agg.cli.progress import load_rows, missed_lines
from dare_agg.errors import ConfigError, RunError, StateError
from dare_agg.flower.records import UPDATE_KEY
from dare_agg.runs.by_task import task_cells
from server import outlook as server_outlook
from server.app import main as run_server
from server.config import DEFAULTS
from simulations.runs.memory_grid import pretend_task, stamp
from tests.chat import make_model

HERE = Path(__file__).resolve().parent


def _load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


GRID = _load(HERE.parent / "flower" / "conftest.py", "flower_grid").MemoryGrid
FILES = _load(HERE.parent / "client" / "conftest.py", "client_files")
tiny_model, review_files = FILES.tiny_model, FILES.review_files
tiny_language_model, SAVED = FILES.tiny_language_model, "model.safetensors"


@pytest.fixture(autouse=True)
def task_identity():
    pretend_task()


@pytest.fixture
def run(tiny_model, review_files, tmp_path):
    def go(clients=3, node_config=None, into="run", tamper=None, **changes):
        raw = DEFAULTS | {
            "model": str(tiny_model),
            "data": str(review_files["csv"]),
            "text-column": "review",
            "label-column": "tone",
            "output": str(tmp_path / into),
            "num-rounds": 3,
            "partition": "iid",
            "min-clients": clients,
            "length": 12,
            "steps": 10,
            "learning-rate": 1e-3,
            "head-learning-rate": 1e-2,
            "drop-rate": "0.5",
        }
        raw |= {key.replace("_", "-"): value for key, value in changes.items()}
        raw = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in raw.items()}
        grid = GRID(client_app, clients, run_config=raw, node_config=node_config, tamper=tamper)
        context = Context(1, 1, {}, RecordDict(), raw)
        run_server(grid, context)
        folder = tmp_path / into
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return folder, rows, json.loads((folder / "run.json").read_text())

    return go


def last(rows, method):
    return [row for row in rows if row["method"] == method][-1]


def test_rounds_choose_what_is_sent_rows_tell_it_and_a_resumed_run_goes_on(run):
    words = {"drop_rate": "auto", "steps": 2, "evaluate": False, "save_model": False}
    _, rows, state = run(num_rounds=3, **words)
    assert state["config"]["drop-rate"] == state["config"]["values"] == "auto"
    assert (rows[0]["drop_rate"], rows[0]["value_format"]) == (0, "b4")
    assert all(row["noise"] < 0.1 and row["noise_of_change"] < 1 for row in rows)
    for row in rows:
        told = row["by_client"]
        assert [one["client"] for one in told] == ["0", "1", "2"]
        assert sum(one["bytes"] for one in told) == row["upload_bytes"]
        assert all(one["examples"] > 0 and one["values"] == row["value_format"] for one in told)
    run(num_rounds=1, into="again", **words)
    _, again, resumed = run(num_rounds=3, into="again", resume=True, **words)
    assert resumed["fingerprints"] == state["fingerprints"]
    # The clock goes on where the rounds before ended, though another process counts.
    assert again[1]["seconds"] >= again[0]["seconds"] + again[1]["round_seconds"]
    told = ("drop_rate", "value_format", "noise", "noise_of_change")
    assert [[row[key] for key in told] for row in again] == [
        [row[key] for key in told] for row in rows
    ]


def test_rows_of_several_drop_rates_are_what_runs_of_one_are(run):
    words = {"steps": 2, "evaluate": False, "num_rounds": 2, "methods": "fedavg,dare-ties"}
    folder, rows, state = run(drop_rate="0.5,0.9", **words)
    names = ["fedavg", "dare-ties_p0.5", "dare-ties_p0.9"]
    assert list(state["fingerprints"]) == names
    assert [row["method"] for row in rows] == [name for name in names for _ in range(2)]
    assert last(rows, names[2])["drop_rate"] == pytest.approx(0.9)
    assert (folder / "model-dare-ties_p0.9" / "model.safetensors").is_file()
    _, _, alone = run(drop_rate="0.9", into="alone", **{**words, "methods": "dare-ties"})
    assert alone["fingerprints"]["dare-ties"] == state["fingerprints"]["dare-ties_p0.9"]
    # It goes on as it was begun, each row from its own state.
    run(drop_rate="0.5,0.9", into="again", **{**words, "num_rounds": 1})
    _, _, resumed = run(drop_rate="0.5,0.9", into="again", resume=True, **words)
    assert resumed["fingerprints"] == state["fingerprints"]


@pytest.mark.slow
def test_methods_run_one_after_another_on_the_same_start(run):
    folder, rows, status = run(
        methods="fedavg,dare-task-arithmetic,dare-ties,head-only", num_rounds=4
    )
    assert status["status"] == "completed" and status["labels"] == ["negative", "positive"]
    dense, dare = last(rows, "fedavg"), last(rows, "dare-task-arithmetic")
    assert dense["accuracy"] > 0.8
    assert dare["accuracy"] > 0.8
    assert dense["update_bytes_per_client"] > 40 * dare["update_bytes_per_client"]
    assert len(rows) == 16
    assert all(row["accepted"] == 3 and row["rejected"] == [] for row in rows)
    saved = load_file(folder / "model-dare-ties" / "model.safetensors")
    assert "embeddings.word_embeddings.weight" in saved
    card = (folder / "model-dare-ties" / "README.md").read_text()
    assert status["fingerprints"]["dare-ties"] in card and "base_fingerprint" in card
    assert list((folder / "tensorboard" / "fedavg").iterdir())


@pytest.mark.slow
def test_with_the_version_downlink_only_steps_travel_both_ways(run, tmp_path):
    _, rows, state = run(
        downlink="auto", drop_rate="0.9", node_config=lambda n: {
            "partition-id": n, "num-partitions": 3, "cache": str(tmp_path / "cache"),
        },
    )  # fmt: skip
    assert [row["accepted"] for row in rows] == [3, 3, 3] and state["status"] == "completed"
    for row in rows:
        # Clients make the base themselves; what they are sent, the evaluation's step included,
        # is some bits on the union of the masks, not 32 a parameter.
        assert 0 < row["download_bytes_per_client"] < 4 * row["parameters"] / 10
        assert row["download_bytes"] > row["evaluate_download_bytes"] > 0


@pytest.mark.slow
def test_same_seed_same_final_fingerprint(run):
    first, again, other = (
        run(num_rounds=2, seed=seed, save_model=False, into=name)[2]["fingerprints"]
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other


@pytest.mark.slow
def test_exported_encoder_loads_with_transformers(run):
    from transformers import AutoModel

    folder, _, _ = run(num_rounds=1)
    exported = folder / "model-dare-task-arithmetic"
    model = AutoModel.from_pretrained(exported)
    saved = load_file(exported / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    assert np.array_equal(dict(model.named_parameters())[name].detach().numpy(), saved[name])


def test_lora_sends_adapters_only(run, tiny_model):
    folder, rows, _ = run(train="lora", num_rounds=2, methods="fedavg")
    assert rows[-1]["update_bytes_per_client"] < 20_000
    # The folder loads by itself: the base with the adapter in it, the adapter beside it.
    saved = folder / "model-fedavg"
    encoder, base = load_file(saved / "model.safetensors"), load_file(tiny_model / SAVED)
    moved = {name for name in base if not np.array_equal(base[name], encoder[name])}
    assert moved and all(".query." in name or ".value." in name for name in moved)
    assert set(load_file(saved / "head.safetensors")) == {"head.weight", "head.bias"}
    adapters = load_file(saved / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters)
    assert rows[-1]["parameters"] == sum(array.size for array in adapters.values())


def _logits(model):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.arange(2, 12)[None]).logits.numpy()


@pytest.mark.slow
def test_a_language_model_may_begin_with_a_base_on_disk(run, tiny_language_model, tmp_path):
    from transformers import AutoModelForCausalLM

    words = {
        "task": "causal-lm", "model": str(tiny_language_model), "base": str(tiny_language_model),
        "verify_every": 1, "num_rounds": 2,
    }  # fmt: skip
    folder, rows, status = run(**words)
    assert [row["accepted"] for row in rows] == [3, 3] and not rows[-1]["rejected"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    saved = folder / "model-dare-task-arithmetic"
    AutoModelForCausalLM.from_pretrained(saved)
    told = json.loads((saved / "provenance.json").read_text())
    (fingerprint,) = status["fingerprints"].values()
    assert told["final_fingerprint"] == fingerprint != told["base_fingerprint"]
    _, rows, status = run(**{**words, "num_rounds": 3}, resume=True)
    assert [row["round"] for row in rows] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_language_model_is_trained_and_exported(run, tiny_language_model, train):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = {"lora_rank": 2} if train == "lora" else {}
    folder, rows, _ = run(
        task="causal-lm", model=str(tiny_language_model), train=train, num_rounds=2, **words
    )
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["dense_bytes_per_client"] == 0
    assert rows[-1]["perplexity"] == pytest.approx(np.exp(rows[-1]["loss"]))
    saved = folder / "model-dare-task-arithmetic"
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert AutoTokenizer.from_pretrained(saved).eos_token == "[END]"
    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    assert not np.allclose(_logits(model), _logits(base), atol=1e-3)
    assert (saved / "adapter").is_dir() == (train == "lora")
    if train == "lora":
        adapted = PeftModel.from_pretrained(base, saved / "adapter")
        assert np.allclose(_logits(model), _logits(adapted), atol=1e-5)


def test_clients_of_two_abilities_are_told_apart(run, tmp_path):
    """Instruction data of two kinds, rows held out by each client: a table by client and task."""
    model = make_model(tmp_path / "chat")
    kinds = {
        "sums": [{"prompt": f"apples {n}", "answer": str(n)} for n in range(40)],
        "words": [{"prompt": f"left {n}", "answer": "many apples"} for n in range(40)],
    }
    paths = []
    for name, rows in kinds.items():
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(map(json.dumps, rows)))
    _, rows, status = run(
        clients=4, model=str(model), data=",".join(map(str, paths)), num_rounds=2, length=64,
        steps=8, learning_rate=1e-2, drop_rate="0", held_out=5.0, generate_rows=4,
        generate_tokens=4, packing=True,
    )  # fmt: skip
    assert status["status"] == "completed" and [row["accepted"] for row in rows] == [4, 4]
    told = rows[-1]["by_task"]
    assert [(one["client"], one["task"], one["rows"]) for one in told] == [
        ("0", "sums", 5), ("1", "words", 5), ("2", "sums", 5), ("3", "words", 5),
    ]  # fmt: skip
    assert not any(":" in key for key in rows[-1])
    mean = sum(one["exact-match"] for one in told) / 4
    assert rows[-1]["exact-match"] == pytest.approx(mean) and rows[-1]["loss"] < rows[0]["loss"]
    cells = task_cells(load_rows(tmp_path / "run")[-1])
    assert [line[:3] for line in cells[-2:]] == [
        ("all clients", "sums", "10"), ("all clients", "words", "10"),
    ]  # fmt: skip


def test_held_out_rows_that_leave_none_are_refused_before_training(run, tmp_path):
    with pytest.raises(RunError, match="held-out = 500 takes all 80 rows of a client"):
        run(held_out=500.0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("method", "message"),
    [("head-only", "no head of its own"), ("dare-fisher", "a pass for every word")],
)
@pytest.mark.parametrize("labels", ["", "negative,positive"])
def test_what_a_task_refuses_is_said_before_anyone_trains(
    run, tiny_language_model, tmp_path, method, message, labels
):
    with pytest.raises(RunError, match=message):
        run(
            methods=f"fedavg,{method}", labels=labels,
            task="causal-lm", model=str(tiny_language_model),
        )  # fmt: skip
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_clients_of_a_language_model_need_no_labels(run, tiny_language_model, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("good film\n\nfine book\n\n" * 40, encoding="utf-8")

    def node(partition):
        own = {"data-path": str(book)} if partition == 2 else {}
        return {"partition-id": partition, "num-partitions": 3, **own}

    _, rows, _ = run(
        node_config=node, model=str(tiny_language_model), task="causal-lm", num_rounds=1
    )
    assert rows[-1]["accepted"] == 3


def test_clients_of_different_tasks_share_one_encoder(run, tmp_path):
    """Heads stay local, so two nodes may have other labels than the rest."""
    rows = FILES.review_rows()
    other = tmp_path / "authors.jsonl"
    other.write_text(
        "\n".join(json.dumps({"review": r["review"], "tone": r["author"]}) for r in rows)
    )

    def node(partition):
        own = {"data-path": str(other)} if partition == 2 else {}
        return {"partition-id": partition, "num-partitions": 3, **own}

    _, rows, status = run(node_config=node, exclude=r"^head\.", dense="", num_rounds=2)
    assert status["status"] == "completed"
    assert rows[-1]["accepted"] == 3 and rows[-1]["dense_bytes_per_client"] == 0


@pytest.mark.slow
def test_each_node_may_bring_its_own_file(run, review_files):
    def node(partition):
        kind = ("csv", "jsonl", "parquet")[partition]
        return {"partition-id": partition, "data-path": str(review_files[kind])}

    _, rows, _ = run(node_config=node, num_rounds=1, data="nothing here")
    assert rows[-1]["clients"] == 3


@pytest.mark.slow
def test_partition_by_a_column(run):
    _, rows, _ = run(partition="column", partition_by="author", num_rounds=1)
    assert rows[-1]["accepted"] == 3


def test_a_typo_fails_before_any_node_is_asked(run, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'num-rounds'"):
        run(num_round=3)
    assert not (tmp_path / "run").exists()


def missing(*rounds):
    """Replies of training in these rounds (of one method, 2 clients) are errors."""
    seen = []

    def tamper(partition, reply):
        if not reply.has_error() and UPDATE_KEY not in reply.content:
            return reply
        seen.append(partition)
        if (len(seen) - 1) // 2 + 1 not in rounds:
            return reply
        asked = Message(RecordDict(), reply.metadata.src_node_id, "train")
        stamp(asked, message_id=reply.metadata.reply_to_message_id)
        error = Message(Error(code=5, reason="Node unavailable"), reply_to=asked)
        stamp(error, src_node_id=reply.metadata.src_node_id)
        return error

    return tamper


def test_missed_rounds_are_told_and_the_model_is_that_of_the_last_good_one(run, tmp_path):
    words = {"clients": 2, "num_rounds": 4, "methods": "dare-task-arithmetic"}
    folder, rows, status = run(tamper=missing(1, 3, 4), **words)
    assert status["status"] == "completed"
    assert [row["accepted"] for row in rows] == [0, 2, 0, 0]
    assert missed_lines(load_rows(folder)) == [
        "dare-task-arithmetic: 3 of 4 rounds left the model as it was, since nobody's update "
        "counted (round 1, 3, 4: 0: lost; 1: lost)"
    ]
    card = (folder / "model-dare-task-arithmetic" / "README.md").read_text()
    assert "| rounds | `2` |" in card and "| clients | `2` |" in card


def test_a_run_whose_rounds_all_miss_fails_and_is_trained_when_resumed(run, tmp_path):
    words = {"clients": 2, "num_rounds": 2, "methods": "dare-task-arithmetic"}
    with pytest.raises(RunError, match="none of 2 rounds got enough updates"):
        run(tamper=missing(1, 2), **words)
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status["status"] == "failed" and "Node unavailable" in status["error"]
    _, rows, status = run(resume=True, **words)
    assert status["status"] == "completed" and [row["accepted"] for row in rows] == [2, 2]


def test_more_missed_rounds_in_a_row_than_allowed_end_a_run(run, tmp_path):
    words = {"clients": 2, "num_rounds": 6, "methods": "dare-task-arithmetic"}
    with pytest.raises(RunError, match="round 3: 0 of 2 clients"):
        run(tamper=missing(2, 3, 4), max_empty_rounds=1, **words)


def test_a_run_in_which_nobody_can_train_fails_loudly(run, tmp_path):
    with pytest.raises(RunError, match="no column 'text'"):
        run(text_column="text")
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    assert status["status"] == "failed" and "no column" in status["error"]


@pytest.mark.slow
def test_clients_send_fisher_values_or_gram_matrices(run):
    words = {"num_rounds": 2, "clients": 2, "statistics_examples": 8}
    _, rows, status = run(methods="dare-average,dare-fisher,dare-regmean", **words)
    assert status["status"] == "completed"
    sent = {
        m: last(rows, m)["statistics_bytes_per_client"]
        for m in ("dare-average", "dare-fisher", "dare-regmean")
    }
    assert sent["dare-average"] == 0
    # Fisher values of the survivors alone: two bytes each, half of all parameters.
    parameters = last(rows, "dare-fisher")["parameters"]
    assert parameters < sent["dare-fisher"] < parameters * 1.01 + 300
    assert sent["dare-regmean"] > 0
    assert len({status["fingerprints"][m] for m in sent}) == 3


def test_a_second_run_in_the_same_folder_changes_nothing(run, tmp_path):
    run(2, num_rounds=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(StateError, match="holds a finished run"):
        run(2, num_rounds=2)
    with pytest.raises(StateError, match="nothing is left to resume"):
        run(2, num_rounds=1, resume=True)
    with pytest.raises(ConfigError, match=r"another config.*seed 0 → 3, steps 10 → 5"):
        run(2, num_rounds=2, resume=True, seed=3, steps=5)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    # More rounds are no other run.
    _, rows, state = run(2, num_rounds=2, resume=True)
    assert [row["round"] for row in rows] == [1, 2]
    assert state["status"] == "completed" and state["config"]["num-rounds"] == 2


def test_what_a_dry_run_says_is_what_a_run_does(run, tmp_path):
    words = {"methods": "fedavg,dare-ties,head-only", "num_rounds": 1, "partition": "dirichlet",
             "drop_rate": "0.9"}  # fmt: skip
    _, rows, status = run(clients=3, **words)
    raw = {
        key: ",".join(value) if isinstance(value, list) else value
        for key, value in status["config"].items()
    }
    found = client_outlook.outlook(raw, {})
    found |= server_outlook.outlook(raw, found)
    assert [one["name"] for one in found["methods"]] == ["fedavg", "dare-ties", "head-only"]
    for one in found["methods"]:
        row = last(rows, one["name"])
        assert row["upload_bytes_per_client"] == one["up"]
        # Besides the values, the message's own words, a tensor's name and form.
        tensors = len(found["states"][one["train"]])
        assert 0 <= row["download_bytes_per_client"] - one["down"] <= 1500 + 256 * tensors
        assert row["parameters"] == one["parameters"]
    assert sum(client["rows"] for client in found["clients"]) == 192 and found["test_rows"] == 48
    assert all(sum(c["labels"].values()) == c["rows"] for c in found["clients"])
    assert found["step_seconds"] > 0 and found["client_bytes"] > 1e7
    lines = cost_lines(found, raw, 1, here=2)
    assert "2 side by side" in lines[0] and "a step" in lines[1]
