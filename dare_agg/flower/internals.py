"""Everything of Flower that is not public and that we lean on, in one place.

`INTERNALS` says of each part why, and what would be lost without it; the rest of the library
reaches them through the functions below and imports ``flwr.app``, ``flwr.serverapp``,
``flwr.serverapp.strategy`` and ``flwr.clientapp`` alone. ``tests/flower/test_internals.py``
holds each row against every supported Flower and fails with the row's words. At run time a part
that is missing raises `FlowerVersionError`, where it is used and not before.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NoReturn

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from dare_agg.deploy.packages import is_supported, pip_install
from dare_agg.errors import FlowerVersionError

# What a mod calls to go on; Flower's own name for it is not public.
ClientAppCallable = Callable[[Message, Context], Message]
GiveUp = Callable[[Exception], bool]
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Internal:
    """One part of Flower: where it stands ("module:attribute"), and what it is to us."""

    where: str
    why: str


INTERNALS = {
    "bundle": Internal(
        "flwr.cli.build:build_fab_from_disk",
        "makes an app's bundle as `flwr run` does; without it no SuperNode can be pinned to an app",
    ),
    "reception": Internal(
        "flwr.supernode.start_client_internal:_pull_and_store_message",
        "takes a message and its run's bundle; wrapped so that every bundle is asked about, "
        "without which a SuperNode would run whatever app it is sent, and so that a node without "
        "work asks again soon",
    ),
    "verification": Internal(
        "flwr.supernode.start_client_internal:_verify_fab",
        "accepts or refuses a bundle; replaced by the comparison with the party's own app",
    ),
    "agents": Internal(
        "flwr.supercore.constant:TaskType",
        "names the kinds of runs; a pinned SuperNode starts no agents, which Flower would start in "
        "place of the app",
    ),
    "sending": Internal(
        "flwr.supernode.start_client_internal:_push_messages",
        "sends replies, exceptions verbatim; wrapped so that a party's stay in its own log, and so "
        "that a reply goes out when it is there",
    ),
    "object-tree": Internal(
        "flwr.supercore.inflatable.inflatable_object:get_object_tree",
        "names the parts of a message as they travel, for an error that is told in other words",
    ),
    "give-up": Internal(
        "flwr.superlink.grid:HttpGrid._retry_invoker.should_giveup",
        "ends a request for good; replaced so that a SuperLink that answers 500 for a moment does "
        "not end a run of hours",
    ),
    "runtime-client": Internal(
        "flwr.superlink.grid:HttpGrid._runtime_client",
        "asks the SuperLink for one reply and its parts; without it whatever Flower raises over "
        "one client's reply ends the run of all",
    ),
    "http-client": Internal(
        "flwr.supercore.runtime:RuntimeHttpClient._client",
        "sends the requests; hooked so that an answer longer than it may be is not read",
    ),
    "ask-for-reply": Internal(
        "flwr.proto.runtime_pb2:PullAppMessagesRequest",
        "asks the SuperLink whether the reply to a message is there",
    ),
    "ask-for-part": Internal(
        "flwr.proto.message_pb2:PullObjectRequest",
        "asks the SuperLink for one part of a reply, by its digest",
    ),
    "confirm-reply": Internal(
        "flwr.proto.message_pb2:ConfirmMessageReceivedRequest",
        "has the SuperLink forget a reply and its parts, taken or refused",
    ),
    "part-head": Internal(
        "flwr.supercore.inflatable.inflatable_object:get_object_head_values_from_object_content",
        "says what a part of a reply is and which parts it is made of, before it is opened",
    ),
    "inflate": Internal(
        "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents",
        "makes the reply of its parts, and raises whatever a client wants it to",
    ),
    "database": Internal(
        "flwr.supercore.sql_mixin:SqlMixin",
        "keeps the SuperLink's database behind SQLAlchemy's pool and waits five seconds for its "
        "lock; a connection that is taken from the pool is told to wait longer, without which a "
        "busy SuperLink answers 500",
    ),
    "memory-grid": Internal(
        "flwr.superlink.grid:InMemoryGrid",
        "is the grid of a simulation, whose clients run in workers of the same machine",
    ),
    "worker-pool": Internal(
        "flwr.simulation.ray_transport.ray_actor:BasicActorPool",
        "holds a simulation's workers; one that died is put back among them and would draw and "
        "fail nearly all messages",
    ),
    "message-to-bytes": Internal(
        "flwr.common.serde:message_to_proto",
        "writes a message for the warm trainer; without it there is none and each message pays "
        "for a new process",
    ),
    "bytes-to-message": Internal(
        "flwr.common.serde:message_from_proto",
        "reads a message in the warm trainer, and its reply",
    ),
    "context-to-bytes": Internal(
        "flwr.common.serde:context_to_proto",
        "writes the context for the warm trainer: node and run config, and the app's state",
    ),
    "bytes-to-context": Internal(
        "flwr.common.serde:context_from_proto",
        "reads the context in the warm trainer, and the state that comes back",
    ),
    "message-on-the-wire": Internal(
        "flwr.proto.message_pb2:Message",
        "is the protobuf of a message, for the warm trainer",
    ),
    "context-on-the-wire": Internal(
        "flwr.proto.message_pb2:Context",
        "is the protobuf of a context, for the warm trainer",
    ),
    "task": Internal(
        "flwr.supercore.task_identity:TaskIdentity",
        "says which task, run and node a process works for; no reply can be made without, so the "
        "warm trainer takes it over from Flower's own process",
    ),
    "error-codes": Internal(
        "flwr.common.constant:ErrorCode",
        "numbers failures on the wire (`FailureCode`): a node that is gone is not one whose app "
        "failed, and a pinned SuperNode's refusal is told as one",
    ),
    "message-id": Internal(
        "flwr.app:Message.metadata.message_id",
        "is set by the grid when it pushes; the simulation's grid leaves refused messages out of "
        "its list, and replies find their message by it",
    ),
    "lifetime": Internal(
        "flwr.app:Message.metadata.ttl",
        "can be set after a message was made, so that SuperLinks drop what no round waits for",
    ),
    "deflate": Internal(
        "flwr.app:ConfigRecord.deflate",
        "gives a small record's bytes on the wire; a simulation counts no traffic itself",
    ),
    "mods": Internal(
        "flwr.clientapp:ClientApp._mods",
        "lists an app's mods; without it an app could answer secure sums with nothing that keeps "
        "its other functions from answering a server",
    ),
    "logger": Internal(
        "flwr.supercore.logger:LOGGER_NAME",
        "names the logger whose lines `flwr log` and a run's terminal show; ours go there too",
    ),
    "no-installs": Internal(
        "flwr.common.constant:FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
        "names the variable that keeps a SuperLink from installing every app's dependencies",
    ),
}


class FailureCode(IntEnum):
    """Flower's error codes that we read or send, by value; they travel."""

    APP_RAISED = 2
    MESSAGE_GONE = 3
    REPLY_GONE = 4
    NODE_GONE = 5
    WRONG_BUNDLE = 7


