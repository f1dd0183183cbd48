"""A trainer that stays: models and data are loaded once, not once a message.

Flower starts a new process for every message; with torch that costs many seconds a round.
With ``warm_trainer`` in front of the other mods and ``warm=true`` in a node's config, that
process hands the message to a long-lived process of the same app on the same machine and
returns its reply::

    app = ClientApp(mods=[warm_trainer("client.app:app"), dare_mod])

They speak gRPC over a Unix socket that only its owner can open; what travels is Flower's own
protobuf. The trainer keeps nothing that counts: state comes with each message and goes back
with each reply, so a trainer that dies is started again and the message is sent once more;
where that fails too, the message is handled in Flower's own process, as without this mod. It
ends with the SuperNode's launcher of processes, or after ``warm-idle`` seconds (1800) unused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message

from dare_agg.errors import ConfigError, RunError, StateError
from dare_agg.files.trust import check_folder
from dare_agg.flower.internals import (
    ClientAppCallable,
    context_from_bytes,
    context_to_bytes,
    current_task,
    message_from_bytes,
    message_to_bytes,
)

LOG = logging.getLogger("flwr")
HANDLE = "/dare_agg.Warm/Handle"
MARK = "DARE_AGG_WARM_TRAINER"
IDLE_SECONDS = 1800.0
START_SECONDS = 120.0
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
# What a Unix socket's address holds (sun_path of Linux, less its end).
_LONGEST_SOCKET = 107
_HEAD = struct.Struct("<QQQ")  # task id, bytes of the message, bytes of the context


@dataclass(frozen=True)
class Trainer:
    """Where the trainer of one app and one node lives."""

    folder: Path
    key: str
    app_folder: Path
    reference: str
    idle: float

    @property
    def socket(self) -> Path:
        """The Unix socket it listens on."""
        return self.folder / f"{self.key}.sock"

    @property
    def log(self) -> Path:
        """The file it logs to."""
        return self.folder / f"{self.key}.log"


def warm_trainer(
    reference: str,
) -> Callable[[Message, Context, ClientAppCallable], Message]:
    """Make the mod; ``reference`` is the app as in pyproject.toml, "client.app:app".

    Raises `ConfigError` for a reference of another form.
    """
    module, _, attribute = reference.partition(":")
    if not module or not attribute.isidentifier():
        raise ConfigError(f'app reference {reference!r}; "module:attribute" is needed')

    def warm_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        if not ctxt.node_config.get("warm") or os.environ.get(MARK):
            return call_next(msg, ctxt)
        try:
            trainer = find_trainer(reference, ctxt)
            answer = call_trainer(trainer, pack_call(msg, ctxt))
            return unpack_answer(answer, ctxt)
        except Exception as error:  # of a folder, a socket, a process: not the app's
            LOG.warning("no warm trainer: %s; this message is handled without it", error)
            return call_next(msg, ctxt)

    return warm_mod


def find_trainer(reference: str, context: Context) -> Trainer:
    """Name the trainer of this app, node and Python; raises `RunError` without a safe place."""
    module, _, attribute = reference.partition(":")
    loaded = sys.modules.get(module)
    if loaded is None or not loaded.__file__ or not hasattr(loaded, attribute):
        raise RunError(f"app {reference!r} is not what runs here; name it as in pyproject.toml")
    app_folder = Path(loaded.__file__).resolve().parents[module.count(".")]
    name = context.node_config.get("client-name", context.node_config.get("partition-id", ""))
    what = [str(app_folder), reference, sys.executable, str(context.node_id), str(name)]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    idle = float(context.node_config.get("warm-idle", IDLE_SECONDS))
    return Trainer(private_folder(), key, app_folder, reference, idle)


def private_folder() -> Path:
    """A folder that is ours alone, short enough for a socket's path.

    Raises `RunError` where others can write or the path would be too long.
    """
    root = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(root) / f"dare-agg-{os.getuid()}"
    try:
        check_folder(Path(root), remedy="set XDG_RUNTIME_DIR to a folder of this user's own")
    except (StateError, OSError) as error:
        raise RunError(str(error)) from error
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RunError(f"{folder} is not a folder of this user alone (mode 700); remove it")
    longest = len(os.fsencode(folder)) + len("/0123456789abcdef.sock")
    if longest > _LONGEST_SOCKET:
        raise RunError(
            f"a socket in {folder} has a path of {longest} bytes, at most {_LONGEST_SOCKET} work; "
            "set XDG_RUNTIME_DIR or TMPDIR to a shorter one"
        )
    return folder


def call_trainer(trainer: Trainer, call: bytes, attempts: int = 2) -> bytes:
    """Send a call, starting the trainer where none answers; raises `RunError`."""
    import grpc

    problem = ""
    for _ in range(attempts):
        try:
            _ensure_running(trainer)
            with grpc.insecure_channel(f"unix:{trainer.socket}", options=UNLIMITED) as channel:
                handle = channel.unary_unary(HANDLE)
                return bytes(handle(call))
        except grpc.RpcError as error:
            problem = f"{error.code().name.lower()}: {error.details()}"  # type: ignore[attr-defined]
            LOG.warning("the warm trainer was lost (%s)", problem[:200])
        except RunError as error:
            problem = str(error)
    raise RunError(f"the warm trainer does not answer: {problem[:300]}; see {trainer.log}")


def _ensure_running(trainer: Trainer) -> None:
    with _one_at_a_time(trainer):
        if _answers(trainer, 1.0):
            return
        trainer.socket.unlink(missing_ok=True)
        process = _start(trainer)
        until = time.monotonic() + START_SECONDS
        while not _answers(trainer, 1.0):
            if process.poll() is not None:
                raise RunError(f"it ended with status {process.returncode}")
            if time.monotonic() > until:
                process.kill()
                raise RunError(f"it was not ready within {START_SECONDS:g} s")
            time.sleep(0.05)


@contextlib.contextmanager
def _one_at_a_time(trainer: Trainer) -> Iterator[None]:
    with (trainer.folder / f"{trainer.key}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _answers(trainer: Trainer, seconds: float) -> bool:
    import grpc

    if not trainer.socket.exists():
        return False
    with grpc.insecure_channel(f"unix:{trainer.socket}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            return False
    return True


def _start(trainer: Trainer) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    path = [str(trainer.app_folder), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    environment[MARK] = "1"
    command = [
        sys.executable, "-m", "dare_agg.flower.processes.warm_server", str(trainer.socket),
        trainer.reference, "--idle", str(trainer.idle), "--with-process", str(os.getppid()),
    ]  # fmt: skip
    LOG.info("starting a warm trainer; its log is %s", trainer.log)
    with trainer.log.open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            cwd=trainer.folder, start_new_session=True,
        )  # fmt: skip


# --- what travels --------------------------------------------------------------------------


def pack_call(message: Message, context: Context) -> bytes:
    """A message (or a reply) and its context, as Flower's protobuf behind this task's id."""
    first, second = message_to_bytes(message), context_to_bytes(context)
    return b"".join((_HEAD.pack(current_task(), len(first), len(second)), first, second))


def unpack_call(call: bytes) -> tuple[int, Message, Context]:
    """Read `pack_call` back: task id, message, context."""
    task, first, second = _HEAD.unpack_from(call)
    if len(call) != _HEAD.size + first + second:
        raise RunError(f"a call of {len(call)} bytes, {_HEAD.size + first + second} announced")
    message = message_from_bytes(call[_HEAD.size : _HEAD.size + first])
    return task, message, context_from_bytes(call[_HEAD.size + first :])


def unpack_answer(answer: bytes, context: Context) -> Message:
    """Read a reply; the app's state goes into ``context``."""
    _, reply, left = unpack_call(answer)
    context.state = left.state
    return reply
