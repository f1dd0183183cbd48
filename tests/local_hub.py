"""A hub of models on the loopback, with the four answers that a download needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c0ffee" + "0" * 34


@dataclass
class LocalHub:
    """Where it listens, whose files it has, and what it was asked for."""

    address: str
    models: dict[str, Path]
    asked: list[str] = field(default_factory=list)


@contextmanager
def local_hub(models: dict[str, Path]) -> Iterator[LocalHub]:
    """Serve folders by their hub names; branch main alone."""
    hub = LocalHub("", models)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            if body:
                hub.asked.append(path)
            api = path.startswith("/api/models/")
            owner, name, what, revision, *file = path.removeprefix("/api/models").split("/")[1:]
            folder = hub.models.get(f"{owner}/{name}")
            headers = {"X-Repo-Commit": COMMIT}
            status, content = 200, b""
            if folder is None:
                status, headers["X-Error-Code"] = 404, "RepoNotFound"
            elif revision not in ("main", COMMIT):
                status, headers["X-Error-Code"] = 404, "RevisionNotFound"
            elif api:
                inside = [p for p in sorted(folder.rglob("*")) if p.is_file()]
                paths = [str(p.relative_to(folder)) for p in inside]
                listed: object = [
                    {"type": "file", "path": path, "size": p.stat().st_size, "oid": "0" * 40}
                    for path, p in zip(paths, inside, strict=True)
                ]
                if what == "revision":
                    siblings = [{"rfilename": path} for path in paths]
                    listed = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
                content = json.dumps(listed).encode()
                headers["Content-Type"] = "application/json"
            elif (folder / "/".join(file)).is_file():
                content = (folder / "/".join(file)).read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            else:
                status, headers["X-Error-Code"] = 404, "EntryNotFound"
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