# The message, its reply or the node itself was lost: Flower's word, not the app's.
LOST = (FailureCode.MESSAGE_GONE, FailureCode.REPLY_GONE, FailureCode.NODE_GONE)


def flower_version() -> str:
    """The version of Flower that runs here; "unknown" where it is no installed package."""
    try:
        return distribution("flwr").version
    except PackageNotFoundError:
        return "unknown"


def check_version(what: str) -> None:
    """Raise `FlowerVersionError` where ``what`` would run on a Flower that it was not made for."""
    version = flower_version()
    if version == "unknown" or not is_supported("flwr", version):
        raise FlowerVersionError(
            f"{what} hooks into Flower and was not made for {version}; run {pip_install('flwr')}"
        )


def internal(name: str) -> Any:
    """The part itself. Raises `FlowerVersionError` where this Flower has none."""
    module, _, path = INTERNALS[name].where.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        _changed(name, error)
    return found


def _changed(name: str, cause: object) -> NoReturn:
    row = INTERNALS[name]
    error = FlowerVersionError(
        f"Flower {flower_version()} has changed {row.where} ({cause}), which {row.why}; run "
        f"{pip_install('flwr')}"
    )
    raise error from (cause if isinstance(cause, BaseException) else None)


def _replace(name: str, by: Any) -> None:
    module, _, attribute = INTERNALS[name].where.partition(":")
    setattr(importlib.import_module(module), attribute, by)


# --- programs, bundles and the SuperNode ---------------------------------------------------


