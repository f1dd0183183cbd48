"""An existing FedAvg app becomes a DARE one by two changed lines.

`tests/apps/quickstart` is a FedAvg app in the manner of Flower's PyTorch quick start. The
tests copy it, change the two lines, and run both forms: in memory, and by `flwr run`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg

from dare_agg.flower import DareStrategy

APP = Path(__file__).parents[1] / "apps" / "quickstart"
CHANGES = {
    "client_app.py": [
        (
            "from flwr.clientapp import ClientApp\n",
            "from flwr.clientapp import ClientApp\n\nfrom dare_agg.flower import dare_mod\n",
        ),
        ("app = ClientApp()", "app = ClientApp(mods=[dare_mod])"),
    ],
    "server_app.py": [
        (
            "from flwr.serverapp.strategy import FedAvg\n",
            "\nfrom dare_agg.flower import DareStrategy\n",
        ),
        ("strategy = FedAvg(fraction_train", "strategy = DareStrategy(seed=3, fraction_train"),
    ],
}


def change_two_lines(app: Path) -> None:
    """Edit the copy at ``app``: an import and a line each in client and server."""
    for name, edits in CHANGES.items():
        path = app / "quickstart" / name
        text = path.read_text()
        for old, new in edits:
            assert text.count(old) == 1, f"{name}: {old!r}"
            text = text.replace(old, new)
        path.write_text(text)


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A changed copy of the app, importable; gives its modules by name."""
    shutil.copytree(APP, tmp_path / "quickstart-app")
    change_two_lines(tmp_path / "quickstart-app")
    monkeypatch.syspath_prepend(str(tmp_path / "quickstart-app"))
    yield lambda name: importlib.import_module(f"quickstart.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "quickstart"]:
        del sys.modules[name]


def play(quickstart, memory_grid, strategy, rounds=4):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    task, client = quickstart("task"), quickstart("client_app")
    server = quickstart("server_app")
    grid = memory_grid(client.app, 4, run_config={"local-epochs": 1})
    torch.manual_seed(0)
    result = strategy.start(
        grid,
        ArrayRecord(task.Net().state_dict()),
        num_rounds=rounds,
        train_config=ConfigRecord({"lr": 0.05}),
        evaluate_fn=server.global_evaluate,
    )
    return [result.evaluate_metrics_serverapp[n]["accuracy"] for n in range(rounds + 1)], result


def test_the_changed_app_learns_as_fedavg_does(quickstart, memory_grid):
    outcomes = []
    dare, result = play(
        quickstart,
        memory_grid,
        DareStrategy(seed=3, values="i8", drop_rate=0.5, round_hook=outcomes.append),
    )
    fedavg, _ = play(quickstart, memory_grid, FedAvg())
    assert fedavg[0] == dare[0] < 0.3
    assert fedavg[-1] > 0.75
    assert dare[-1] > fedavg[-1] - 0.08
    # Evaluation on clients and batch-norm statistics work as before.
    assert result.evaluate_metrics_clientapp[4]["eval_acc"] > 0.6
    assert result.arrays["norm1.running_mean"].numpy().any()
    full = sum(len(array.data) for array in result.arrays.values())
    assert outcomes[-1].measurements["update_bytes"][0] < full / 6
    again, _ = play(quickstart, memory_grid, DareStrategy(seed=3, values="i8", drop_rate=0.5))
    assert again == dare


def test_the_dense_form_follows_fedavg_closely(quickstart, memory_grid):
    dare, ours = play(
        quickstart,
        memory_grid,
        DareStrategy(drop_rate=0, values="f32", dense_values="f32", fraction_evaluate=0.0),
        rounds=2,
    )
    fedavg, theirs = play(quickstart, memory_grid, FedAvg(fraction_evaluate=0.0), rounds=2)
    assert dare == pytest.approx(fedavg, abs=0.01)
    for name, array in theirs.arrays.items():
        assert ours.arrays[name].numpy() == pytest.approx(array.numpy(), abs=1e-3)


# --- by Flower itself ----------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def flower(tmp_path):
    """A SuperLink of our own on a free port; gives a function that runs an app."""
    home, port = tmp_path / "flwr-home", free_port()
    neutral = tmp_path / "neutral"
    neutral.mkdir()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    scripts = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--control-api-address", f"127.0.0.1:{free_port()}"]
    command += ["--database", str(home / "state.db")]
    log = (home / "superlink.log").open("w")
    process = subprocess.Popen(
        command,
        cwd=neutral,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def run(app: Path, config: str) -> str:
        wait_until_up(port, process, home / "superlink.log")
        done = subprocess.run(
            ["flwr", "run", str(app), "test", "--stream", "-c", config]
            + ["--federation-config", "num-supernodes=3 client-resources-num-cpus=1"],
            cwd=neutral,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        return done.stdout + done.stderr + (home / "superlink.log").read_text()

    yield run
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
    log.close()


def wait_until_up(port: int, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"the SuperLink did not come up:\n{log.read_text()}")


@pytest.mark.slow
def test_flwr_run_runs_the_changed_app(flower, tmp_path):
    pytest.importorskip("ray")
    app = tmp_path / "quickstart-app"
    shutil.copytree(APP, app)
    change_two_lines(app)
    output = tmp_path / "result.json"
    log = flower(app, f"num-server-rounds=3 output='{output}'")
    assert output.is_file(), log[-6000:]
    report = json.loads(output.read_text())
    assert len(report["accuracy"]) == 4
    assert report["accuracy"][-1] > report["accuracy"][0] + 0.3, log[-6000:]
    assert "3 of 3 updates merged" in log
