"""The server's half: a SuperLink beside NVFlare's server, the app's run, and the sites' calls."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.tie.applet import Applet
from nvflare.app_common.tie.connector import Connector
from nvflare.app_common.tie.controller import TieController
from nvflare.app_common.tie.defs import Constant

from dare_agg.errors import DareError
from dare_agg.flower.processes.ending import KINDLY_SECONDS, end_family, stop_group
from dare_agg.flower.processes.launch import (
    flower_environment,
    free_port,
    run_app,
    wait_healthy,
    write_connection,
)
from dare_agg.nvflare.relay.exchange import call_of, post

_CONNECTION = "nvflare"


class SuperLinkApplet(Applet):
    """A SuperLink on the loopback and the run of one app on it."""

    def __init__(self, app: str, run_config: dict[str, Any]) -> None:
        super().__init__()
        self.app, self.run_config = app, run_config
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._home = Path()
        self._ended: int | None = None

    def start(self, app_ctx: dict[str, Any]) -> None:
        """Start the SuperLink, then submit the app; returns when the SuperLink answers."""
        fl_ctx = app_ctx[Constant.APP_CTX_FL_CONTEXT]
        workspace, job = fl_ctx.get_engine().get_workspace(), fl_ctx.get_job_id()
        # A relative path lies in what the job brought, an absolute one is the server's own.
        app = Path(workspace.get_app_custom_dir(job)) / self.app
        self._home = (Path(workspace.get_run_dir(job)) / "flwr").resolve()
        (self._home / "work").mkdir(parents=True, exist_ok=True)
        write_connection(
            self._home, _CONNECTION, {"address": f"127.0.0.1:{self.port}", "insecure": True}
        )
        command = [sys.executable, "-m", "dare_agg.flower.superlink", "--insecure"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        log = self._home / "superlink.log"
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [*command, "--database", str(self._home / "state.db")],
                cwd=self._home / "work", env=flower_environment(self._home),
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
        wait_healthy(self._process, self.port, log)
        threading.Thread(target=self._run, args=(app,), daemon=True).start()

    def _run(self, app: Path) -> None:
        with (self._home / "run.log").open("a", encoding="utf-8") as log:

            def note(line: str) -> None:
                log.write(f"{line}\n")
                log.flush()

            try:
                status = run_app(app, self._home, _CONNECTION, self.run_config, on_line=note)
                self.logger.info(f"Flower's run ended as {status.status} {status.detail}")
                self._ended = 0 if status.ok else Constant.EXIT_CODE_FAILED
            except (DareError, OSError) as error:
                self.logger.error(f"Flower's run: {error}")
                self._ended = Constant.EXIT_CODE_CANT_START

    def stop(self, timeout: float = 0.0) -> int:
        """End the SuperLink and all that it started."""
        if self._process is not None:
            end_family(self._home)
            stop_group(self._process, KINDLY_SECONDS)
            self._process = None
        return self._ended or 0

    def is_stopped(self) -> tuple[bool, int]:
        """Whether the run has ended, and how."""
        if self._ended is None and self._process is not None and self._process.poll() is not None:
            return True, Constant.EXIT_CODE_FAILED
        return self._ended is not None, self._ended or 0


class SuperLinkConnector(Connector):
    """Hands the sites' calls to the SuperLink."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def configure(self, config: dict[str, Any], fl_ctx: FLContext) -> None:
        """Nothing to configure."""

    def start(self, fl_ctx: FLContext) -> None:
        """Start the SuperLink and the run."""
        self.start_applet({}, fl_ctx)

    def stop(self, fl_ctx: FLContext) -> None:
        """End both; the job has failed where the run has not ended by itself."""
        ended, _ = self.is_applet_stopped()
        self.stop_applet()
        if not ended:
            self.system_panic("all SuperNodes have ended before Flower's run did", fl_ctx)

    def process_app_request(
        self, op: str, req: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """One call of a site; a call that is not relayed is refused, and the job goes on."""
        if self.is_applet_stopped()[0]:
            return make_reply(ReturnCode.SERVICE_UNAVAILABLE)
        try:
            status, headers, body = post(self.applet.port, call_of(req), self.seconds)
        except DareError as error:
            self.log_warning(fl_ctx, f"refused: {error}")
            return make_reply(ReturnCode.BAD_REQUEST_DATA)
        except OSError as error:
            self.log_warning(fl_ctx, f"the SuperLink did not answer: {error}")
            return make_reply(ReturnCode.SERVICE_UNAVAILABLE)
        reply = make_reply(ReturnCode.OK)
        reply.update({"status": status, "headers": headers, "body": body})
        return reply


class FlowerRelayController(TieController):
    """Runs a Flower app as the job: a SuperLink at the server, a SuperNode at each site.

    Parameters
    ----------
    app : str
        Folder of the Flower app: relative to what the job brings to the server, or absolute, there.
    run_config : dict, optional
        Words of the app's run config.
    seconds : float
        How long the SuperLink may take to answer one call.
    """

    def __init__(
        self, app: str = "", run_config: dict[str, Any] | None = None, seconds: float = 60.0
    ) -> None:
        # A SuperNode that starts on a busy machine is silent for minutes; then it never is.
        super().__init__(
            start_task_timeout=120, configure_task_timeout=60, max_client_op_interval=300
        )
        self.app, self.run_config, self.seconds = app, run_config, seconds

    def get_client_config_params(self, fl_ctx: FLContext) -> dict[str, Any]:
        """The names of the sites: their order numbers the partitions."""
        names = (client.name for client in fl_ctx.get_engine().get_clients())
        return {"sites": sorted(names)}

    def get_connector_config_params(self, fl_ctx: FLContext) -> dict[str, Any]:
        """Nothing."""
        return {}

    def get_connector(self, fl_ctx: FLContext) -> Connector:
        """The server's end of the relay."""
        return SuperLinkConnector(self.seconds)

    def get_applet(self, fl_ctx: FLContext) -> Applet:
        """The SuperLink and the run."""
        return SuperLinkApplet(self.app, self.run_config or {})
