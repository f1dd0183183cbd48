"""A made-up SuperLink on loopback: Flower's real client talks to it, clients answer in memory.

What a reply is made of can be replaced part by part before it is handed out, as by a client that
does without Flower's serialiser.
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.clientapp import ClientApp
from flwr.proto import message_pb2, node_pb2, runtime_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from dare_agg.flower.internals import failure, message_to_bytes
from dare_agg.flower.records import ORDER_KEY
from simulations.runs.memory_grid import MemoryGrid, stamp


@dataclass(frozen=True)
class Zeros:
    """A part that ends with so many zeros, made while it is sent."""

    head: bytes
    length: int


@dataclass
class Reply:
    """A reply as the SuperLink keeps it: announced by ``message`` and ``tree``.

    A part that is None is gone, an empty one under way.
    """

    message: Any
    tree: Any
    parts: dict[str, bytes | Zeros | None]


# What a client's reply is replaced by, given which client it is and what it was asked.
Attack = Callable[[int, str, Reply], Reply]


@dataclass
class SuperLink:
    """Answers the requests of a ServerApp; ``clients`` nodes run ``app`` when asked for replies.

    ``status`` fails requests, by the last word of their path.
    """

    app: ClientApp
    clients: int
    attack: Attack = lambda client, asked, reply: reply
    status: Mapping[str, int] = field(default_factory=dict)
    sent_bytes: int = 0
    confirmed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes = MemoryGrid(self.app, self.clients)
        self.objects: dict[str, bytes] = {}
        self.orders: dict[str, Any] = {}
        self.replies: dict[str, Reply] = {}
        self.lock = threading.Lock()

    def reply_to(self, message_id: str) -> Reply:
        """Run the client's app; the reply as it announces and uploads it."""
        message: Any = inflate_object_from_contents(
            message_id, self.objects, keep_object_contents=True
        )
        stamp(message, message_id=message_id)
        node = message.metadata.dst_node_id
        try:
            reply = self.app(message, self.nodes.contexts[node])
        except Exception as error:
            reply = failure(error, message)
        with no_object_id_recompute():
            stamp(reply, message_id=reply.object_id)
            parts = {key: part.deflate() for key, part in get_all_nested_objects(reply).items()}
            tree = get_object_tree(reply)
        announced = Reply(
            message_pb2.Message.FromString(message_to_bytes(reply)), tree, dict(parts)
        )
        announced.message.ClearField("content")
        if not reply.has_error():
            announced.message.content.SetInParent()
        order = message.content.config_records.get(ORDER_KEY, {})
        asked = str(order.get("ask", message.metadata.message_type))
        return self.attack(self.nodes.partitions[node], asked, announced)

    def answer(self, path: str, raw: bytes) -> tuple[Any, Zeros | None]:
        """The answer to a request, and the part that ends it."""
        what = path.rpartition("/")[2]
        if what == "get-nodes":
            nodes = [node_pb2.NodeInfo(node_id=node) for node in self.nodes.partitions]
            return runtime_pb2.GetNodesResponse(nodes=nodes), None
        if what == "push-messages":
            request = runtime_pb2.PushAppMessagesRequest.FromString(raw)
            ids = [message.metadata.message_id for message in request.messages_list]
            wanted: dict[str, None] = {}
            for tree in request.message_object_trees:
                wanted.update(dict.fromkeys(digests(tree)))
            return runtime_pb2.PushAppMessagesResponse(
                message_ids=ids, objects_to_push=wanted
            ), None
        if what == "push-object":
            part = message_pb2.PushObjectRequest.FromString(raw)
            self.objects[part.object_id] = part.object_content
            return message_pb2.PushObjectResponse(stored=True), None
        if what == "pull-messages":
            (message_id,) = runtime_pb2.PullAppMessagesRequest.FromString(raw).message_ids
            reply = self.reply_to(message_id)
            self.replies[reply.message.metadata.message_id] = reply
            return (
                runtime_pb2.PullAppMessagesResponse(
                    messages_list=[reply.message], message_object_trees=[reply.tree]
                ),
                None,
            )
        if what == "pull-object":
            return self.part(message_pb2.PullObjectRequest.FromString(raw).object_id)
        assert what == "confirm-message-received", what
        confirmed = message_pb2.ConfirmMessageReceivedRequest.FromString(raw)
        self.confirmed.append(confirmed.message_object_id)
        return message_pb2.ConfirmMessageReceivedResponse(), None

    def part(self, digest: str) -> tuple[Any, Zeros | None]:
        found = [reply.parts[digest] for reply in self.replies.values() if digest in reply.parts]
        if not found or found[0] is None:
            return message_pb2.PullObjectResponse(object_found=False), None
        part = found[0] if isinstance(found[0], Zeros) else Zeros(found[0], 0)
        there = bool(part.head)
        answer = message_pb2.PullObjectResponse(object_found=True, object_available=there)
        return answer, part if there else None

    @contextmanager
    def serve(self) -> Iterator[HttpGrid]:
        """Serve on a free port; yields Flower's own client of it."""
        link = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with link.lock:
                    answer, zeros = link.answer(self.path, raw)
                body = answer.SerializeToString()
                head, left = (zeros.head, zeros.length) if zeros is not None else (b"", 0)
                if zeros is not None:
                    field_number = answer.DESCRIPTOR.fields_by_name["object_content"].number
                    body += bytes([field_number << 3 | 2]) + varint(len(head) + left)
                self.send_response(link.status.get(self.path.rpartition("/")[2], 200))
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(body) + len(head) + left))
                self.end_headers()
                try:
                    self.wfile.write(body)
                    self.wfile.write(head)
                    while left > 0:
                        link.sent_bytes += self.wfile.write(bytes(min(left, 1 << 16)))
                        left -= 1 << 16
                except OSError:  # the other end does not want to read it
                    self.close_connection = True

            def log_message(self, *words: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        grid = HttpGrid(f"127.0.0.1:{server.server_port}", insecure=True, token="x")
        grid.set_run(Run.create_empty(1))
        try:
            yield grid
        finally:
            server.shutdown()
            server.server_close()


def digests(tree: Any) -> Iterator[str]:
    """The digests of a tree, parts first."""
    for child in tree.children:
        yield from digests(child)
    yield tree.object_id


def varint(number: int) -> bytes:
    """A length as protobuf writes it."""
    raw = bytearray()
    while number > 127:
        raw.append(number & 127 | 128)
        number >>= 7
    return bytes([*raw, number])
