"""docs/DEPLOY.md, as it stands: its commands make a federation that survives kill -9."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dare_agg.cli.execute import execute
from dare_agg.errors import ConfigError
from dare_agg.flower.processes.launch import flower_environment, free_port
from simulations.bench.federation import APP, calm_report, finished_rounds, read_report
from simulations.runs.process_groups import descendants

DOCS = Path(__file__).parents[2] / "docs"
SITES = ("north", "south")
READY = "Application startup complete"
EDGE = {"num_rounds": 4, "size": 50_000, "pause": 1.0}


def blocks() -> dict[str, list[str]]:
    """The commands of DEPLOY.md by the second word after the fence."""
    found: dict[str, list[str]] = {}
    text = (DOCS / "DEPLOY.md").read_text()
    for name, body in re.findall(r"^```sh (\w+)\n(.*?)^```$", text, re.M | re.S):
        found.setdefault(name, []).append(body)
    return found


class Documented:
    """What DEPLOY.md says to run, on loopback, with the small app of tests/apps/edge."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: dict[str, subprocess.Popen] = {}
        folder.mkdir()
        self.environment = flower_environment(folder / "flower")

    def text(self, name: str, site: str, place: int = 0) -> str:
        body = blocks()["env"][0] + blocks()[name][place]
        body = body.replace("fl.example.org", "127.0.0.1").replace("9091", str(self.port))
        body = body.replace("9094", str(free_port()))
        body = body.replace("dare-agg run ", f"dare-agg run {APP} ")
        return f"set -e\nSITE={site}\n{body}"

    def once(self, name: str, site: str = "", place: int = 0, more: str = "") -> None:
        text = self.text(name, site, place).rstrip() + more
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, name: str, site: str = "", more: str = "") -> subprocess.Popen:
        log = (self.folder / f"{name}{site}.log").open("ab")
        self.processes[name + site] = subprocess.Popen(
            ["bash", "-c", self.text(name, site).rstrip() + more], cwd=self.folder,
            env=self.environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        return self.processes[name + site]

    def set_up(self) -> None:
        """Everything before a run."""
        for place in range(2):
            self.once("once", place=place)
        self.start_all()
        for site in SITES:
            self.once("register", site)
            self.start("supernode", site)

    def start_all(self) -> None:
        self.start_superlink()
        self.start("superexec")

    def start_superlink(self) -> None:
        seen = self.log("superlink").count(READY)
        self.start("superlink")
        self.wait_for(lambda: self.log("superlink").count(READY) > seen)

    def revive(self) -> None:
        """Start SuperNodes again that Flower refused, as systemd does: see DEPLOY.md."""
        for site in SITES:
            process = self.processes.get("supernode" + site)
            if process is not None and process.poll() is not None:
                time.sleep(1)
                self.start("supernode", site)

    def kill_9(self, *names: str) -> None:
        processes = [self.processes.pop(name) for name in names]
        for pid in descendants([process.pid for process in processes]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 400
        while not condition():
            self.revive()
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended: {self.log(name)[-3000:]}"
            assert time.monotonic() < until, self.log("run")[-3000:]
            time.sleep(0.1)


def keys(settings: dict[str, object]) -> str:
    """What the small app is told besides the documented words."""
    words = {"deadline": 900, **settings}
    return "".join(f" -c {key.replace('_', '-')}={value}" for key, value in words.items())


@pytest.fixture
def documented(tmp_path):
    made = Documented(tmp_path / "deployment")
    yield made
    made.kill_9(*made.processes)


@pytest.mark.slow
def test_the_documented_deployment_runs(documented, tmp_path):
    """TLS, registered nodes, signed updates, process isolation: as the text sets them up."""
    calm = {**EDGE, "num_rounds": 2, "pause": 0.0}
    documented.set_up()
    documented.once("run", more=keys(calm))
    report = read_report(documented.folder / "runs" / "first")
    assert [row["accepted"] for row in report["rounds"]] == [2, 2]
    assert not any(row["rejected"] for row in report["rounds"])
    # The base went down once; then both ways only a small part of its 200 kB.
    first, second = report["rounds"]
    assert min(first["download_bytes"]) > 4 * EDGE["size"]
    assert max(second["download_bytes"] + second["upload_bytes"]) < EDGE["size"]
    assert report["version"] == calm_report(SITES, tmp_path / "calm", **calm)["version"]


@pytest.mark.federation
@pytest.mark.slow
def test_the_documented_deployment_survives_kill_9(documented, tmp_path):
    documented.set_up()
    out = documented.folder / "runs" / "first"
    documented.start("run", more=keys(EDGE))

    documented.wait_for(lambda: finished_rounds(out) >= 1)
    documented.kill_9("superlink")
    documented.start_superlink()
    # The run survives its SuperLink: ServerApp and SuperLink are processes of their own.
    documented.wait_for(lambda: finished_rounds(out) >= 2)
    documented.kill_9(*documented.processes)
    done = finished_rounds(out)
    documented.start_all()
    for site in SITES:
        documented.start("supernode", site)
    resumed = documented.start("resume")
    documented.wait_for(lambda: resumed.poll() is not None)
    assert resumed.returncode == 0, documented.log("resume")[-3000:]
    report = read_report(out)
    assert report["resumed_after"] == done >= 2
    assert [row["accepted"] for row in report["rounds"]] == [2] * (4 - done)
    assert report["version"] == calm_report(SITES, tmp_path / "calm", **EDGE)["version"]


@pytest.mark.federation
@pytest.mark.slow
def test_a_supernode_killed_in_a_round_costs_its_update_and_catches_up(federation, tmp_path):
    fed = federation(names=list(SITES))
    fed.start_all()
    out = tmp_path / "out"
    fed.submit(out, num_rounds=4, size=50_000, pause=8.0, deadline=60.0)
    fed.wait_for(lambda: finished_rounds(out) >= 1, 300)
    asked = fed.log("south").count("Receiving: train")
    fed.wait_for(lambda: fed.log("south").count("Receiving: train") > asked, 120)
    fed.kill_9_node("south")
    fed.start_node("south")
    fed.wait_for(lambda: read_report(out) is not None, 500)
    rounds = read_report(out)["rounds"]
    assert [row["accepted"] for row in rounds] == [2, 1, 2, 2]
    assert [reason for row in rounds for reason in row["rejected"]] in (["late"], ["lost"])
    # It comes back with what its cache holds: steps travel, the base of 200 kB does not.
    assert max(rounds[2]["download_bytes"]) < 50_000


@pytest.mark.parametrize("unit", ["superlink", "superexec", "supernode@"])
def test_units_say_what_the_text_says(unit):
    text = (DOCS / "deploy" / f"dare-agg-{unit}.service").read_text()
    (command,) = re.findall(r"^ExecStart=/opt/dare-agg/bin/((?:.*\\\n)*.*)", text, re.M)
    (said,) = blocks()[unit.rstrip("@")]
    assert words(command) == words(said)


def test_compose_says_what_the_text_says():
    services = yaml.safe_load((DOCS / "deploy" / "compose.yaml").read_text())["services"]
    for service, block in (
        ("superlink", "superlink"),
        ("superexec", "superexec"),
        ("north", "supernode"),
    ):
        command = services[service]["command"]
        text = command if isinstance(command, str) else " ".join(command)
        assert words(text) == words(blocks()[block][0])


def words(command: str) -> set[str]:
    """The program and its options, without their values."""
    return set(re.findall(r"(?:^|\s)(flower-[a-z]+|dare_agg\.flower\.[a-z]+|--[a-z-]+)", command))


def test_plain_text_is_for_loopback_only(tmp_path):
    with pytest.raises(ConfigError, match="loopback only"):
        execute(tmp_path, {}, app=APP, federation="fl.example.org:9091")
