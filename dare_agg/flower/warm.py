"""A trainer that stays: models and data are loaded once, not once a message.

Flower starts a new process for every message; with torch that costs many seconds a round.
With ``warm_trainer`` in front of the other mods, that process hands the message to a long-lived
process of the same app on the same machine and returns its reply::

    app = ClientApp(mods=[warm_trainer("client.app:app"), dare_mod])

It does so under a SuperNode, unless the node's config says ``warm=false`` or the node takes part
in secure sums, whose keys would stay in memory (there ``warm=true`` asks for it). They speak gRPC
over a Unix socket that only its owner can open; what travels is Flower's own protobuf.

A trainer is one run's and one node's: another run, node config or app has its own, and one that
has waited for a minute ends when another of its node starts. It keeps nothing that counts: state
comes with each message and goes back with each reply, so a trainer that dies is started again and
the message is sent once more; where that fails too, the message is handled in Flower's own
process, as without this mod. Where a file that ``watch`` names has changed since it started (data,
the model), a fresh one takes its place. It ends with the SuperNode, or after ``warm-idle`` seconds
(600) unused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from dare_agg.errors import ConfigError, RunError, StateError
from dare_agg.files.trust import check_folder
from dare_agg.flower.internals import (
    ClientAppCallable,
    app_mods,
    context_from_bytes,
    context_to_bytes,
    current_task,
    message_from_bytes,
    message_to_bytes,
)
from dare_agg.flower.processes.launcher import PROGRAM

LOG = logging.getLogger("flwr")
HANDLE = "/dare_agg.Warm/Handle"
MARK = "DARE_AGG_WARM_TRAINER"
IDLE_SECONDS = 600.0
# What a trainer answers that has read files which have changed since.
STALE = b""
# After so long without a message a trainer gives way to another run's.
GIVE_WAY_SECONDS = 60.0
# Logs and locks of trainers that are gone stay so long.
LEFT_SECONDS = 7 * 86400.0
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


Mod = Callable[[Message, Context, ClientAppCallable], Message]
Watch = Callable[[Context], Iterable[Path]]


def warm_trainer(reference: str, watch: Watch | None = None) -> Mod:
    """Make the mod; ``reference`` is the app as in pyproject.toml, "client.app:app".

    ``watch(context)`` names the files and folders that the app keeps in memory what it read of:
    a trainer in whose time one of them changed is replaced before it sees another message.
    Raises `ConfigError` for a reference of another form.
    """
    module, _, attribute = reference.partition(":")
    if not module or not attribute.isidentifier():
        raise ConfigError(f'app reference {reference!r}; "module:attribute" is needed')

    def warm_mod(msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        if os.environ.get(MARK) or not is_wanted(ctxt):
            return call_next(msg, ctxt)
        try:
            trainer = find_trainer(reference, ctxt)
            answer = call_trainer(trainer, pack_call(msg, ctxt))
            return unpack_answer(answer, ctxt)
        except Exception as error:  # of a folder, a socket, a process: not the app's
            LOG.warning("no warm trainer: %s; this message is handled without it", error)
            return call_next(msg, ctxt)

    warm_mod.watch = watch  # type: ignore[attr-defined]
    return warm_mod


def is_wanted(context: Context) -> bool:
    """Whether messages of this node go to a trainer that stays: its word, else where it is safe
    and the process would end with the message."""
    node = context.node_config
    if "warm" in node:
        return bool(node["warm"])
    return "secure-identity" not in node and Path(sys.argv[0]).name == PROGRAM


def watch_of(app: ClientApp) -> Watch | None:
    """What an app's `warm_trainer` was told to watch."""
    found = (getattr(mod, "watch", None) for mod in app_mods(app))
    return next((watch for watch in found if watch is not None), None)


