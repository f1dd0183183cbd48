"""A real federation of NVFlare on the loopback: its own provisioning, mutual TLS."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

PROJECT = """\
api_version: 3
name: reach
description: a federation on the loopback
participants:
  - {{name: localhost, type: server, org: reach, fed_learn_port: {port}}}
{clients}
  - {{name: admin@reach.org, type: admin, org: reach, role: project_admin}}
builders:
  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
    args: {{template_file: [master_template.yml]}}
  - path: nvflare.lighter.impl.static_file.StaticFileBuilder
    args: {{config_folder: config}}
  - path: nvflare.lighter.impl.cert.CertBuilder
  - path: nvflare.lighter.impl.signature.SignatureBuilder
"""


class Federation:
    """Provisioned start-up kits and their processes; ``processes`` has them by party.

    Each is started by the kit's own ``sub_start.sh --once``, in a session of its own.
    """

    def __init__(self, folder: Path, clients: int, binaries: Path, settings: Mapping[str, str]):
        self.port = _free_port()
        self.names = ["server", *(f"site-{number}" for number in range(1, clients + 1))]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._folder, self._binaries = folder, binaries
        self._environment = {
            **os.environ,
            **settings,
            "PATH": f"{binaries}:{os.environ['PATH']}",
        }

    @property
    def kits(self) -> Path:
        """The folder of the start-up kits."""
        return self._folder / "kits" / "reach" / "prod_00"

    @property
    def administrator(self) -> Path:
        """The administrator's start-up kit."""
        return self.kits / "admin@reach.org"

    def __enter__(self) -> Federation:
        clients = "\n".join(
            f"  - {{name: {name}, type: client, org: reach}}" for name in self.names[1:]
        )
        project = self._folder / "project.yml"
        project.write_text(PROJECT.format(port=self.port, clients=clients), encoding="utf-8")
        words = [self._binaries / "nvflare", "provision", "-p", project]
        done = subprocess.run(
            [*words, "-w", self._folder / "kits"],
            capture_output=True, text=True, check=False, env=self._environment,
        )  # fmt: skip
        if done.returncode or not self.administrator.is_dir():
            raise SystemExit(f"error: nvflare provision: {done.stdout}{done.stderr}")
        try:
            for name in self.names:
                self._start(name)
                if name == "server":
                    self._wait_for_port()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self, name: str) -> None:
        kit = self.kits / ("localhost" if name == "server" else name)
        with (self._folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                ["bash", kit / "startup" / "sub_start.sh", "--once"],
                stdout=log, stderr=log, cwd=self._folder,
                env=self._environment, start_new_session=True,
            )  # fmt: skip

    def _wait_for_port(self) -> None:
        ends = time.monotonic() + 120
        while time.monotonic() < ends and self.processes["server"].poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("localhost", self.port)):
                return
            time.sleep(0.2)
        said = (self._folder / "server.log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"error: NVFlare's server does not listen: {said}")

    def _stop(self) -> None:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
            ends = time.monotonic() + 10
            while time.monotonic() < ends and any(
                process.poll() is None for process in self.processes.values()
            ):
                time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
