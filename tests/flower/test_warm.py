"""The warm trainer: same answers from one process, and nothing is lost when it dies."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import warm
from dare_agg.flower.processes import warm_server

APP = """
    import os
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from pathlib import Path
    from dare_agg.flower.warm import warm_trainer

    def watch(context):
        return [Path(str(name)) for name in [context.node_config.get("data-path")] if name]

    app = ClientApp(mods=[warm_trainer("warm_toy:app", watch)])

    @app.train()
    def train(msg, context):
        if "fail" in msg.content["config"]:
            raise ValueError("no such luck")
        seen = context.state.metric_records.get("seen", MetricRecord({"count": 0}))
        context.state["seen"] = MetricRecord({"count": seen["count"] + 1})
        here = int(Path("toy.csv").exists())
        metrics = MetricRecord({"pid": os.getpid(), "count": seen["count"] + 1, "here": here})
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
        def __init__(self, run=7, **config):
            config = {"client-name": "a", "warm": True, **config}
            self.context = Context(run, 11, config, RecordDict(), {"rate": 0.5})

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
    assert ends(node(**{"warm-idle": 0.3}).metrics()["pid"])


def ends(pid):
    """Whether a trainer, a child of this process, ends."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return True
        time.sleep(0.05)
    return False


def test_another_run_has_a_trainer_of_its_own_and_the_old_one_gives_way(node, monkeypatch):
    first, second = node(run=7), node(run=8)
    one, two = first.metrics()["pid"], second.metrics()["pid"]
    assert len({one, two, os.getpid()}) == 3
    # Two runs at a time keep their trainers; one that waits ends when a third begins.
    assert (first.metrics()["pid"], second.metrics()["pid"]) == (one, two)
    monkeypatch.setattr(warm, "GIVE_WAY_SECONDS", -1.0)
    third = node(run=9).metrics()["pid"]
    assert third not in (one, two) and ends(one) and ends(two)


def test_relative_paths_mean_the_same_and_nothing_is_imported_from_there(
    node, tmp_path, monkeypatch
):
    there = tmp_path / "there"
    there.mkdir()
    (there / "toy.csv").write_text("1")
    (there / "flwr").with_suffix(".py").write_text("raise ImportError('of the folder')")
    monkeypatch.chdir(there)
    found = node().metrics()
    assert found["here"] == 1 and found["pid"] != os.getpid()


def test_another_config_of_the_node_has_a_trainer_of_its_own(node):
    assert node(threads=1).metrics()["pid"] != node(threads=2).metrics()["pid"]


@pytest.mark.parametrize("changed", ["content", "replaced", "gone", "more"])
def test_a_trainer_that_read_what_has_changed_is_replaced(node, tmp_path, changed):
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    rows = data / "deep" / "rows.csv"
    rows.write_text("one")
    one = node(**{"data-path": str(data)})
    pid = one.metrics()["pid"]
    assert one.metrics()["pid"] == pid
    if changed == "content":
        rows.write_text("two and more")
    elif changed == "replaced":
        (data / "new").write_text("two")
        (data / "new").replace(rows)
    elif changed == "gone":
        rows.unlink()
    else:
        (data / "other.csv").write_text("two")
    after = one.metrics()
    assert after["pid"] not in (pid, os.getpid()) and after["count"] == 3
    assert ends(pid)
    assert one.metrics()["pid"] == after["pid"]


def test_a_trainer_that_ends_leaves_the_socket_of_the_one_that_took_its_place():
    path = Path(tempfile.mkdtemp(prefix="warm")) / "11-toy.sock"

    def serve(idle):
        thread = threading.Thread(target=warm_server.serve, args=(path, toy(), idle), daemon=True)
        thread.start()
        until = time.monotonic() + 20
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        return thread

    def toy():
        return warm_server.Handler(ClientApp())

    old = serve(20)  # looks for its socket once a second
    path.unlink()
    new = serve(4)
    old.join(20)
    assert not old.is_alive() and new.is_alive()
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
    new.join(30)
    assert list(path.parent.iterdir()) == []
    path.parent.rmdir()


def test_a_trainer_ends_with_the_process_that_it_was_started_under(node, tmp_path):
    """The SuperNode's own launcher: whatever ends it, its trainers go, too."""
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    from dare_agg.flower import warm\n"
        "    from flwr.app import Context, RecordDict\n"
        "    import warm_toy\n"
        "    context = Context(7, 11, {'warm': True}, RecordDict(), {})\n"
        "    trainer = warm.find_trainer('warm_toy:app', context)\n"
        "    warm._ensure_running(trainer)\n"
        "    print(trainer.log, flush=True)\n"
        "    os._exit(0)\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        log = Path(parent.stdout.readline().strip())
        pid = int(log.read_text().split("warm trainer ")[1].split()[0])
        os.kill(pid, 0)
        parent.kill()
    until = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < until:
            os.kill(pid, 0)
            time.sleep(0.05)


def test_it_stays_by_default_under_a_supernode_alone_and_never_with_secure_keys(monkeypatch):
    def wanted(**config):
        return warm.is_wanted(Context(7, 11, config, RecordDict(), {}))

    assert not wanted() and not wanted(**{"partition-id": 1})
    monkeypatch.setattr(sys, "argv", ["/usr/bin/flwr-clientapp", "--token", "x"])
    assert wanted() and not wanted(warm=False)
    assert not wanted(**{"secure-identity": "north.key"})
    assert wanted(**{"secure-identity": "north.key", "warm": True})


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
