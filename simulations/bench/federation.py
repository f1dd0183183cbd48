"""A real federation on this machine: SuperLink and SuperNodes as processes of our own.

Used by the tests of deployments and by the benchmarks of crashes, slow links and the warm
trainer. TLS, registered nodes and signed updates, as docs/DEPLOY.md sets them up.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_agg.deploy.certificates import make_deployment
from dare_agg.flower.processes.ending import stop_group
from dare_agg.flower.processes.launch import (
    RunStatus,
    flower_environment,
    free_port,
    run_app,
    toml_scalars,
    write_connection,
)
from simulations.runs.process_groups import command_of, descendants

APP = Path(__file__).parents[2] / "tests" / "apps" / "edge"


@dataclass
class Federation:
    """SuperLink and SuperNodes over TLS with registered keys, in one folder.

    ``supernode`` begins a node's command and ``prefix(name)`` is put before it, for example to
    run it elsewhere; ``node_config`` is added to each node's. ``database`` is the SuperLink's:
    without, a file of the folder.
    """

    folder: Path
    names: Sequence[str]
    host: str = "127.0.0.1"
    isolation: str = "subprocess"
    supernode: Sequence[str] = ("flower-supernode",)
    prefix: Callable[[str], list[str]] = lambda name: []
    environment: Mapping[str, str] = field(default_factory=dict)
    app: Path = APP
    database: str = ""
    node_config: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.certs = self.folder / "certs"
        make_deployment(self.certs, [self.host, "127.0.0.1", "localhost"], self.names)
        self.home = self.folder / "home"
        (self.home / "work").mkdir(parents=True)
        self.port = free_port()
        self.secret = self.folder / "superexec.secret"
        self.secret.write_text("a-shared-secret-of-the-machine-0123456789")
        self.secret.chmod(0o600)
        write_connection(
            self.home,
            "dep",
            {
                "address": f"{self.host}:{self.port}",
                "root-certificates": str(self.certs / "ca" / "ca.crt"),
            },
        )

    def start_superlink(self) -> None:
        server = self.certs / "server"
        self._start(
            "superlink",
            [
                sys.executable, "-m", "dare_agg.flower.superlink",
                "--host", self.host, "--port", str(self.port),
                "--ssl-certfile", str(server / "server.pem"),
                "--ssl-keyfile", str(server / "server.key"),
                "--ssl-ca-certfile", str(server / "ca.crt"),
                "--enable-supernode-auth", "--isolation", self.isolation,
                "--database", self.database or str(self.folder / "state.db"),
                *(
                    ["--superexec-auth-secret-file", str(self.secret)]
                    if self.isolation == "process"
                    else []
                ),
            ],
        )  # fmt: skip
        self.wait_for(self.answers, 90)

    def answers(self) -> bool:
        """Whether the SuperLink does."""
        trusted = ssl.create_default_context(cafile=str(self.certs / "ca" / "ca.crt"))
        url = f"https://{self.host}:{self.port}/health"
        try:
            with urllib.request.urlopen(url, timeout=2, context=trusted):
                return True
        except OSError:
            return False

    def start_all(self) -> None:
        """Start everything; nodes that the database does not know are registered."""
        self.start_superlink()
        if self.isolation == "process":
            self.start_superexec()
        for name in self.names:
            self.register(name)
            self.start_node(name)

    def start_superexec(self) -> None:
        """The process that starts ServerApps where the SuperLink is isolated from them."""
        self._start(
            "superexec",
            [
                "flower-superexec", "--runtime-api-address", f"{self.host}:{self.port}",
                "--root-certificates", str(self.certs / "ca" / "ca.crt"),
                "--superexec-auth-secret-file", str(self.secret),
            ],
        )  # fmt: skip

    def submit(self, output: Path, **config: object) -> None:
        """Submit a run without following it: whoever follows dies with the SuperLink."""
        settings = self._settings(output, config)
        done = self.flwr("run", str(self.app), "dep", "--run-config", toml_scalars(settings))
        assert done.returncode == 0, done.stdout + done.stderr

    def _settings(self, output: Path, config: Mapping[str, object]) -> dict:
        return {
            "output": str(output),
            "min-clients": len(self.names),
            "identities": str(self.certs / "server" / "identities.json"),
            **{key.replace("_", "-"): value for key, value in config.items()},
        }

    def kill_9(self, name: str) -> None:
        """kill -9 of a process and of its group: no goodbye, no tidying up."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def kill_9_server_apps(self) -> int:
        """kill -9 of every ServerApp of this federation; returns how many there were."""
        apps = [pid for pid in self._tasks() if "serverapp" in command_of(pid)]
        _kill_9(apps)
        return len(apps)

    def kill_9_node(self, name: str) -> None:
        """kill -9 of a SuperNode and of what it is running."""
        tasks = descendants([self.processes[name].pid])
        self.kill_9(name)
        _kill_9(tasks)

    def kill_9_everything(self) -> None:
        tasks = self._tasks()
        for name in list(self.processes):
            self.kill_9(name)
        _kill_9(tasks)

    def _tasks(self) -> list[int]:
        return descendants([process.pid for process in self.processes.values()])

    def start_node(self, name: str) -> None:
        own = self.certs / "nodes" / name
        config = toml_scalars(
            {
                "client-name": name,
                "identity": str(own / "identity.pem"),
                "cache": str(self.folder / "cache" / name),
                **self.node_config,
            }
        )
        self._start(
            name,
            [
                *self.prefix(name),
                *self.supernode, "--superlink", f"{self.host}:{self.port}",
                "--root-certificates", str(own / "ca.crt"),
                "--auth-supernode-private-key", str(own / "node.key"),
                "--host", "127.0.0.1", "--port", str(free_port()),
                "--node-config", config,
            ],
        )  # fmt: skip

    def revive(self) -> None:
        """Start SuperNodes that ended again, as systemd does.

        Flower refuses a node that was killed until it has noticed the death, up to a minute
        after its last heartbeat; the SuperNode then ends with status 305.
        """
        for name in self.names:
            process = self.processes.get(name)
            if process is not None and process.poll() is not None:
                time.sleep(1)
                self.start_node(name)

    def register(self, name: str) -> None:
        public = self.certs / "nodes" / name / "node.pub"
        done = self.flwr("supernode", "register", str(public), "dep", "--name", name)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, output: Path, **config: object) -> RunStatus:
        lines: list[str] = []
        settings = self._settings(output, config)
        status = run_app(self.app, self.home, "dep", settings, on_line=lines.append)
        (self.folder / "run.log").write_text("\n".join(lines))
        return status

    def runs(self) -> dict[str, str]:
        """All runs of the SuperLink: id → status."""
        answer = json.loads(self.flwr("ls", "dep", "--format", "json").stdout)
        return {str(run["run-id"]): str(run["status"]) for run in answer["runs"]}

    def flwr(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["flwr", *words], cwd=self.home / "work", env=self._environment(),
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition():
            self.revive()
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise AssertionError(f"{name} ended: {self.log(name)[-2000:]}")
            assert time.monotonic() < until, f"not within {seconds} s"
            time.sleep(0.2)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None:
            stop_group(process, 10)

    def stop_all(self) -> None:
        for name in list(self.processes):
            with contextlib.suppress(Exception):
                self.stop(name)

    def _environment(self) -> dict[str, str]:
        return {**flower_environment(self.home), **self.environment}

    def _start(self, name: str, command: Sequence[str]) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            command, cwd=self.home / "work", env=self._environment(),
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()

    def any_run_under_way(self) -> bool:
        return any(not status.startswith("finished") for status in self.runs().values())


def _kill_9(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def finished_rounds(output: Path) -> int:
    """The last round of which a run of the edge app kept the state; 0 for none."""
    return max((int(path.name[6:14]) for path in output.glob("state/round-*.state")), default=0)


def read_report(output: Path) -> dict[str, Any] | None:
    """The report a finished run of the edge app left; None while it runs."""
    try:
        return json.loads((output / "report.json").read_text())
    except FileNotFoundError:
        return None


def calm_report(
    names: Sequence[str],
    output: Path,
    *,
    node_config: Mapping[str, bool | int | float | str] | None = None,
    **config: object,
) -> dict[str, Any]:
    """Run the edge app in memory, undisturbed: the reference of a deterministic run."""
    import tomllib

    from flwr.app import Context, RecordDict

    from simulations.runs.memory_grid import MemoryGrid, pretend_task

    pretend_task()
    if str(APP) not in sys.path:
        sys.path.insert(0, str(APP))
    client_app = importlib.import_module("edge.client_app")
    server_app = importlib.import_module("edge.server_app")
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    settings = {
        **defaults,
        "output": str(output),
        "min-clients": len(names),
        **{key.replace("_", "-"): value for key, value in config.items()},
    }
    cache = str(output / "cache")
    grid = MemoryGrid(
        client_app.app,
        len(names),
        node_config=lambda number: {
            "client-name": names[number],
            "cache": cache,
            **(node_config or {}),
        },
        run_config=settings,
    )
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
    server_app.main(grid, context)
    report = read_report(output)
    assert report is not None
    return report
