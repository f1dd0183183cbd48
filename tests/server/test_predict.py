"""`dare-agg predict` and `dare-agg push`, from exports of real little models."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.config import configure
from client.predict import read_inputs
from client.rows import Data, Rows
from client.training import build_task
from dare_agg.cli.exported import exported_model
from dare_agg.cli.push import push_folder
from dare_agg.errors import ConfigError, RunError
from server.export import export_model
from tests.chat import make_model
from tests.runs.made_run import made_run
from tests.tiny import command

LABELS = ("negative", "positive")
TEXTS = ["good good film", "bad awful book", "the " * 40]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run's folder with the model of two methods, and what the second one's network scores."""
    folder = tmp_path_factory.mktemp("run")
    words = {"model": str(tiny_model), "length": 12, "labels": LABELS}
    config = configure(**words, task="text-classification")
    empty = Rows((), np.empty(0, np.int64), ())
    rows = Rows(tuple(TEXTS), np.zeros(len(TEXTS), np.int64), ("",) * len(TEXTS))
    task = build_task(config, Data("texts", empty, rows, LABELS))
    state = task.initial_state()
    state["head.weight"] *= 40
    network, reader = task.network(state, "test")
    import torch

    with torch.no_grad():
        shares = network(**reader(np.arange(len(TEXTS)))).softmax(dim=1).numpy()
    said = {"model": str(tiny_model), "length": 12, "labels": list(LABELS), "data": "/srv/r.csv",
            "text-column": "review"}  # fmt: skip
    for method in ("fedavg", "dare-ties"):
        export_model(
            folder / f"model-{method}", state, model=str(tiny_model), labels=LABELS,
            provenance={"method": method, "config": said},
        )  # fmt: skip
    return folder, shares


def predictions(capsys, *words: object) -> list[dict]:
    status, said = command(capsys, "predict", *words, "--json")
    assert not status, said
    found, _ = json.JSONDecoder().raw_decode(said[said.index("{") :])
    return found["predictions"]


def test_texts_and_files_have_the_probabilities_of_training(run, tmp_path, capsys):
    folder, shares = run
    file = tmp_path / "rows.csv"
    file.write_text("review,stars\n" + "".join(f"{text},1\n" for text in TEXTS))
    given = predictions(capsys, folder, *TEXTS, "--batch", 2)
    assert [one["input"] for one in given] == TEXTS
    for one, row in zip(given, shares, strict=True):
        assert one["label"] == LABELS[int(row.argmax())]
        assert abs(one["probabilities"]["positive"] - row[1]) < 1e-5
    read = predictions(capsys, folder / "model-fedavg", file)
    assert [one["probabilities"] for one in read] == [one["probabilities"] for one in given]


def test_a_table_for_people(run, capsys):
    status, said = command(capsys, "predict", run[0], TEXTS[0], "--method", "fedavg")
    assert not status and "good good film" in said and "probability" in said


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nothing.csv"], "file .*nothing.csv' does not exist"),
        (["a text", "--method", "fedavgg"], "did you mean 'fedavg'"),
    ],
)
def test_wrong_words_are_told_in_one_line(run, words, why, capsys):
    import re

    status, said = command(capsys, "predict", run[0], *words)
    assert status == 1 and said.count("error: ") == 1 and re.search(why, said)


def test_which_model_is_meant(run, tmp_path):
    folder = run[0]
    assert exported_model(folder).name in ("model-fedavg", "model-dare-ties")
    assert exported_model(folder / "model-fedavg").name == "model-fedavg"
    with pytest.raises(ConfigError, match="save-model was off"):
        exported_model(tmp_path)
    with pytest.raises(ConfigError, match="there is no such folder"):
        exported_model(tmp_path / "none")


def test_a_run_without_a_model_says_why(tmp_path):
    for status, why in (
        ("interrupted", "was interrupted before .*--resume"),
        ("failed", "failed before .*--resume"),
        ("running", "it is running"),
        ("completed", "save-model was off"),
    ):
        folder = made_run(tmp_path / status, [], status=status)
        with pytest.raises(ConfigError, match=why):
            exported_model(folder)
    party = tmp_path / "completed" / "parties" / "party-0.merged"
    party.mkdir(parents=True)
    (party / "provenance.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"such as .*party-0\.merged$"):
        exported_model(tmp_path / "completed")
    assert exported_model(party) == party


def test_what_words_mean(tmp_path):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "photos" / "cats" / "1.png").write_bytes(b"")
    (tmp_path / "talk.txt").write_text("one\n\ntwo\n")
    images, seen = read_inputs([str(tmp_path / "photos")], "text")
    assert seen and images == [str(tmp_path / "photos" / "cats" / "1.png")]
    assert read_inputs([str(tmp_path / "talk.txt"), "three words here"], "text") == (
        ["one", "two", "three words here"],
        False,
    )
    with pytest.raises(ConfigError, match="one kind at a time"):
        read_inputs([str(tmp_path / "photos"), "a text"], "text")


def test_a_language_model_answers(tmp_path, capsys):
    base = make_model(tmp_path / "base")
    state = load_file(base / "model.safetensors")
    facts = {"config": {"model": str(base), "length": 16}}
    out = export_model(tmp_path / "out", state, model=str(base), labels=(), provenance=facts)
    found = predictions(capsys, out, "the film", "--tokens", 4)
    assert found[0]["input"] == "the film" and isinstance(found[0]["answer"], str)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files needs."""

    def do_GET(self) -> None:
        self._answer({"sha": "0" * 40, "id": "me/x", "name": "me"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization")
        self.server.asked.append((self.path, token))
        if self.path.endswith("/create"):
            self._answer(
                {
                    "url": "https://huggingface.co/me/reviews",
                    "name": "me/reviews",
                    "id": "me/reviews",
                }
            )
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            self.server.commits.append(body)
            url = "https://huggingface.co/me/reviews/commit/1"
            self._answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self._answer({})

    def _answer(self, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.commits = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for name in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.constants.ENDPOINT"):
        monkeypatch.setattr(name, address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_pushed_with_its_card_and_without_paths(run, hub):
    folder = run[0] / "model-fedavg"
    push_folder(folder, "me/reviews", private=True)
    assert {path.partition("/models/")[0] for path, _ in hub.asked if "create" in path}
    assert all(token == "Bearer hf_secret" for _, token in hub.asked)
    lines = [json.loads(line) for body in hub.commits for line in body.splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in lines
        if line["key"] == "file"
    }
    wanted = {"README.md", "config.json", "model.safetensors", "pooled_classifier.py",
              "provenance.json", "head.safetensors", "tokenizer.json"}  # fmt: skip
    assert wanted <= set(sent)
    assert b"/srv" not in sent["provenance.json"] + sent["README.md"]
    assert sent["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"/srv" in (folder / "provenance.json").read_bytes()


def test_what_keeps_a_push_is_told(run, monkeypatch, hub):
    folder = run[0] / "model-fedavg"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        push_folder(folder, "me/reviews")
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nonexistent/token")
    with pytest.raises(ConfigError, match="hf auth login"):
        push_folder(folder, "me/reviews")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.shutdown()
    hub.server_close()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match="could not be reached"):
        push_folder(folder, "me/reviews")
