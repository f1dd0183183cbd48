"""Flower's real client against a SuperLink that answers 500 for a while."""

import http.server
import threading

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesResponse
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from dare_agg.errors import RunError
from dare_agg.flower import patience
from dare_agg.flower.exchange import exchange, online_nodes


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers 500 ``failures`` times, then names one node."""

    failures = 0
    asked = 0

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).asked += 1
        fails = self.asked <= self.failures
        body = b"{}" if fails else GetNodesResponse(nodes=[NodeInfo(node_id=7)]).SerializeToString()
        self.send_response(500 if fails else 200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def grid_of(monkeypatch):
    servers = []

    def make(failures: int) -> tuple[HttpGrid, type[Failing]]:
        handler = type("Handler", (Failing,), {"failures": failures})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        grid = HttpGrid(f"127.0.0.1:{server.server_port}", insecure=True, token="x")
        grid.set_run(Run.create_empty(1))
        grid._retry_invoker.wait_function = lambda seconds: None
        return grid, handler

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_superlink_that_fails_for_a_moment_is_asked_again(grid_of):
    grid, handler = grid_of(failures=3)
    assert online_nodes(grid) == [7]
    assert handler.asked == 4


def test_flower_alone_gives_up_at_once(grid_of):
    """Why this is here; when it fails, Flower does it itself and `patience` may go."""
    grid, handler = grid_of(failures=3)
    with pytest.raises(Exception, match="500"):
        list(grid.get_node_ids())
    assert handler.asked == 1


def test_patience_has_an_end_that_says_what_to_do(grid_of, monkeypatch):
    grid, _ = grid_of(failures=10**9)
    patience.be_patient(grid, seconds=0.2)
    monkeypatch.setattr(grid, "push_messages", lambda messages: ["a"])
    with pytest.raises(RunError, match="resume the run") as raised:
        list(exchange(grid, [Message(RecordDict(), 7, "train")], timeout=30))
    assert raised.value.reason == "superlink"
