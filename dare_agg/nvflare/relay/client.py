"""A site's half: a SuperNode, and in front of it what looks like a SuperLink on the loopback."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.tie.applet import Applet
from nvflare.app_common.tie.connector import Connector
from nvflare.app_common.tie.defs import Constant
from nvflare.app_common.tie.executor import TieExecutor

from dare_agg.errors import DareError
from dare_agg.flower.processes.ending import KINDLY_SECONDS, end_family, stop_group
from dare_agg.flower.processes.launch import flower_environment, free_port, toml_scalars
from dare_agg.nvflare.relay.exchange import MAX_BODY, OPERATION, Call, kept_headers


class SuperNodeApplet(Applet):
    """A SuperNode of the site, which believes the relay to be its SuperLink."""

    def __init__(self, node_config: dict[str, Any]) -> None:
        super().__init__()
        self.node_config = node_config
        self._process: subprocess.Popen[bytes] | None = None
        self._home = Path()

    def start(self, app_ctx: dict[str, Any]) -> None:
        """Start the SuperNode; its name and partition are the site's."""
        fl_ctx = app_ctx[Constant.APP_CTX_FL_CONTEXT]
        engine = fl_ctx.get_engine()
        run = Path(engine.get_workspace().get_run_dir(fl_ctx.get_job_id()))
        self._home = (run / "flwr").resolve()
        (self._home / "work").mkdir(parents=True, exist_ok=True)
        names, name = app_ctx["sites"], fl_ctx.get_identity_name()
        config = {
            "client-name": name,
            "partition-id": names.index(name),
            "num-partitions": len(names),
            **self.node_config,
        }
        command = [sys.executable, "-m", "dare_agg.flower.supernode", "--insecure"]
        command += ["--superlink", f"127.0.0.1:{app_ctx['port']}"]
        command += ["--host", "127.0.0.1", "--port", str(free_port())]
        with (self._home / "supernode.log").open("ab") as said:
            self._process = subprocess.Popen(
                [*command, "--node-config", toml_scalars(config)],
                cwd=self._home / "work", env=flower_environment(self._home),
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    def stop(self, timeout: float = 0.0) -> int:
        """End the SuperNode and all that it started."""
        if self._process is not None:
            end_family(self._home)
            stop_group(self._process, KINDLY_SECONDS)
            self._process = None
        return 0

    def is_stopped(self) -> tuple[bool, int]:
        """Whether the SuperNode has ended by itself, which it should not have done."""
        if self._process is None:
            return True, 0
        return self._process.poll() is not None, Constant.EXIT_CODE_FAILED


class SuperNodeConnector(Connector):
    """Listens on the loopback and hands what the SuperNode posts to the server."""

    def __init__(self, message_seconds: float, seconds: float) -> None:
        super().__init__()
        self.message_seconds, self.seconds = message_seconds, seconds
        self.sites: list[str] = []
        self._server: ThreadingHTTPServer | None = None

    def configure(self, config: dict[str, Any], fl_ctx: FLContext) -> None:
        """The names of all sites, in the order that numbers the partitions."""
        self.sites = config["sites"]

    def start(self, fl_ctx: FLContext) -> None:
        """Listen, then start the SuperNode."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self.relay))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.start_applet({"port": self._server.server_port, "sites": self.sites}, fl_ctx)

    def stop(self, fl_ctx: FLContext) -> None:
        """End the SuperNode, then listen no longer."""
        self.stop_applet()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def process_app_request(
        self, op: str, req: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Sites are asked nothing."""
        raise RuntimeError(f"the server asks a site for {op!r}")

    def relay(self, call: Call) -> tuple[int, dict[str, str], bytes]:
        """The SuperLink's answer to a call; 503 where there is none (any more)."""
        answer = self.send_request(
            target=None,
            op=OPERATION,
            request=call.to_shareable(),
            per_msg_timeout=self.message_seconds,
            tx_timeout=self.seconds,
            fl_ctx=None,
        )
        if answer.get_return_code() != ReturnCode.OK:
            return 503, {}, b""
        return int(answer["status"]), kept_headers(answer["headers"]), bytes(answer["body"])


def _handler(relay: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_BODY:
                self.close_connection = True
                self._answer(411 if not length.isdecimal() else 413, {}, b"")
                return
            body = self.rfile.read(int(length))
            try:
                call = Call(self.path, body, kept_headers(dict(self.headers)))
            except DareError:
                self._answer(404, {}, b"")
                return
            self._answer(*relay(call))

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are no news."""

    return Handler


class FlowerRelayExecutor(TieExecutor):
    """Runs a SuperNode at this site, its HTTP carried by NVFlare.

    Parameters
    ----------
    node_config : dict, optional
        Words of the node's config, beside "client-name", "partition-id" and "num-partitions".
    message_seconds, seconds : float
        How long one try to send a call, and a call with all its tries, may take.
    """

    def __init__(
        self,
        node_config: dict[str, Any] | None = None,
        message_seconds: float = 30.0,
        seconds: float = 300.0,
    ) -> None:
        super().__init__()
        self.node_config = node_config
        self.message_seconds, self.seconds = message_seconds, seconds

    def get_connector(self, fl_ctx: FLContext) -> Connector:
        """The site's end of the relay."""
        return SuperNodeConnector(self.message_seconds, self.seconds)

    def get_applet(self, fl_ctx: FLContext) -> Applet:
        """The SuperNode."""
        return SuperNodeApplet(self.node_config or {})

    def configure(self, config: dict[str, Any], fl_ctx: FLContext) -> None:
        """Keep the names of the sites."""
        self.sites = config["sites"]

    def get_connector_config(self, fl_ctx: FLContext) -> dict[str, Any]:
        """Hand them on."""
        return {"sites": self.sites}
