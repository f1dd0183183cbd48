"""A SuperNode takes the party's own app and no other: Flower's own reception, in memory."""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.nodestate import NodeStateFactory

from dare_agg.errors import ConfigError, FlowerVersionError
from dare_agg.flower import internals
from dare_agg.flower.internals import FailureCode, app_bundle
from dare_agg.flower.processes import pinned_node
from simulations.runs.memory_grid import stamp

APP = Path(__file__).parents[1] / "apps" / "secure"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return Path(shutil.copytree(APP, tmp_path / "own"))


def test_a_bundle_is_compared_file_by_file(own: Path, tmp_path: Path) -> None:
    ours = pinned_node.own_bundle(own)
    good = app_bundle(APP)
    assert pinned_node.differences(good, ours) == ""
    code = own / "private" / "client_app.py"
    code.write_text(code.read_text() + "\nprint(open('north.key').read())\n")
    assert "private/client_app.py" in pinned_node.differences(app_bundle(own), ours)
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}

    def zipped(*pairs: tuple[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in pairs:
                archive.writestr(name, content)
        return buffer.getvalue()

    assert pinned_node.differences(zipped(*files.items()), ours) == ""  # packed otherwise
    more = zipped(*files.items(), ("sitecustomize.py", b"import os"))
    assert "sitecustomize.py" in pinned_node.differences(more, ours)
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = zipped(*files.items(), ("private/client_app.py", b"import os"))
    assert "twice" in pinned_node.differences(twice, ours)
    assert "cannot be read" in pinned_node.differences(b"PK", ours)
    assert pinned_node.differences(zipped(*list(files.items())[1:]), ours)
    with pytest.raises(ConfigError, match="no Flower app bundle"):
        pinned_node.own_bundle(tmp_path)


def test_a_run_of_another_app_gets_an_error_and_runs_nothing(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_verify_fab", "_pull_and_store_message"):
        monkeypatch.setattr(supernode, name, getattr(supernode, name))
    ours = pinned_node.own_bundle(own)
    pinned_node.pin(ours)
    code = own / "private" / "client_app.py"
    code.write_text(code.read_text() + "\nprint(open('north.key').read())\n")
    good, bad = app_bundle(APP), app_bundle(own)
    factory = ObjectStoreFactory()
    state = NodeStateFactory(objectstore_factory=factory).state()
    state.set_node_id(7)
    confirmed = []

    def receive(run_id: int, bundle: bytes) -> int | None:
        message = Message(RecordDict(), 7, "query.secure")
        stamp(message, run_id=run_id, message_id=message.object_id)
        content = {message.object_id: message.deflate()}
        for key, value in get_all_nested_objects(message).items():
            content[key] = value.deflate()
        run = Run.create_empty(run_id)
        run.fab_id, run.fab_version = ours.name, ours.version
        run.fab_hash = hashlib.sha256(bundle).hexdigest()
        return supernode._pull_and_store_message(
            state=state,
            object_store=factory.store(),
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=lambda _: run,
            get_fab=lambda fab_hash, _: Fab(fab_hash, bundle, {}),
            pull_object=lambda _, key: content[key],
            confirm_message_received=lambda *_: confirmed.append(run_id),
            trusted_entities=None,
        )

    assert receive(1, bad) == 1
    (answer,) = state.get_messages_legacy(is_reply=True)
    assert answer.error.code == FailureCode.WRONG_BUNDLE and state.get_run(1) is None
    assert confirmed == []
    assert receive(2, good) == 2
    assert confirmed == [2] and state.get_run(2) is not None
    assert receive(1, bad) == 1 and state.get_run(1) is None


def test_flower_that_has_changed_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(supernode, "_verify_fab")
    with pytest.raises(FlowerVersionError, match=r"_verify_fab .*run pip install 'flwr>=1\.41,<"):
        pinned_node.pin(pinned_node.OwnApp("", "", {}))


def test_a_version_that_was_not_looked_at_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "flower_version", lambda: "1.99.0")
    with pytest.raises(FlowerVersionError, match=r"made for 1\.99\.0; run pip install"):
        pinned_node.pin(pinned_node.OwnApp("", "", {}))
    assert supernode._verify_fab.__module__ == supernode.__name__
