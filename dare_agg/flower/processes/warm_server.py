"""The long-lived process behind `dare_agg.flower.warm`: loads an app once, handles its messages.

``python -m dare_agg.flower.processes.warm_server SOCKET module:attribute [--idle SECONDS]
[--with-process PID]``
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp

from dare_agg.errors import ConfigError
from dare_agg.flower.internals import failure, set_task
from dare_agg.flower.processes.watched import Seen, signature
from dare_agg.flower.warm import (
    HANDLE,
    IDLE_SECONDS,
    STALE,
    UNLIMITED,
    pack_call,
    unpack_call,
    watch_of,
)

LOG = logging.getLogger("flwr")


class Handler:
    """Runs one message after another through the app."""

    def __init__(self, app: ClientApp) -> None:
        self.app = app
        self.watch = watch_of(app)
        self.seen: Seen | None = None
        self.used = time.monotonic()
        self.busy = threading.Lock()

    def handle(self, call: bytes, _: object = None) -> bytes:
        """Run one packed call; what the app raises becomes Flower's error reply.

        `STALE` where files that the app may have read have changed since the first call.
        """
        with self.busy:
            began = time.monotonic()
            task, message, context = unpack_call(call)
            found = self.look(context)
            if found != (found if self.seen is None else self.seen):
                return STALE
            self.seen = found
            set_task(task, context.run_id, context.node_id)
            try:
                reply = self.app(message, context)
            except Exception as error:
                LOG.exception("the app raised")
                reply = failure(error, message)
            self.used = time.monotonic()
            LOG.info("%s in %.2f s", message.metadata.message_type, self.used - began)
            return pack_call(reply, context)

    def look(self, context: Context) -> Seen:
        """The state of what is watched, before the app reads any of it."""
        if self.watch is None:
            return ()
        try:
            return signature(self.watch(context))
        except Exception as error:  # whatever the app finds wrong it says itself
            LOG.warning("what this app reads is not known: %s", error)
            return ()

    def idle_for(self) -> float:
        """Seconds since the last message; 0 while one is handled."""
        return 0.0 if self.busy.locked() else time.monotonic() - self.used


def load_app(reference: str) -> ClientApp:
    """Import ``module:attribute`` from the Python path."""
    module, _, attribute = reference.partition(":")
    app = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(app, ClientApp):
        raise ConfigError(f"{reference!r} is a {type(app).__name__}; a ClientApp is needed")
    return app


def serve(socket: Path, handler: Handler, idle: float, process: int = 0) -> None:
    """Answer on the socket until it, or ``process``, is gone or nothing came for so long."""
    import grpc

    server = grpc.server(ThreadPoolExecutor(4), options=UNLIMITED)
    service, _, method = HANDLE.strip("/").partition("/")
    behaviour: Any = grpc.unary_unary_rpc_method_handler(handler.handle)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: behaviour}),)
    )
    # gRPC removes the path it bound when it stops, whoever listens there by then: it binds one of
    # this process's own, and is found by the other.
    bound = socket.with_name(f"{os.getpid()}.bound")
    bound.unlink(missing_ok=True)
    if not server.add_insecure_port(f"unix:{bound}"):
        raise ConfigError(f"{bound} cannot be listened on")
    os.chmod(bound, 0o600)
    server.start()
    os.link(bound, socket)
    bound.unlink()
    LOG.info("warm trainer %d listens on %s", os.getpid(), socket)
    # A trainer whose socket another one took over would never be found again.
    mine = socket.stat().st_ino
    while handler.idle_for() < idle and _inode(socket) == mine and _lives(process):
        time.sleep(min(1.0, idle / 4))
    server.stop(grace=None).wait()
    if _inode(socket) == mine:
        socket.unlink(missing_ok=True)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _lives(process: int) -> bool:
    if process <= 1:  # none was named, or it was gone already
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def main() -> None:
    """Started by `dare_agg.flower.warm`: load the app named in the arguments and serve it."""
    parser = argparse.ArgumentParser(prog="python -m dare_agg.flower.processes.warm_server")
    parser.add_argument("socket", type=Path)
    parser.add_argument("reference")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS)
    parser.add_argument("--with-process", type=int, default=0, help="end when this one does")
    options = parser.parse_args()
    os.umask(0o077)
    handler = Handler(load_app(options.reference))
    serve(options.socket, handler, options.idle, options.with_process)


if __name__ == "__main__":
    main()
