"""A run's page on loopback: kept up to date from the run's folder, for this user's browser alone.

It answers four addresses and no other: the frame, its style, its script and the run's facts, each
below a key that is drawn at the start and printed with the address, since other users of the
machine reach loopback too. No part of an address becomes a path of the disk. Requests by another
name than loopback's (DNS rebinding) or from another page are refused; no word of a client's
becomes HTML (`dare_agg.runs.report`), and the page may fetch nothing from elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dare_agg import __version__
from dare_agg.errors import ConfigError, StateError
from dare_agg.runs.live import live_facts, run_stamp
from dare_agg.runs.report.parts import STYLE, live_frame, part, script

HOST = "127.0.0.1"
PORT = 8650
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'"
)
_NAMES = ("127.0.0.1", "localhost")
_MOST_AT_ONCE = 32
_HEADERS = {
    "Content-Security-Policy": POLICY + "; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass
class Watched:
    """A run's folder and its facts as last sent; read anew where a file has changed."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    _stamp: tuple[Any, ...] = ()
    _body: bytes = b""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self) -> tuple[bytes, str]:
        """The facts as JSON and their tag; raises `StateError` as `live_facts`."""
        with self._lock:
            stamp = run_stamp(self.folder)
            if stamp != self._stamp:
                self.facts = live_facts(self.folder)
                self._body = json.dumps(self.facts, allow_nan=False).encode()
                self._stamp = stamp
            return self._body, f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'


@dataclass(frozen=True)
class Watch:
    """A page that is served; ``address`` is what a browser opens."""

    address: str
    watched: Watched


@contextlib.contextmanager
def serve(folder: Path, port: int = PORT) -> Iterator[Watch]:
    """Serve the page of the run in ``folder`` as long as the context lasts.

    With ``port`` 0 any that is free. Raises `ConfigError` where the port is taken.
    """
    watched, key = Watched(folder), secrets.token_urlsafe(16)
    try:
        server = _Server((HOST, port), _handler(watched, key))
    except OSError as error:
        raise ConfigError(
            f"port {port} of {HOST} cannot be listened on: {error.strerror or error}; another "
            f"watch may have it: give another one, or 0 for any that is free"
        ) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2})
    thread.daemon = True
    thread.start()
    try:
        yield Watch(f"http://{HOST}:{server.server_port}/{key}/", watched)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *words: Any) -> None:
        self._free = threading.BoundedSemaphore(_MOST_AT_ONCE)
        super().__init__(*words)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Whoever opens more at once than a browser does waits outside.
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is nobody's business."""


def _handler(watched: Watched, key: str) -> type[BaseHTTPRequestHandler]:
    def facts() -> tuple[bytes, str]:
        return watched.look()

    pages: dict[str, tuple[str, Callable[[], tuple[bytes, str]]]] = {
        "": ("text/html; charset=utf-8", lambda: (live_frame(POLICY).encode(), "")),
        STYLE: ("text/css; charset=utf-8", lambda: (part(STYLE).encode(), "")),
        "page.js": ("text/javascript; charset=utf-8", lambda: (script("live.js").encode(), "")),
        "facts": ("application/json", facts),
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 15

        def do_GET(self) -> None:
            refused = self._refused()
            if refused is not None:
                self._send(*refused)
                return
            first, slash, name = self.path.removeprefix("/").partition("/")
            known = bool(slash) and hmac.compare_digest(first.encode(), key.encode())
            if not known or name not in pages:
                self._send(404, b"not found: open the address that dare-agg watch printed\n")
                return
            kind, read = pages[name]
            try:
                body, tag = read()
            except StateError as error:
                self._send(409, str(error).encode() + b"\n")
                return
            if tag and self.headers.get("If-None-Match") == tag:
                self._send(304, b"", tag=tag)
            else:
                self._send(200, body, kind, tag)

        do_HEAD = do_GET

        def _refused(self) -> tuple[int, bytes] | None:
            """A page elsewhere must not read this one, by whatever name it calls it."""
            hosts = self.headers.get_all("Host", [])
            host = hosts[0] if len(hosts) == 1 else ""
            name, _, port = host.partition(":")
            if name not in _NAMES or not (port.isdecimal() or not port):
                return 421, b"this page answers to 127.0.0.1 and localhost alone\n"
            origin = self.headers.get("Origin")
            site = self.headers.get("Sec-Fetch-Site", "none")
            if (origin is not None and origin != f"http://{host}") or site not in (
                "none",
                "same-origin",
            ):
                return 403, b"another page may not read this one\n"
            return None

        def _send(
            self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8", tag: str = ""
        ) -> None:
            # A connection that is kept would be served beyond the page's end.
            self.close_connection = True
            self.send_response(status)
            self.send_header("Connection", "close")
            for header, value in _HEADERS.items():
                self.send_header(header, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            if self.command != "HEAD" and status != 304:
                self.wfile.write(body)

        def version_string(self) -> str:
            return f"dare-agg/{__version__}"

        def send_error(
            self, code: int, message: str | None = None, explain: str | None = None
        ) -> None:
            """Say no more than the number: nothing of a request comes back."""
            self._send(code, b"refused\n")

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged: the key is in them."""

    return Handler
