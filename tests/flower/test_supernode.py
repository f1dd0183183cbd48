"""A SuperNode that asks and sends soon: Flower's own functions, with other pauses."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as node
from flwr.supernode.nodestate import NodeStateFactory

from dare_agg.flower import internals, supernode
from simulations.runs.memory_grid import stamp


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reception", "sending"):
        place = internals.INTERNALS[name].where.partition(":")[2]
        monkeypatch.setattr(node, place, getattr(node, place))


def test_a_node_asks_soon_and_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [supernode.pause_after(waited) for waited in (0, 0.5, 2, 10, 30, 3600)]
    assert waits == [0.1, 0.1, 0.2, 1.0, 3.0, 3.0]
    slept: list[float] = []
    answers = iter([None, None, 7])
    monkeypatch.setattr(node, "_pull_and_store_message", lambda **words: next(answers))
    monkeypatch.setattr(time, "sleep", slept.append)
    internals.ask_sooner(supernode.pause_after, contextlib.nullcontext())
    assert node._pull_and_store_message(receive=None) == 7
    assert slept == [0.1, 0.1]


def test_it_holds_the_lock_until_the_message_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []

    class Lock(contextlib.AbstractContextManager[None]):
        def __enter__(self) -> None:
            held.append(True)

        def __exit__(self, *_: object) -> None:
            held.append(False)

    def pull(**words: object) -> int:
        assert held[-1]
        return 7

    monkeypatch.setattr(node, "_pull_and_store_message", pull)
    internals.ask_sooner(supernode.pause_after, Lock())
    assert node._pull_and_store_message() == 7 and held == [True, False]


def test_a_reply_is_sent_when_all_of_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message comes before its parts; Flower looks for each twice a second."""
    factory = ObjectStoreFactory()
    state, store = NodeStateFactory(objectstore_factory=factory).state(), factory.store()
    state.set_node_id(7)
    asked = Message(RecordDict(), 7, "train")
    stamp(asked, run_id=3, message_id=asked.object_id)
    reply = Message(RecordDict({"a": ConfigRecord({"x": 1})}), reply_to=asked)
    stamp(reply, message_id=reply.object_id)
    tree = get_object_tree(reply)
    pauses: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: (pauses.append(s), sleep(s)))

    def client() -> None:
        sleep(0.1)
        store.preregister(3, tree)
        state.store_message(reply)
        sleep(0.1)
        for key, part in get_all_nested_objects(reply).items():
            store.put(key, part.deflate())

    sent: dict[str, bytes] = {}
    internals.send_sooner(supernode.REPLY_SECONDS)
    thread = threading.Thread(target=client)
    thread.start()
    node._push_messages(
        state=state,
        object_store=store,
        send=lambda message, tree, seconds: (set(get_all_nested_objects(reply)), "session"),
        push_object=lambda run, session, key, content: sent.update({key: content}),
    )
    thread.join()
    assert set(sent) == set(get_all_nested_objects(reply)) and all(sent.values())
    assert pauses and set(pauses) == {supernode.REPLY_SECONDS}


def test_a_reply_whose_parts_do_not_come_is_left_to_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes later still goes out, and nothing is lost."""
    factory = ObjectStoreFactory()
    state, store = NodeStateFactory(objectstore_factory=factory).state(), factory.store()
    asked = Message(RecordDict(), 7, "train")
    stamp(asked, run_id=3, message_id=asked.object_id)
    reply = Message(RecordDict(), reply_to=asked)
    stamp(reply, message_id=reply.object_id)
    store.preregister(3, get_object_tree(reply))
    state.store_message(reply)
    monkeypatch.setattr(internals, "_LOOK_SECONDS", 0.1)
    sent: list[str] = []
    internals.send_sooner(supernode.REPLY_SECONDS)
    parts = get_all_nested_objects(reply)

    def put_late() -> None:
        for key, part in parts.items():
            store.put(key, part.deflate())

    late = threading.Timer(0.4, put_late)
    late.start()
    node._push_messages(
        state=state,
        object_store=store,
        send=lambda *_: (set(parts), "session"),
        push_object=lambda run, session, key, content: sent.append(key),
    )
    late.join()
    assert set(sent) == set(parts)
