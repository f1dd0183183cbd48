"""Each part of Flower that is not public and that we lean on, held against the Flower here.

A failure says which part changed and what it is to us, in the words of `INTERNALS`.
"""

from __future__ import annotations

import ast
import importlib
import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.sql_mixin import SqlMixin
from flwr.superlink.grid import HttpGrid, InMemoryGrid
from made_superlink import Reply, SuperLink
from toy import toy_app

from dare_agg.errors import FlowerVersionError, UpdateError
from dare_agg.flower import internals, mod, warm
from dare_agg.flower.bounded import at_most
from dare_agg.flower.internals import INTERNALS, FailureCode, internal
from dare_agg.flower.processes.launch import flower_environment
from dare_agg.flower.superlink import LOCK_SECONDS, wait_longer

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "dare_agg" / "flower" / "internals.py"


def example(**more: Any) -> Message:
    arrays = ArrayRecord({"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3))})
    content = {"arrays": arrays, "config": ConfigRecord({"rate": 0.5, "names": ["a", "b"]})}
    return Message(RecordDict({**content, **more}), 7, "train")


# --- a check of each row: the part is there and does what we use it for --------------------


def bundle() -> None:
    made = internals.app_bundle(ROOT / "tests" / "apps" / "secure")
    assert {"pyproject.toml", "private/client_app.py"} <= set(
        zipfile.ZipFile(io.BytesIO(made)).namelist()
    )


def reception() -> None:
    pull = internal("reception")
    internals._check_words("reception", pull, ("get_fab", "trusted_entities"))
    # It asks by the name that is replaced, and is itself called by the name that is.
    assert "_verify_fab" in pull.__code__.co_names
    supernode = importlib.import_module("flwr.supernode.start_client_internal")
    assert "_pull_and_store_message" in supernode.start_client_internal.__code__.co_names


def verification() -> None:
    internals._check_words("verification", internal("verification"), ("fab", "trusted_entities"))
    assert {"content", "verifications"} <= {field.name for field in fields(Fab)}


def agents() -> None:
    assert Run.create_empty(1).primary_task_type != internal("agents").AGENT_APP
    assert {"fab_id", "fab_version"} <= {field.name for field in fields(Run)}


def sending() -> None:
    internals._check_words("sending", internal("sending"), ("send", "push_object"))
    said = Message(Error(2, "No module named x (/home/a)"), reply_to=example())
    assert Message.inflate(said.deflate()).error.reason == said.error.reason
    assert internal("object-tree")(said).object_id == said.object_id


def http_grid() -> HttpGrid:
    grid = HttpGrid("127.0.0.1:1", insecure=True, token="x")
    grid.set_run(Run.create_empty(1))
    return grid


def give_up() -> None:
    grid, asked = http_grid(), []

    def never(flower: Callable[[Exception], bool]) -> Callable[[Exception], bool]:
        assert flower(httpx.ConnectError("no route")) is False
        return lambda error: not asked.append(error)  # type: ignore[func-returns-value]

    def fails() -> None:
        raise httpx.ConnectError("no route")

    internals.change_give_up(grid, never)
    with pytest.raises(httpx.ConnectError):
        grid._retry_invoker.invoke(fails)
    assert len(asked) == 1


def replies() -> None:
    """A reply of a real client of Flower's, part by part, and its measure taken on the way."""
    link = SuperLink(toy_app(), 1)
    with link.serve() as grid:
        sent = Message(RecordDict({"config": ConfigRecord({"server-round": 1})}), 7, "query.x")
        sent.metadata.dst_node_id = next(iter(link.nodes.partitions))
        (message_id,) = grid.push_messages([sent])
        announced = internals.ask_for_reply(grid, message_id)
        assert announced is not None and announced.message.error.code == FailureCode.APP_RAISED
        client = internals.http_client(grid)
        assert isinstance(client, httpx.Client)
        link.attack = lambda client, asked, reply: a_reply(reply)
        announced = internals.ask_for_reply(grid, message_id)
        assert announced is not None and announced.message.has_content()
        assert announced.message.metadata.src_node_id == sent.metadata.dst_node_id
        assert (announced.count, announced.depth) == (5, 5)
        root, *rest = announced.parts
        assert root == announced.message.metadata.message_id
        parts = {digest: internals.ask_for_part(grid, digest) or b"" for digest in announced.parts}
        kinds = [internals.head_of(parts[digest])[0] for digest in announced.parts]
        assert kinds == ["Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk"]
        assert internals.head_of(parts[root])[1] == rest[:1]
        assert internals.ask_for_part(grid, "0" * 64) is None
        with at_most(client, 40), pytest.raises(UpdateError, match="in one of its parts"):
            internals.ask_for_part(grid, rest[-1])
        made = internals.inflate(root, parts)
        assert made.content["arrays"]["w"].numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
        internals.confirm_reply(grid, announced.message)
        assert link.confirmed == [root]


def a_reply(reply: Reply) -> Reply:
    """In place of the failure, the message of `example`."""
    content = RecordDict({"arrays": example().content["arrays"]})
    message = Message(content, 7, "train")
    reply.message.ClearField("error")
    reply.message.content.SetInParent()
    tree = get_object_tree(message)
    reply.message.metadata.message_id = tree.object_id
    parts = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    return Reply(reply.message, tree, dict(parts))


def database(tmp_path: Path) -> None:
    from sqlalchemy import event, text
    from sqlalchemy.pool import Pool

    def patience() -> int:
        state = SqlMixin(f"sqlite:///{tmp_path}/state.db")
        state.initialize()
        with state._engine.connect() as connection:
            return int(connection.execute(text("PRAGMA busy_timeout")).scalar_one())

    assert patience() == 5000  # when it is more, dare_agg.flower.superlink may go
    internals.on_database_connection(wait_longer)
    try:
        assert patience() == 1000 * LOCK_SECONDS
    finally:
        event.remove(Pool, "checkout", wait_longer)


def messages_travel() -> None:
    sent = example()
    got = internals.message_from_bytes(internals.message_to_bytes(sent))
    assert got.content["arrays"]["w"].numpy().tobytes() == np.arange(6, dtype="f4").tobytes()
    assert dict(got.content["config"]) == dict(sent.content["config"])
    assert vars(got.metadata) == vars(sent.metadata)
    failed = internals.failure(ValueError("no such luck"), sent)
    got = internals.message_from_bytes(internals.message_to_bytes(failed))
    assert got.error.code == 2 and got.error.reason == "<class 'ValueError'>:<'no such luck'>"


def contexts_travel() -> None:
    state = RecordDict({"seen": MetricRecord({"count": 3})})
    sent = Context(7, 11, {"client-name": "a"}, state, {"rate": 0.5})
    got = internals.context_from_bytes(internals.context_to_bytes(sent))
    assert (got.run_id, got.node_id, got.node_config) == (7, 11, {"client-name": "a"})
    assert got.run_config == {"rate": 0.5} and got.state["seen"]["count"] == 3


def task() -> None:
    internals.set_task(5, 6, 7)
    try:
        assert internals.current_task() == 5
        reply = Message(RecordDict(), reply_to=example())
        assert (reply.metadata.run_id, reply.metadata.src_node_id) == (6, 7)
    finally:
        internals.set_task(1, 1, 1)


def error_codes() -> None:
    theirs = internal("error-codes")
    assert theirs.CLIENT_APP_RAISED_EXCEPTION == FailureCode.APP_RAISED
    assert theirs.MESSAGE_UNAVAILABLE == FailureCode.MESSAGE_GONE
    assert theirs.REPLY_MESSAGE_UNAVAILABLE == FailureCode.REPLY_GONE
    assert theirs.NODE_UNAVAILABLE == FailureCode.NODE_GONE
    assert theirs.INVALID_FAB == FailureCode.WRONG_BUNDLE


def message_id() -> None:
    refused = iter((False, True))

    def store(message: Message) -> str | None:
        return None if next(refused) else message.metadata.message_id

    def pushed(grid: Any) -> tuple[list[str], list[Message]]:
        messages = [example(), example(more=ConfigRecord({"n": 2}))]
        for message in messages:
            message.metadata.__dict__["_delivered_at"] = ""
        return list(grid.push_messages(messages)), messages

    state = SimpleNamespace(store_message_ins=store)
    ids, messages = pushed(InMemoryGrid(SimpleNamespace(state=lambda: state)))
    assert ids == [internals.pushed_id(messages[0])] and internals.pushed_id(messages[1])

    grid = http_grid()
    grid._try_push_messages = lambda run, messages: [m.metadata.message_id for m in messages]
    ids, messages = pushed(grid)
    assert ids == [internals.pushed_id(message) for message in messages] and all(ids)


def memory_grid() -> None:
    assert internals.is_simulated(InMemoryGrid(SimpleNamespace(state=lambda: None)))
    assert not internals.is_simulated(http_grid())


def worker_pool() -> None:
    pytest.importorskip("ray")
    pool = internal("worker-pool")
    backend = importlib.import_module("flwr.server.superlink.fleet.vce.backend.raybackend")
    # It asks the pool for the result, and where that fails puts back whichever worker is noted.
    called = backend.RayBackend.process_message.__code__.co_names
    assert {"fetch_result_and_return_actor_to_pool", "add_actor_back_to_pool"} <= set(called)
    assert "_future_to_actor" in pool.add_actor_back_to_pool.__code__.co_names
    assert "create_actor_fn" in pool.__init__.__code__.co_names


def mods() -> None:
    app = ClientApp(mods=[mod.dare_mod])
    assert internals.app_mods(app) == [mod.dare_mod]


def lifetime() -> None:
    message = example()
    assert message.metadata.ttl > 3600
    internals.set_lifetime(message, 60.5)
    assert message.metadata.ttl == 60.5


def deflate() -> None:
    config = ConfigRecord({"text": "", "raw": bytes(100), "many": [1, 2, 3]})
    metrics = MetricRecord({"loss": 0.5})
    for record in (config, metrics):
        assert type(record).inflate(record.deflate()) == record
    assert 100 < internals.record_bytes(config) < 200


def logger() -> None:
    ours = importlib.import_module("dare_agg.flower.reception").LOG
    assert internal("logger") == warm.LOG.name == ours.name
    assert logging.getLogger(internal("logger")).handlers


def no_installs(tmp_path: Path) -> None:
    assert flower_environment(tmp_path)[internal("no-installs")] == "1"


CHECKS: dict[str, Callable[..., None]] = {
    "bundle": bundle,
    "reception": reception,
    "verification": verification,
    "agents": agents,
    "sending": sending,
    "object-tree": sending,
    "give-up": give_up,
    "runtime-client": replies,
    "http-client": replies,
    "ask-for-reply": replies,
    "ask-for-part": replies,
    "confirm-reply": replies,
    "part-head": replies,
    "inflate": replies,
    "database": database,
    "memory-grid": memory_grid,
    "worker-pool": worker_pool,
    "message-to-bytes": messages_travel,
    "bytes-to-message": messages_travel,
    "context-to-bytes": contexts_travel,
    "bytes-to-context": contexts_travel,
    "message-on-the-wire": messages_travel,
    "context-on-the-wire": contexts_travel,
    "task": task,
    "error-codes": error_codes,
    "message-id": message_id,
    "lifetime": lifetime,
    "deflate": deflate,
    "mods": mods,
    "logger": logger,
    "no-installs": no_installs,
}
# Parts of an object, which only an object has.
OF_OBJECTS = {"give-up", "http-client", "message-id", "lifetime", "mods"}


@pytest.mark.parametrize("name", INTERNALS)
def test_this_flower_has_it(name: str, tmp_path: Path) -> None:
    row = INTERNALS[name]
    check = CHECKS[name]
    try:
        if name not in OF_OBJECTS:
            internal(name)
        check(*([tmp_path] if check.__code__.co_argcount else []))
    except Exception as error:
        version = internals.flower_version()
        pytest.fail(f"Flower {version} has changed {row.where}, which {row.why} ({error!r})")


def test_every_row_has_its_check() -> None:
    assert list(CHECKS) == list(INTERNALS)


@pytest.mark.parametrize("name", ["flower-superlink", "flower-supernode"])
def test_a_program_is_run_as_its_script_would(name: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["pytest"])
    with pytest.raises(SystemExit) as ended:
        internals.run_program(name, ["--help"])
    assert ended.value.code == 0 and f"usage: {name}" in capsys.readouterr().out


def test_a_part_that_is_gone_is_named_with_the_remedy(monkeypatch: Any) -> None:
    module, _, attribute = INTERNALS["bytes-to-message"].where.partition(":")
    monkeypatch.delattr(importlib.import_module(module), attribute)
    with pytest.raises(FlowerVersionError) as raised:
        internals.message_from_bytes(b"")
    text = str(raised.value)
    assert f"{module}:{attribute}" in text and internals.flower_version() in text
    assert "pip install 'flwr>=" in text and INTERNALS["bytes-to-message"].why in text
    with pytest.raises(FlowerVersionError, match="brings no program flower-toaster; run pip"):
        internals.run_program("flower-toaster", [])


# --- and it stands in one module -----------------------------------------------------------

PUBLIC = (
    "flwr.app",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
    "flwr.clientapp",
    "flwr.clientapp.mod",
)
# What tests and simulations reach into Flower for themselves, and why.
ELSEWHERE = {
    "flwr.common.config:unflatten_dict": "a run config is nested as an app's own code nests it",
    "flwr.supercore.inflatable": "a grid in memory writes and reads messages as the transport does",
    "flwr.simulation:run_simulation": "an app is run as in Flower's own documents",
    "flwr.superlink.grid": "Flower's real client is under test",
    "flwr.proto": "a made-up SuperLink answers Flower's real client",
    "flwr.supercore.run": "a run for Flower's real client and SuperNode",
    "flwr.supernode": "Flower's real SuperNode is under test",
    "flwr.supercore.fab": "a bundle for Flower's real SuperNode",
    "flwr.supercore.object_store": "what Flower's real SuperNode keeps messages in",
    "flwr.supercore.sql_mixin": "the SuperLink's database is under test",
    "flwr.supercore.constant": "the SuperLink's database is under test",
    "flwr.common.secure_aggregation": "SecAgg+ is what secure sums are measured against",
    "flwr.client.mod:": "apps of older releases import Flower's mods there",
    "flwr.client.mod.secure_aggregation": "SecAgg+ is what secure sums are measured against",
    "flwr.supercore.primitives.asymmetric": "SecAgg+ is what secure sums are measured against",
    "flwr.common:ndarrays_to_parameters": "SecAgg+ is what secure sums are measured against",
    "flwr.serverapp.strategy.strategy_utils": "FedAvg's own sum is measured beside ours",
    "flwr.common.typing": "Flower's examples of older releases import it",
    "flwr.app:user_config": "Flower's examples of older releases import it elsewhere",
    "flwr.clientapp:typing": "Flower's examples of older releases import it elsewhere",
    "flwr.serverapp.strategy.fedopt": "Flower's own server steps are held against ours",
}
# Attributes by which one reaches into Flower's objects.
HIDDEN = {
    "_retry_invoker", "should_giveup", "_runtime_client", "_client", "deflate", "_verify_fab",
    "_pull_and_store_message",
}  # fmt: skip


def private_parts(path: Path) -> Iterator[str]:
    """Each import of Flower that is not public, as "module:name", and each hidden attribute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            module = importlib.import_module(node.module or "")
            public = getattr(module, "__all__", ()) if node.module in PUBLIC else ()
            yield from (f"{node.module}:{a.name}" for a in node.names if a.name not in public)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("flwr."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"flwr(\.\w+)+(:[\w.]+)?", node.value):
                yield node.value
        elif isinstance(node, ast.Attribute):
            of_metadata = isinstance(node.value, ast.Attribute) and node.value.attr == "metadata"
            set_by_us = of_metadata and isinstance(node.ctx, ast.Store)
            if node.attr in HIDDEN or (of_metadata and node.attr == "__dict__") or set_by_us:
                yield ast.unparse(node)


def found(*rooms: str) -> dict[str, list[str]]:
    paths = sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))
    assert paths
    parts = {str(path.relative_to(ROOT)): list(private_parts(path)) for path in paths}
    return {name: hits for name, hits in parts.items() if hits}


def test_one_module_of_the_product_reaches_into_flower() -> None:
    assert set(found("dare_agg", "server", "client")) == {str(OURS.relative_to(ROOT))}


def test_apps_of_users_need_nothing_private() -> None:
    assert not found("tests/apps")


def test_tests_and_simulations_say_what_they_reach_for() -> None:
    hits = found("tests", "simulations")
    del hits[str(Path(__file__).resolve().relative_to(ROOT))]
    taken = [(name, part) for name, parts in hits.items() for part in parts]
    for name, part in taken:
        if part.startswith("flwr."):
            why = next((why for row, why in ELSEWHERE.items() if part.startswith(row)), "")
            assert why, f"{name} takes {part}: go through {OURS.name}, or say why in ELSEWHERE"
            assert exists(part), f"Flower has changed {part}, for {name}: {why}"


def exists(part: str) -> bool:
    module, _, attribute = part.partition(":")
    try:
        if attribute and hasattr(importlib.import_module(module), attribute):
            return True
        importlib.import_module(part.replace(":", "."))
    except ImportError:
        return False
    return True
