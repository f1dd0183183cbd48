"""Version steps, bases and clients' caches of the first layout lead to the same versions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from exact_app import start_arrays, version_round

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.base import BASE, read_base
from dare_agg.downlink.client import VersionReceiver
from dare_agg.downlink.protocol import SharedMask
from dare_agg.downlink.steps import read_steps
from dare_agg.downlink.ways import make_downlink
from dare_agg.files.state_file import read_state
from dare_agg.vectors.model import global_model

DATA = Path(__file__).resolve().parents[1] / "data" / "made-by-0.1"
EXPECTED = json.loads((DATA / "versions" / "expected.json").read_text())
DENSE = ("^head",)


def test_a_base_file_is_the_base(old: Callable[[str], Path]) -> None:
    base = read_base(old("versions") / "base.safetensors")
    assert list(base) == list(start_arrays())
    assert all(base[name].tobytes() == array.tobytes() for name, array in start_arrays().items())
    version = global_model(base, dense=DENSE).ref.version
    assert {found["base"] for found in EXPECTED.values()} == {version}


@pytest.mark.parametrize("form", EXPECTED)
def test_a_server_goes_on_and_a_client_follows(form: str, old: Callable[[str], Path]) -> None:
    folder = old("versions")
    base, versions = EXPECTED[form]["base"], EXPECTED[form]["versions"]
    downlink = make_downlink(form)
    arrays, _ = read_state(folder / f"{form}.state")
    start = global_model(read_base(folder / "base.safetensors"), dense=DENSE)
    model = downlink.restore(start, arrays)
    assert model.ref.version == versions[2]
    assert [step.head.child for step in downlink.steps] == versions[:3]
    assert [step.head.parent for step in downlink.steps] == [base, *versions[:2]]

    # The client's cache has the first version of three.
    client = VersionReceiver(folder / "cache", form, base, dense=DENSE)
    assert client.have() == versions[0]
    sent = downlink.broadcast(model, client.have())
    assert sent.payloads and BASE not in sent.payloads
    reached = client.receive(model.ref.version, sent.payloads, None)
    assert global_model(reached, dense=DENSE).ref == model.ref

    # What the server had left unsent is in the fourth version too.
    step, dense, masks = version_round(form, 4, (model.delta.size, model.dense.size))
    plans = [SharedMask(drop_rate=parse_drop_rate("0.75"), **words) for words in masks]
    moved = downlink.advance(model, step, dense, plans)
    assert moved.ref.version == versions[3]
    newcomer = VersionReceiver(folder / "cache", "newcomer", base, dense=DENSE)
    assert newcomer.have() == base
    payloads = downlink.broadcast(moved, newcomer.have()).payloads
    arrays = newcomer.receive(moved.ref.version, payloads, None)
    assert global_model(arrays, dense=DENSE).ref == moved.ref


@pytest.mark.parametrize("form", EXPECTED)
def test_every_single_step_is_followed(form: str, old: Callable[[str], Path]) -> None:
    folder = old("versions")
    state, _ = read_state(folder / f"{form}.state")
    base, versions = EXPECTED[form]["base"], EXPECTED[form]["versions"]
    client = VersionReceiver(folder / "cache", f"{form} anew", base, dense=DENSE)
    steps = read_steps(state["steps"].tobytes(), state["dense-steps"].tobytes())
    for step, version in zip(steps, versions, strict=False):
        client.receive(version, {"steps": step.body, "dense-steps": step.dense}, None)
        assert client.have() == version
    forms = {"auto": ["dense", "union", "union"]}
    assert [s.head.form for s in steps] == forms.get(form, [form.partition("-")[0]] * 3)
    assert [s.head.round for s in steps] == [1, 2, 3]