def run_program(name: str, arguments: Sequence[str]) -> None:
    """Run one of Flower's programs in this process, as its console script would."""
    try:
        (script,) = distribution("flwr").entry_points.select(group="console_scripts", name=name)
    except (PackageNotFoundError, ValueError):
        raise FlowerVersionError(
            f"Flower {flower_version()} brings no program {name}; run {pip_install('flwr')}"
        ) from None
    sys.argv = [name, *arguments]
    script.load()()


def app_bundle(app: Path) -> bytes:
    """The bundle (FAB) of the app in a folder. Raises what Flower raises for a faulty app."""
    return bytes(internal("bundle")(app))


def guard_bundles(accept: Callable[[bytes, str, str], bool]) -> None:
    """Have this process's SuperNode ask ``accept`` about each run: its bundle, and the name
    ("publisher/project") and version that the SuperLink gives it, by which Flower looks for the
    app's folder.

    One that is not accepted is answered with Flower's "the FAB could not be verified" and not
    run. Raises `FlowerVersionError` with a Flower whose SuperNode was not looked at.
    """
    check_version("a pinned SuperNode")
    pull, verify = internal("reception"), internal("verification")
    _check_words("reception", pull, ("get_run", "get_fab", "trusted_entities"))
    _check_words("verification", verify, ("fab", "trusted_entities"))
    # Flower asks only for bundles that carry a licence, of nodes that trust someone.
    licence, good = "valid_license", "accepted"

    def verified(fab: Any, trusted_entities: dict[str, str]) -> bool:
        return good in fab.verifications

    def guarded_pull(**words: Any) -> int | None:
        fetch: Callable[[str, int], Any] = words["get_fab"]
        ask: Callable[[int], Any] = words["get_run"]
        runs: dict[int, Any] = {}

        def get_run(run_id: int) -> Any:
            runs[run_id] = ask(run_id)
            return runs[run_id]

        def get_fab(fab_hash: str, run_id: int) -> Any:
            fab, run = fetch(fab_hash, run_id), runs[run_id]
            is_ours = run.primary_task_type != internal("agents").AGENT_APP and accept(
                bytes(fab.content), str(run.fab_id), str(run.fab_version)
            )
            return replace(fab, verifications={licence: "pinned"} | ({good: ""} if is_ours else {}))

        found: int | None = pull(
            **{**words, "get_run": get_run, "get_fab": get_fab, "trusted_entities": {good: good}}
        )
        return found

    _replace("verification", verified)
    _replace("reception", guarded_pull)


def ask_sooner(
    pause_after: Callable[[float], float], receiving: AbstractContextManager[object]
) -> None:
    """Have this process's SuperNode ask for work again ``pause_after(waited)`` seconds after it
    got none, where Flower sleeps for three; each time within ``receiving``, until all is there.

    Raises `FlowerVersionError` with a Flower whose SuperNode was not looked at.
    """
    check_version("a SuperNode that asks sooner")
    pull = internal("reception")

    def asking(**words: Any) -> int:
        began = time.monotonic()
        while True:
            with receiving:
                run = pull(**words)
            if run is not None:
                return int(run)
            time.sleep(pause_after(time.monotonic() - began))

    _replace("reception", asking)


def send_sooner(pause: float) -> None:
    """Have this process's SuperNode see every ``pause`` seconds whether a reply and all its parts
    are there, where Flower looks twice a second, and as often for each part.

    Raises `FlowerVersionError` with a Flower whose SuperNode was not looked at.
    """
    check_version("a SuperNode that sends sooner")
    push = internal("sending")
    _check_words("sending", push, ("state", "object_store"))

    def is_there(store: Any, tree: Any) -> bool:
        return store.get(tree.object_id) != b"" and all(is_there(store, t) for t in tree.children)

    def soon(**words: Any) -> None:
        state, store = words["state"], words["object_store"]
        while not (replies := state.get_messages_legacy(is_reply=True)):
            time.sleep(pause)
        until = time.monotonic() + _LOOK_SECONDS
        trees = [store.get_object_tree(reply.metadata.message_id) for reply in replies]
        while not all(is_there(store, tree) for tree in trees) and time.monotonic() < until:
            time.sleep(pause)
        push(**{**words, "state": _Found(state, replies)})

    _replace("sending", soon)


