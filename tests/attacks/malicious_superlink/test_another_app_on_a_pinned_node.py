"""The SuperLink has a pinned SuperNode run another app than the party's own, or choke on one."""

import hashlib
import io
import os
import struct
import zipfile
from pathlib import Path

import pytest
from flwr.app import Error, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.nodestate import NodeStateFactory

from dare_agg.flower.internals import FailureCode, app_bundle, guard_errors
from dare_agg.flower.processes import pinned_node
from simulations.runs.memory_grid import stamp

APP = Path(__file__).parents[2] / "apps" / "secure"


@pytest.fixture
def node(monkeypatch):
    """Answers a message of a run as Flower's SuperNode does; the error's code, None for none."""
    for name in ("_verify_fab", "_pull_and_store_message"):
        monkeypatch.setattr(supernode, name, getattr(supernode, name))
    ours = pinned_node.own_bundle(APP)
    pinned_node.pin(ours)
    factory = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=factory).state()
    state.set_node_id(7)

    def ask(bundle, **words):
        run = Run.create_empty(len(words) + 1)
        run.fab_id, run.fab_version = ours.name, ours.version
        run.fab_hash = hashlib.sha256(bundle).hexdigest()
        for name, value in words.items():
            setattr(run, name, value)
        message = Message(RecordDict(), 7, "query.secure")
        stamp(message, run_id=run.run_id, message_id=message.object_id)
        content = {message.object_id: message.deflate()}
        content |= {k: v.deflate() for k, v in get_all_nested_objects(message).items()}
        supernode._pull_and_store_message(
            state=state, object_store=factory.store(), node_config={},
            receive=lambda: (message, get_object_tree(message)), get_run=lambda _: run,
            get_fab=lambda fab_hash, _: Fab(
                fab_hash, bundle, {"valid_license": "x", "accepted": "x"}
            ),
            pull_object=lambda _, key: content[key],
            confirm_message_received=lambda *_: None, trusted_entities=None,
        )  # fmt: skip
        answers = state.get_messages_legacy(is_reply=True)
        return answers[0].error.code if answers else None

    return ask, ours


def test_our_own_is_run(node):
    ask, _ = node
    assert ask(app_bundle(APP)) is None


@pytest.mark.parametrize(
    "words",
    [
        {"fab_version": "0.0.1"},
        {"fab_id": "other/app"},
        # No folder of apps is left by these, and a name that others made is found: /tmp/evil.….
        {"fab_id": "/", "fab_version": "/../../../tmp/evil"},
        {"primary_task_type": "flwr-agentapp"},
    ],
)
def test_our_files_under_a_name_that_leads_elsewhere(node, words):
    """Flower runs what lies in the folder of that name, not what it was sent."""
    ask, _ = node
    assert ask(app_bundle(APP), **words) == FailureCode.WRONG_BUNDLE


def test_what_lay_there_before_is_not_run(monkeypatch):
    """Of eight digits of its digest a bundle of our files can be made to have any."""
    seen = []

    def program(words):
        home = os.environ["FLWR_HOME"]
        seen.append((home, os.listdir(home)))

    monkeypatch.setenv("FLWR_HOME", "/home/of/everybody")
    monkeypatch.setattr(pinned_node, "guard_bundles", lambda accept: None)
    monkeypatch.setattr(pinned_node, "guard_errors", lambda told, otherwise: None)
    monkeypatch.setattr(pinned_node, "run_supernode", program)
    pinned_node.run_pinned(APP, [])
    ((home, held),) = seen
    assert home != "/home/of/everybody" and held == []


def bundle_with(**changed):
    with zipfile.ZipFile(io.BytesIO(app_bundle(APP))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()} | changed
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_bundle_that_unpacks_to_all_memory(node, monkeypatch):
    ask, _ = node
    most, read = [0], zipfile.ZipFile.read

    def counted(self, name, pwd=None):
        found = read(self, name, pwd)
        most[0] = max(most[0], len(found))
        return found

    bomb = bundle_with(**{"pyproject.toml": bytes(1 << 26), "bomb": bytes(1 << 26)})
    monkeypatch.setattr(zipfile.ZipFile, "read", counted)
    assert ask(bomb) == FailureCode.WRONG_BUNDLE
    assert most[0] < 1 << 20


def test_bundles_broken_in_ways_that_would_end_the_node(node):
    good = bundle_with()
    at = good.index(b"PK\x01\x02") + 8
    encrypted = good[:at] + struct.pack("<H", 1) + good[at + 2 :]
    data = bytearray(good)
    data[60:64] = b"\xff\xff\xff\xff"
    for broken in (encrypted, bytes(data), b"", b"PK\x05\x06" + bytes(18)):
        assert pinned_node.differences(broken, node[1])


def test_exceptions_from_before_the_apps_own_code(monkeypatch):
    """Flower's process sends what an import or an install raised, with paths."""
    monkeypatch.setattr(supernode, "_push_messages", supernode._push_messages)
    guard_errors(("this may be told",), "another text")
    factory = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=factory).state()
    sent = {}
    for number, reason in enumerate(
        ("<class 'ImportError'>:<'cannot import x (/home/alice/x.py)'>", "this may be told"), 1
    ):
        asked = Message(RecordDict(), 7, "train")
        stamp(asked, run_id=number, message_id=asked.object_id)
        supernode._insert_message(Message(Error(2, reason), reply_to=asked), state, factory.store())
    wire = []

    def send(message, tree, seconds):
        wire.append(message.error.reason)
        assert tree.object_id == message.object_id == message.metadata.message_id
        return {tree.object_id}, "session"

    supernode._push_messages(
        state=state, object_store=factory.store(), send=send,
        push_object=lambda run, session, key, content: sent.update({key: content}),
    )  # fmt: skip
    said = {Message.inflate(content).error.reason for content in sent.values()}
    assert said == set(wire) == {"another text", "this may be told"}
    assert not state.get_messages_legacy(is_reply=True)
