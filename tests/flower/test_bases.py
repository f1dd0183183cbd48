"""Which base a client begins with, and what it is told where it has none."""

from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.downlink.base import BASE_BYTES, BASE_NAME, BASE_VERSION
from dare_agg.errors import BaseMissingError
from dare_agg.flower.bases import find_base
from dare_agg.rounds.messages import Order
from tests.tiny import llama, tensors


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    return llama(tmp_path / "models" / "base")


def order_for(base: Path, **facts: str) -> Order:
    version = model_in(open_checkpoint(base)).ref.version
    told = {BASE_VERSION: version, BASE_NAME: "base", **facts}
    return Order(ask="train", downlink="chain", arrays_key="arrays", by_form=True, facts=told)


def context(**node: str) -> Context:
    return Context(1, 2, node, RecordDict(), {})


def found(order: Order, folder: Path, *offers: object, **node: str) -> str:
    model = find_base(order, context(**node), folder, lambda: offers)
    return "" if model is None else model.ref.version


def test_it_is_found_where_the_node_config_says(base: Path, tmp_path: Path) -> None:
    order = order_for(base)
    for place in (base, base / "model.safetensors"):
        assert found(order, tmp_path, base=str(place)) == order.facts[BASE_VERSION]


def test_it_is_found_in_the_hubs_cache_by_its_name(base: Path, tmp_path: Path) -> None:
    snapshots = tmp_path / "hub" / "models--org--small" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("0123456789ab")
    base.rename(snapshots / "0123456789ab")
    order = order_for(snapshots / "0123456789ab", **{BASE_NAME: "org/small"})
    assert found(order, tmp_path) == order.facts[BASE_VERSION]
    with pytest.raises(BaseMissingError):
        found(order, tmp_path, **{"secure-identity": "x"})


def test_a_name_is_never_a_path(base: Path, tmp_path: Path) -> None:
    for name in (str(base), f"../{base.name}", base.parent.name + "/" + base.name):
        with pytest.raises(BaseMissingError):
            found(order_for(base, **{BASE_NAME: name}), tmp_path)


def test_an_app_offers_a_folder_or_arrays_which_are_kept(base: Path, tmp_path: Path) -> None:
    order = order_for(base)
    assert found(order, tmp_path, str(base)) == order.facts[BASE_VERSION]
    assert not (tmp_path / "bases").exists()
    other = {name: array + 1 for name, array in tensors(base).items()}
    assert found(order, tmp_path, other, tensors(base)) == order.facts[BASE_VERSION]
    assert found(order, tmp_path) == order.facts[BASE_VERSION]  # offered once, kept


def test_another_base_is_passed_over_and_named(base: Path, tmp_path: Path) -> None:
    order, other = order_for(base), llama(tmp_path / "models" / "other", seed=1)
    theirs = model_in(open_checkpoint(other)).ref.version[:12]
    with pytest.raises(BaseMissingError) as told:
        found(order, tmp_path, base=str(other))
    assert f"has {theirs}" in str(told.value)
    assert order.facts[BASE_VERSION][:12] in str(told.value)
    assert "base=FOLDER in --node-config" in str(told.value)
    assert told.value.reason == "base-missing"
    assert found(order, tmp_path, str(base), base=str(other)) == order.facts[BASE_VERSION]


def test_a_name_on_the_hub_is_what_to_download(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseMissingError, match=r"hf download org/small --revision v1"):
        found(order_for(base, **{BASE_NAME: "org/small@v1"}), tmp_path)


def test_where_the_server_sends_it_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    assert found(order_for(base, **{BASE_BYTES: "123"}), tmp_path) == ""


def test_a_file_that_cannot_be_read_is_passed_over(base: Path, tmp_path: Path) -> None:
    order = order_for(base)
    (tmp_path / "cut.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(BaseMissingError, match=r"base=.*cut\.safetensors"):
        found(order, tmp_path, base=str(tmp_path / "cut.safetensors"))
