"""What of Flower's HTTP is relayed: requests of SuperNodes to the Fleet API, and nothing else.

A SuperLink serves its Control and Runtime API at the same port; a site that could reach them would
start runs or speak for the ServerApp. Both ends check.
"""

from __future__ import annotations

import http.client
import re
from dataclasses import dataclass, field
from typing import Any

from nvflare.apis.shareable import Shareable

from dare_agg.errors import RunError

OPERATION = "fleet"
# One object of Flower's message inflation is far below; what a client may have the server hold.
MAX_BODY = 256 << 20
_PATH = re.compile(r"/v1/fleet/[a-z][a-z-]{0,40}")
# What belongs to one connection and not to the call.
_OWN_HEADERS = {"connection", "content-length", "date", "host", "keep-alive", "server"}
_OWN_HEADERS |= {"te", "trailer", "transfer-encoding", "upgrade"}


@dataclass(frozen=True)
class Call:
    """A request to the Fleet API: always a POST."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not _PATH.fullmatch(self.path):
            raise RunError(
                f"a site asked for {self.path!r:.80} of the SuperLink; only /v1/fleet/… is relayed"
            )
        if not isinstance(self.body, bytes) or len(self.body) > MAX_BODY:
            raise RunError(f"the body of {self.path} is no bytes, or more than {MAX_BODY}")

    def to_shareable(self) -> Shareable:
        """As NVFlare carries it."""
        return Shareable({"path": self.path, "body": self.body, "headers": self.headers})


def call_of(shareable: Shareable) -> Call:
    """The call in a message of a site; `RunError` where it is none that is relayed."""
    headers = shareable.get("headers")
    return Call(shareable.get("path"), shareable.get("body"), kept_headers(headers))


def kept_headers(headers: Any) -> dict[str, str]:
    """Headers of a call or an answer, without those of its connection."""
    pairs = headers.items() if isinstance(headers, dict) else ()
    return {
        name.lower(): value
        for name, value in pairs
        if isinstance(name, str) and isinstance(value, str)
        and name.lower() not in _OWN_HEADERS and f"{name}{value}".isprintable()
    }  # fmt: skip


def post(port: int, call: Call, seconds: float) -> tuple[int, dict[str, str], bytes]:
    """Post a call to the SuperLink at a port of the loopback: status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("POST", call.path, call.body, call.headers)
        answer = connection.getresponse()
        return answer.status, kept_headers(dict(answer.getheaders())), answer.read()
    finally:
        connection.close()
