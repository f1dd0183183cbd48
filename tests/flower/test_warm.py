"""The warm trainer: same answers from one process, and nothing is lost when it dies."""

import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import warm

APP = """
    import os
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from dare_agg.flower.warm import warm_trainer

    app = ClientApp(mods=[warm_trainer("warm_toy:app")])

    @app.train()
    def train(msg, context):
        if "fail" in msg.content["config"]:
            raise ValueError("no such luck")
        seen = context.state.metric_records.get("seen", MetricRecord({"count": 0}))
        context.state["seen"] = MetricRecord({"count": seen["count"] + 1})
        metrics = MetricRecord({"pid": os.getpid(), "count": seen["count"] + 1})
        return Message(
            RecordDict({"arrays": msg.content["arrays"], "metrics": metrics}), reply_to=msg
        )
"""


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A node of the toy app; its trainer ends with the test."""
    (tmp_path / "warm_toy.py").write_text(textwrap.dedent(APP))
    short = Path(tempfile.mkdtemp(prefix="warm"))  # pytest's folders are too long for sockets
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    monkeypatch.syspath_prepend(str(tmp_path))
    import warm_toy

    class Node:
        def __init__(self, **config):
            config = {"client-name": "a", "warm": True, **config}
            self.context = Context(7, 11, config, RecordDict(), {"rate": 0.5})

        def send(self, **config):
            arrays = ArrayRecord({"w": Array(np.arange(300_000, dtype=np.float32))})
            from flwr.app import ConfigRecord

            content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
            return warm_toy.app(Message(content, 11, "train"), self.context)

        def metrics(self, **config):
            return dict(self.send(**config).content["metrics"])

    yield Node
    for path in warm.private_folder().glob("*.sock"):
        path.unlink()  # a trainer without its socket ends
    sys.modules.pop("warm_toy")
    shutil.rmtree(short)


def test_one_process_answers_all_messages_and_state_comes_back(node):
    one = node()
    reply = one.send()
    arrays = reply.content["arrays"]["w"].numpy()
    assert arrays.tobytes() == np.arange(300_000, dtype=np.float32).tobytes()
    first, second = dict(reply.content["metrics"]), one.metrics()
    assert first["pid"] == second["pid"] != os.getpid()
    assert (first["count"], second["count"]) == (1, 2)
    assert one.context.state["seen"]["count"] == 2


def test_a_killed_trainer_is_started_again_and_nothing_is_lost(node):
    one = node()
    first = one.metrics()
    assert first["pid"] != os.getpid()
    os.kill(first["pid"], signal.SIGKILL)
    second = one.metrics()
    assert second["pid"] not in (first["pid"], os.getpid())
    assert second["count"] == 2


def test_an_exception_of_the_app_comes_back_as_flower_reports_it(node):
    one = node()
    pid = one.metrics()["pid"]
    reply = one.send(fail=1)
    assert reply.error.code == 2 and "no such luck" in reply.error.reason
    assert one.metrics()["pid"] == pid


def test_without_the_word_nothing_is_started(node):
    assert node(warm=False).metrics()["pid"] == os.getpid()
    assert list(warm.private_folder().iterdir()) == []


def test_a_trainer_that_cannot_start_leaves_the_message_to_flowers_process(node, monkeypatch):
    monkeypatch.setattr(warm, "_start", lambda trainer: __import__("subprocess").Popen("false"))
    assert node().metrics()["pid"] == os.getpid()


def test_an_unused_trainer_ends(node):
    pid = node(**{"warm-idle": 0.3}).metrics()["pid"]
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(RunError, match="at most 107"):
        warm.private_folder()


def test_a_folder_that_others_can_open_is_refused(monkeypatch):
    short = tempfile.mkdtemp(prefix="warm")
    monkeypatch.setenv("XDG_RUNTIME_DIR", short)
    warm.private_folder().chmod(0o755)
    with pytest.raises(RunError, match="user alone"):
        warm.private_folder()
    shutil.rmtree(short)


def test_a_call_that_was_cut_is_refused():
    with pytest.raises(RunError, match="announced"):
        warm.unpack_call(b"\x05" * 8 + b"\x05" + bytes(15))


@pytest.mark.parametrize("reference", ["client.app", ":app", "client.app:"])
def test_a_wrong_reference_is_refused(reference):
    with pytest.raises(ConfigError, match="module:attribute"):
        warm.warm_trainer(reference)