class _Found:
    """A SuperNode's state that has been asked for its replies, and tells them once more."""

    def __init__(self, state: Any, replies: Sequence[Message]) -> None:
        self._state, self._replies = state, replies

    def get_messages_legacy(self, **_: Any) -> Sequence[Message]:
        return self._replies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def guard_errors(told: Collection[str], otherwise: str) -> None:
    """Have this process's SuperNode say of failures one of the texts ``told``, or ``otherwise``.

    Flower sends exceptions verbatim, also those from before an app's own code runs, such as an
    import's with the paths of this machine. They go into this process's log.
    """
    push, tree_of = internal("sending"), internal("object-tree")
    _check_words("sending", push, ("send", "push_object"))

    def guarded_push(**words: Any) -> None:
        send, push_object = words["send"], words["push_object"]

        def send_guarded(message: Message, tree: Any, seconds: float) -> Any:
            if not message.has_error() or message.error.reason in told:
                return send(message, tree, seconds)
            logging.getLogger("flwr").warning("not told: %s", message.error.reason)
            # The message that was stored stays as it is: Flower removes it by its id.
            other = Message.inflate(message.deflate())
            other.error = Error(message.error.code, otherwise)
            other.metadata.__dict__["_message_id"] = other.object_id
            missing, session = send(other, tree_of(other), seconds)
            for object_id in missing:
                push_object(other.metadata.run_id, session, object_id, other.deflate())
            return set(), session

        push(**{**words, "send": send_guarded})

    _replace("sending", guarded_push)


def _check_words(name: str, function: Any, words: Sequence[str]) -> None:
    known = inspect.signature(function).parameters
    for word in words:
        if word not in known:
            _changed(name, f"it takes no {word}")


# --- requests and the database -------------------------------------------------------------


def change_give_up(grid: Grid, change: Callable[[GiveUp], GiveUp]) -> None:
    """Replace the rule by which a grid's requests are given up; ``change`` gets the one it has.

    A grid without Flower's retries (in memory, simulation) stays as it is.
    """
    invoker = getattr(grid, "_retry_invoker", None)
    rule = getattr(invoker, "should_giveup", None)
    if callable(rule):
        invoker.should_giveup = change(rule)  # type: ignore[union-attr]


def on_database_connection(act: Callable[..., None]) -> None:
    """Have this process call ``act(connection, …)`` when one is taken from SQLAlchemy's pools.

    That is after Flower set its own pragmas, which it does when it connects.
    """
    from sqlalchemy import event
    from sqlalchemy.pool import Pool

    event.listen(Pool, "checkout", act)


# --- a simulation's workers ----------------------------------------------------------------


def is_simulated(grid: Grid) -> bool:
    """Whether a grid is that of a simulation by Flower in this process."""
    # Where its module was not loaded, which takes a second, there is none of it.
    loaded = INTERNALS["memory-grid"].where.partition(":")[0] in sys.modules
    return loaded and isinstance(grid, internal("memory-grid"))


def guard_workers(check: Callable[[], None], died: Callable[[Exception], Exception]) -> None:
    """Have this process's simulation put a new worker in the place of one that died.

    ``check`` is called while a reply is waited for, and may raise; ``died`` makes of Ray's error
    the one that the client is said to have failed with.
    """
    import ray
    from ray.exceptions import RayActorError

    pool_class = internal("worker-pool")
    fetch = pool_class.fetch_result_and_return_actor_to_pool
    if getattr(fetch, "guarded", False):
        return

    def guarded(pool: Any, future: Any) -> Any:
        while not ray.wait([future], timeout=_LOOK_SECONDS, fetch_local=False)[0]:
            check()
        try:
            return fetch(pool, future)
        except RayActorError as error:
            told = died(error)
            # Flower returns to the idle ones whichever is noted here.
            pool._future_to_actor[future] = pool.create_actor_fn()
            raise told from None

    guarded.guarded = True  # type: ignore[attr-defined]
    pool_class.fetch_result_and_return_actor_to_pool = guarded


# --- replies, part by part -----------------------------------------------------------------


@dataclass(frozen=True)
class Announced:
    """A reply that the SuperLink has: what it says of it, and the parts it is made of.

    ``message`` has the SuperLink's word on who sent it, and no content yet. ``parts`` are the
    digests, the root first and each once; ``count`` and ``depth`` are those of the whole tree.
    """

    message: Message
    parts: Sequence[str]
    count: int
    depth: int


