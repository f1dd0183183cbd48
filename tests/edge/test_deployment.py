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

from dare_agg.cli.run import execute
from dare_agg.errors import ConfigError
from dare_agg.flower.launch import flower_environment, free_port, stop_group
from simulations.federation import APP, calm_report, descendants, finished_rounds, read_report

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

    def once(self, name: str, site: str = "", place: int = 0) -> None:
        done = subprocess.run(
            ["bash", "-c", self.text(name, site, place)], cwd=self.folder, env=self.environment,
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

    def start_all(self) -> None:
        self.start_superlink()
        self.start("superexec")

    def start_superlink(self) -> None:
        seen = self.log("superlink").count(READY)
        self.start("superlink")
        self.wait_for(lambda: self.log("superlink").count(READY) > seen)

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
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended: {self.log(name)[-3000:]}"
            assert time.monotonic() < until, self.log("run")[-3000:]
            time.sleep(0.1)


@pytest.fixture
def documented(tmp_path):
    made = Documented(tmp_path / "deployment")
    yield made
    for process in made.processes.values():
        stop_group(process, 10)


@pytest.mark.federation
@pytest.mark.slow
def test_the_documented_deployment_survives_kill_9(documented, tmp_path):
    for place in range(2):
        documented.once("once", place=place)
    documented.start_all()
    for site in SITES:
        documented.once("register", site)
        documented.start("supernode", site)
    out = documented.folder / "runs" / "first"
    keys = f" -c size={EDGE['size']} -c pause={EDGE['pause']} -c deadline=900"
    documented.start("run", more=keys)

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
    documented.once("resume")
    report = read_report(out)
    assert report["resumed_after"] == done >= 2
    assert [row["accepted"] for row in report["rounds"]] == [2] * (4 - done)
    assert report["version"] == calm_report(SITES, tmp_path / "calm", **EDGE)["version"]


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
    return set(re.findall(r"(?:^|\s)(flower-[a-z]+|--[a-z-]+)", command))


def test_plain_text_is_for_loopback_only(tmp_path):
    with pytest.raises(ConfigError, match="loopback only"):
        execute(tmp_path, {}, app=APP, federation="fl.example.org:9091")
