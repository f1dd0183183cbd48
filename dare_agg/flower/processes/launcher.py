"""A process that has Flower's client loaded and forks one for each message.

``python -P launcher.py SOCKET`` (by path: it imports nothing of this package, whose copy an app
may bring with it). A SuperNode's SuperExec starts ``flwr-clientapp`` for every message, which
takes a second of imports before it asks what to do. `start_clientapp`, which stands first on the
SuperNode's PATH under that name, has it forked here instead: Flower's own program, unchanged, with
the same arguments, output and environment, and nothing of the message before.

Flower hands a message on before all of it is there, and a client that asks for the rest waits one,
two, … seconds then. So a forked process first waits until its SuperNode has let go of the lock
that it holds while it receives, `RECEIVING` beside the socket, for some seconds at most.

It listens on a Unix socket of this user alone and ends when its standard input does, which its
SuperNode holds.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import fcntl
import gc
import importlib
import os
import random
import selectors
import shutil
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import NoReturn

PROGRAM = "flwr-clientapp"
# What nearly every ClientApp imports besides; where one is missing it is left out.
PRELOADED = (
    "numpy",
    "grpc",
    "re2",
    "safetensors.numpy",
    "cryptography.hazmat.primitives.asymmetric.ed25519",
    "cryptography.hazmat.primitives.ciphers.aead",
)
RECEIVING = "receiving"
# A slow link takes longer; Flower's client then waits itself, and is seen to live.
RECEIVING_SECONDS = 5.0
MAX_REQUEST = 65536
_LOOK_SECONDS = 1.0
_CREDENTIALS = struct.Struct("3i")


def serve(listener: socket.socket) -> list[str] | None:
    """Fork for each request; returns its arguments in the forked process, None at the end."""
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(sys.stdin.fileno(), selectors.EVENT_READ)
        while True:
            found = [key.fileobj for key, _ in ready.select(_LOOK_SECONDS)]
            _reap()
            if sys.stdin.fileno() in found and not os.read(sys.stdin.fileno(), 1):
                return None
            if listener not in found:
                continue
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5.0)
                try:
                    request = _read(connection)
                except (OSError, ValueError):
                    continue
                arguments, descriptors = request
                if os.fork() == 0:
                    listener.close()
                    _take_over(descriptors)
                    return arguments
                for descriptor in descriptors:
                    os.close(descriptor)
                with contextlib.suppress(OSError):
                    connection.sendall(b"1")


def _read(connection: socket.socket) -> tuple[list[str], list[int]]:
    """Arguments and standard streams of one request, of this user's own processes alone."""
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(peer)[1] != os.getuid():
        raise ValueError("a request of another user")
    data, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST, 3)
    if len(descriptors) != 3 or not data.endswith(b"\0"):
        for descriptor in descriptors:
            os.close(descriptor)
        raise ValueError("a request of another form")
    return [os.fsdecode(part) for part in data[:-1].split(b"\0")], list(descriptors)


def _take_over(descriptors: list[int]) -> None:
    """Make the forked process what a new one would be: its streams, and draws of its own."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """Listen, load, and fork; in a forked process, be Flower's program."""
    parser = argparse.ArgumentParser(prog="python -P launcher.py", description=__doc__)
    parser.add_argument("socket", type=Path)
    parser.add_argument("--remove", type=Path, help="folder to remove at the end")
    options = parser.parse_args()
    os.umask(0o077)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(options.socket))
    # Who asks from now on waits until all is loaded.
    listener.listen(8)
    (script,) = distribution("flwr").entry_points.select(group="console_scripts", name=PROGRAM)
    program = script.load()
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from flwr.serverapp import Grid  # noqa: F401

    # Collections in the forked processes leave what was loaded alone, and its pages shared.
    gc.collect()
    gc.freeze()
    try:
        arguments = serve(listener)
    except KeyboardInterrupt:
        arguments = None
    if arguments is None and options.remove:  # a SuperNode that was killed cannot
        shutil.rmtree(options.remove, ignore_errors=True)
    if arguments is not None:
        wait_for_message(options.socket.with_name(RECEIVING))
        sys.argv = [PROGRAM, *arguments]
        _run(program)


def wait_for_message(lock: Path, seconds: float = RECEIVING_SECONDS) -> None:
    """Wait until nobody holds the lock, at most so long; without the file not at all."""
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError), lock.open("rb") as file:
        while time.monotonic() < until:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            time.sleep(0.005)


def _run(program: Callable[[], object]) -> NoReturn:
    """Run the program and end as an interpreter does, but for taking apart all that is loaded."""
    status = 0
    try:
        status = _status(program())
    except SystemExit as error:
        status = _status(error.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    try:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status(code: object) -> int:
    """The exit status of what `sys.exit` was given."""
    if code is None or isinstance(code, int):
        return int(code or 0) & 0xFF
    print(code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