def http_client(grid: Grid) -> Any | None:
    """The client that a grid sends its requests with; None for a grid in memory."""
    runtime = getattr(grid, "_runtime_client", None)
    return None if runtime is None else runtime._client


def ask_for_reply(grid: Any, message_id: str) -> Announced | None:
    """The reply to a message as the SuperLink announces it; None while there is none."""
    request = internal("ask-for-reply")(message_ids=[message_id])
    answer = grid._runtime_client.PullMessages(request)
    for message, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
        parts: dict[str, None] = {}
        count = depth = 0
        level = [tree]
        while level:
            count, depth = count + len(level), depth + 1
            parts.update(dict.fromkeys(node.object_id for node in level))
            level = [child for node in level for child in node.children]
        # What it holds is in the parts; an error travels in the message alone.
        message.ClearField("content")
        if not message.HasField("error"):
            message.content.SetInParent()
        return Announced(internal("bytes-to-message")(message), list(parts), count, depth)
    return None


def ask_for_part(grid: Any, digest: str) -> bytes | None:
    """One part of a reply; empty while it is under way, None where the SuperLink has none."""
    request = internal("ask-for-part")(node=grid.node, run_id=grid.run.run_id, object_id=digest)
    answer = grid._runtime_client.PullObject(request)
    if not answer.object_found:
        return None
    return bytes(answer.object_content) if answer.object_available else b""


def confirm_reply(grid: Any, message: Message) -> None:
    """Have the SuperLink forget a reply and its parts."""
    request = internal("confirm-reply")(
        node=grid.node, run_id=grid.run.run_id, message_object_id=message.metadata.message_id
    )
    grid._runtime_client.ConfirmMessageReceived(request)


def head_of(part: bytes) -> tuple[str, list[str], int]:
    """Kind, parts and length of the body of a part; raises what Flower raises for a faulty one."""
    head: tuple[str, list[str], int] = internal("part-head")(part)
    return head


def inflate(root: str, parts: dict[str, bytes]) -> Any:
    """What the parts of a reply make, emptying ``parts``; raises whatever Flower raises."""
    return internal("inflate")(root, parts)


# --- messages ------------------------------------------------------------------------------


def app_mods(app: ClientApp) -> Sequence[Callable[..., Message]]:
    """The mods of an app, the outermost first."""
    try:
        return list(app._mods)
    except AttributeError as error:
        _changed("mods", error)


def message_to_bytes(message: Message) -> bytes:
    """A message, content included, as Flower's protobuf."""
    return bytes(internal("message-to-bytes")(message).SerializeToString())


def message_from_bytes(raw: bytes) -> Message:
    """Read `message_to_bytes` back."""
    message: Message = internal("bytes-to-message")(internal("message-on-the-wire").FromString(raw))
    return message


def context_to_bytes(context: Context) -> bytes:
    """A context, state included, as Flower's protobuf."""
    return bytes(internal("context-to-bytes")(context).SerializeToString())


def context_from_bytes(raw: bytes) -> Context:
    """Read `context_to_bytes` back."""
    context: Context = internal("bytes-to-context")(internal("context-on-the-wire").FromString(raw))
    return context


def current_task() -> int:
    """The id of the task that this process works for."""
    return int(internal("task").task_id)


def set_task(task: int, run: int, node: int) -> None:
    """Say which task, run and node this process works for from now on."""
    identity = internal("task")
    identity.task_id, identity.run_id, identity.node_id = task, run, node


def failure(error: Exception, message: Message) -> Message:
    """The reply for an app that raised, in the words of Flower's own process."""
    reason = f"{type(error)}:<'{error}'>"
    return Message(Error(code=FailureCode.APP_RAISED, reason=reason), reply_to=message)


def pushed_id(message: Message) -> str:
    """The id that the grid gave a message when it pushed it."""
    return message.metadata.message_id


def set_lifetime(message: Message, seconds: float) -> None:
    """Have the SuperLink drop a message that was not answered after so long."""
    message.metadata.ttl = seconds


def record_bytes(record: ConfigRecord | MetricRecord) -> int:
    """How many bytes a record takes on the wire."""
    return len(record.deflate())