def find_trainer(reference: str, context: Context) -> Trainer:
    """Name the trainer of this app, run and node; raises `RunError` without a safe place."""
    module, _, attribute = reference.partition(":")
    loaded = sys.modules.get(module)
    if loaded is None or not loaded.__file__ or not hasattr(loaded, attribute):
        raise RunError(f"app {reference!r} is not what runs here; name it as in pyproject.toml")
    app_folder = Path(loaded.__file__).resolve().parents[module.count(".")]
    name = context.node_config.get("client-name", context.node_config.get("partition-id", ""))
    node = _named(sys.executable, context.node_id, name)[:8]
    words = sorted(context.node_config.items()), sorted(context.run_config.items())
    what = _named(app_folder, reference, context.run_id, words)
    idle = float(context.node_config.get("warm-idle", IDLE_SECONDS))
    return Trainer(private_folder(), f"{node}-{what[:16]}", app_folder, reference, idle)


def _named(*what: object) -> str:
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()


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
    longest = len(os.fsencode(folder)) + len("/01234567-0123456789abcdef.sock")
    if longest > _LONGEST_SOCKET:
        raise RunError(
            f"a socket in {folder} has a path of {longest} bytes, at most {_LONGEST_SOCKET} work; "
            "set XDG_RUNTIME_DIR or TMPDIR to a shorter one"
        )
    return folder


def call_trainer(trainer: Trainer, call: bytes, attempts: int = 2) -> bytes:
    """Send a call, starting the trainer where none answers or it has read what has changed.

    Raises `RunError`.
    """
    import grpc

    problem = ""
    for _ in range(attempts):
        try:
            _ensure_running(trainer)
            with grpc.insecure_channel(f"unix:{trainer.socket}", options=UNLIMITED) as channel:
                answer = bytes(channel.unary_unary(HANDLE)(call))
            if answer != STALE:
                return answer
            problem = "its files changed again while it read them"
            LOG.info("files of the warm trainer have changed; a fresh one takes its place")
            _retire(trainer.socket)
        except grpc.RpcError as error:
            problem = f"{error.code().name.lower()}: {error.details()}"  # type: ignore[attr-defined]
            LOG.warning("the warm trainer was lost (%s)", problem[:200])
        except RunError as error:
            problem = str(error)
    raise RunError(f"the warm trainer does not answer: {problem[:300]}; see {trainer.log}")


def _ensure_running(trainer: Trainer) -> None:
    with _one_at_a_time(trainer):
        if _answers(trainer):
            os.utime(trainer.socket)
            return
        _retire(trainer.socket)
        _make_room(trainer)
        process = _start(trainer)
        until = time.monotonic() + START_SECONDS
        while not _answers(trainer):
            if process.poll() is not None:
                raise RunError(f"it ended with status {process.returncode}")
            if time.monotonic() > until:
                process.kill()
                raise RunError(f"it was not ready within {START_SECONDS:g} s")
            time.sleep(0.05)


def _make_room(trainer: Trainer) -> None:
    """Retire trainers of this node's other runs that wait, and remove what old ones left."""
    node = trainer.key.partition("-")[0]
    for other in trainer.folder.glob(f"{node}-*"):
        with contextlib.suppress(FileNotFoundError):
            waited = time.time() - other.stat().st_mtime
            least = GIVE_WAY_SECONDS if other.suffix == ".sock" else LEFT_SECONDS
            if waited > least and other.stem != trainer.key:
                other.unlink()


def _retire(path: Path) -> None:
    """Have the trainer behind a socket end once it is idle: nobody finds it any more."""
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(trainer: Trainer) -> Iterator[None]:
    with (trainer.folder / f"{trainer.key}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _answers(trainer: Trainer) -> bool:
    """Whether a trainer listens; one that was killed leaves a socket that nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(trainer.socket))
        except OSError:
            return False
    return True


def _start(trainer: Trainer) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    path = [str(trainer.app_folder), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    environment[MARK] = "1"
    command = [
        # Relative paths mean what they mean here, and what lies there is not imported.
        sys.executable, "-P", "-m", "dare_agg.flower.processes.warm_server", str(trainer.socket),
        trainer.reference, "--idle", str(trainer.idle), "--with-process", str(os.getppid()),
    ]  # fmt: skip
    LOG.info("starting a warm trainer; its log is %s", trainer.log)
    with trainer.log.open("ab") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
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
