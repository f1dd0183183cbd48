"""Flower's HTTP in NVFlare's messages: what is relayed, what is refused, a run as Flower alone."""

import json
import shutil
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="NVFlare is tested by scripts/nvflare.sh")

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable, make_reply
from nvflare.apis.signal import Signal

from dare_agg.errors import ConfigError, RunError
from dare_agg.nvflare.relay import flower_job
from dare_agg.nvflare.relay.client import SuperNodeConnector
from dare_agg.nvflare.relay.exchange import MAX_BODY, Call, call_of
from dare_agg.nvflare.relay.server import SuperLinkConnector

QUICKSTART = Path(__file__).parents[1] / "apps" / "quickstart"
FLEET = "/v1/fleet/pull-messages"


class Running:
    """An applet that is running beside a SuperLink at a port."""

    def __init__(self, port):
        self.port = port

    def is_stopped(self):
        return False, 0


@pytest.fixture
def superlink():
    """A server that notes calls and answers with their body, reversed."""
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            calls.append((self.path, dict(self.headers), body))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(body[::-1])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.calls = calls
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server_end(superlink):
    connector = SuperLinkConnector(seconds=5.0)
    connector.applet = Running(superlink.server_port)
    return lambda request: connector.process_app_request("fleet", request, FLContext(), Signal())


def test_a_call_reaches_the_superlink_with_its_headers(superlink, server_end):
    call = Call(FLEET, b"\x00abc", {"content-type": "application/x-protobuf", "x-of-flower": "1"})
    reply = server_end(call.to_shareable())
    assert reply.get_return_code() == ReturnCode.OK
    assert (reply["status"], reply["body"]) == (200, b"cba\x00")
    path, headers, body = superlink.calls[0]
    assert (path, body, headers["x-of-flower"]) == (FLEET, b"\x00abc", "1")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/push-messages",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/pull-messages?x=/v1/control",
        "/v1/fleet/%2e%2e/control/start-run",
        "http://127.0.0.1/v1/fleet/pull-messages",
        "/v1/fleet/pull-messages\r\nX: y",
        None,
    ],
)
def test_a_site_reaches_the_fleet_api_alone(superlink, server_end, path):
    reply = server_end(Shareable({"path": path, "body": b"", "headers": {}}))
    assert reply.get_return_code() == ReturnCode.BAD_REQUEST_DATA
    assert superlink.calls == []


@pytest.mark.parametrize("body", [None, "text", ["x"], 7])
def test_a_body_is_bytes(server_end, body):
    reply = server_end(Shareable({"path": FLEET, "body": body, "headers": {}}))
    assert reply.get_return_code() == ReturnCode.BAD_REQUEST_DATA


def test_a_header_writes_no_second_header():
    with_break = {"x-a": "1\r\nx-b: 2", "x-c\r\n": "3", "x-d": "4", "Host": "elsewhere", "x-e": 5}
    call = call_of(Shareable({"path": FLEET, "body": b"", "headers": with_break}))
    assert call.headers == {"x-d": "4"}


def test_a_body_has_a_bound(monkeypatch):
    monkeypatch.setattr("dare_agg.nvflare.relay.exchange.MAX_BODY", 3)
    with pytest.raises(RunError, match="more than 3"):
        Call(FLEET, b"1234")
    assert MAX_BODY > 2**20


def test_what_does_not_answer_is_no_end_of_the_job(server_end, superlink):
    superlink.shutdown()
    superlink.server_close()
    reply = server_end(Call(FLEET, b"").to_shareable())
    assert reply.get_return_code() == ReturnCode.SERVICE_UNAVAILABLE


class Beside:
    """A SuperNodeConnector without a SuperNode, whose messages go to a function."""

    def __init__(self, answer):
        self.connector = SuperNodeConnector(5.0, 5.0)
        self.connector.start_applet = lambda context, fl_ctx: setattr(self, "context", context)
        self.connector.stop_applet = lambda: 0
        self.connector.send_request = lambda request, **words: answer(request)

    def __enter__(self):
        self.connector.configure({"sites": ["a", "b"]}, FLContext())
        self.connector.start(FLContext())
        return self

    def __exit__(self, *_):
        self.connector.stop(FLContext())

    def post(self, path, body=b""):
        url = f"http://127.0.0.1:{self.context['port']}{path}"
        request = urllib.request.Request(url, body, {"x-of-flower": "1"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def test_both_ends_together(server_end, superlink):
    with Beside(server_end) as site:
        assert site.post(FLEET, b"123") == (200, b"321")
        assert site.context["sites"] == ["a", "b"]
        assert site.post("/v1/control/list-runs") == (404, b"")
    assert [path for path, _, _ in superlink.calls] == [FLEET]
    assert superlink.calls[0][1]["x-of-flower"] == "1"


def test_a_node_hears_that_the_run_is_over():
    with Beside(lambda request: make_reply(ReturnCode.SERVICE_UNAVAILABLE)) as site:
        assert site.post(FLEET) == (503, b"")


@pytest.mark.parametrize("ended", [False, True])
def test_nodes_that_have_all_ended_before_the_run_fail_the_job(ended):
    connector, panics = SuperLinkConnector(seconds=5.0), []
    connector.applet = Running(0)
    connector.applet.is_stopped = lambda: (ended, 0)
    connector.applet.stop = lambda timeout: 0
    connector.system_panic = lambda reason, fl_ctx: panics.append(reason)
    connector.stop(FLContext())
    assert len(panics) == (not ended)


def test_the_folder_has_to_be_an_app(tmp_path):
    with pytest.raises(ConfigError, match=r"no pyproject\.toml"):
        flower_job(tmp_path, 2)


@pytest.mark.slow
def test_a_run_in_the_simulator(tmp_path):
    """The quickstart: a SuperLink, two SuperNodes, all their HTTP in NVFlare's messages."""
    app = tmp_path / "app"
    shutil.copytree(QUICKSTART, app)
    report = tmp_path / "report.json"
    words = {"num-server-rounds": 2, "output": str(report)}
    job = flower_job(app, 2, run_config=words)
    workspace = tmp_path / "workspace"
    assert job.simulator_run(str(workspace), n_clients=2, threads=2) == 0
    accuracy = json.loads(report.read_text())["accuracy"]
    assert len(accuracy) == 3 and accuracy[-1] > accuracy[0] + 0.1
    log = (workspace / "server" / "simulate_job" / "flwr" / "superlink.log").read_text()
    assert log.count("POST /v1/fleet/register-node") == 2


@pytest.mark.slow
def test_a_run_that_fails_fails_the_job(tmp_path):
    job = flower_job(QUICKSTART, 2, run_config={"no-such-word": 1})
    assert job.simulator_run(str(tmp_path / "workspace"), n_clients=2, threads=2) != 0
