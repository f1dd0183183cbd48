"""A base that is sent: in pieces, on from where it was, and only the run's own counts."""

import logging
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, RecordDict

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.checkpoint.one_file import OneFile
from dare_agg.downlink.base import BASE, BASE_BYTES, BASE_VERSION
from dare_agg.errors import BaseMissingError
from dare_agg.flower import DareStrategy, base_pieces
from dare_agg.flower.base_pieces import PIECE_BYTES, PIECE_KEY, Piece, take_piece
from dare_agg.flower.records import DOWN_PREFIX, ORDER_KEY
from dare_agg.flower.transport import pack
from dare_agg.rounds.messages import Order


@pytest.fixture(autouse=True)
def base(toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(base_pieces, "PIECE_BYTES", 1000)
    write_checkpoint(tmp_path / "base", toys.arrays())
    return tmp_path / "base"


def started(grid, base: Path, state: Path) -> DareStrategy:
    strategy = DareStrategy(
        base=base,
        state=state,
        send_base=True,
        verify_every=1,
        seed=3,
        min_available_nodes=3,
    )
    strategy.start(grid, num_rounds=2)
    return strategy


def pieces(grid) -> list[int]:
    """The bytes of the base in each message."""
    key = DOWN_PREFIX + BASE
    return [
        sum(len(array.data) for array in message.content[key].values())
        for message in grid.sent
        if key in message.content
    ]


def test_the_file_is_that_which_would_be_written(base: Path, tmp_path: Path) -> None:
    file, written = OneFile(open_checkpoint(base)), (base / "model.safetensors").read_bytes()
    assert file.size == len(written)
    assert file.read(0, file.size) == written
    cuts = [0, 1, 9, 500, 501, 3000, len(written) + 5]
    assert b"".join(map(file.read, cuts, cuts[1:])) == written
    assert PIECE_BYTES == 4 << 20


def test_clients_without_a_base_get_it_once_in_pieces(memory_grid, toys, base, tmp_path):
    def apart(partition):
        return {"partition-id": partition, "cache": str(tmp_path / f"node{partition}")}

    grid = memory_grid(toys.app(), 3, node_config=apart)
    strategy = started(grid, base, tmp_path / "a")
    assert strategy.outcome.measurements["accepted"] == 3
    assert strategy.outcome.measurements["evaluate_failed"] == []
    size = OneFile(open_checkpoint(base)).size
    assert sum(pieces(grid)) == 3 * size
    assert max(pieces(grid)) == 1000
    # They keep it: another run with it sends none.
    grid = memory_grid(toys.app(), 3, node_config=apart)
    assert started(grid, base, tmp_path / "b").outcome.measurements["accepted"] == 3
    assert pieces(grid) == []


def test_clients_of_one_machine_fill_one_file(memory_grid, toys, base, tmp_path):
    grid = memory_grid(toys.app(), 3)
    assert started(grid, base, tmp_path / "a").outcome.measurements["accepted"] == 3
    assert sum(pieces(grid)) <= 3 * OneFile(open_checkpoint(base)).size


def asked(base: Path) -> tuple[Order, OneFile]:
    checkpoint = open_checkpoint(base)
    facts = {
        BASE_VERSION: model_in(checkpoint).ref.version,
        BASE_BYTES: str(OneFile(checkpoint).size),
    }
    order = Order(ask="base", downlink="chain", arrays_key="arrays", by_form=True, facts=facts)
    return order, OneFile(checkpoint)


def give(order: Order, folder: Path, at: int, payload: bytes) -> base_pieces.Taken:
    content = RecordDict(
        {
            ORDER_KEY: ConfigRecord(order.to_record()),
            PIECE_KEY: ConfigRecord(Piece(at=at).to_record()),
        }
    )
    content[DOWN_PREFIX + BASE] = pack(payload)
    return take_piece(content, order, folder)


def test_it_goes_on_where_it_was_cut_off(base: Path, tmp_path: Path) -> None:
    order, file = asked(base)
    assert give(order, tmp_path, 0, file.read(0, 1500)).at == 1500
    assert give(order, tmp_path, 0, file.read(0, 1500)).at == 1500  # twice
    assert give(order, tmp_path, 2000, file.read(2000, 3000)).at == 1500  # one was lost
    assert give(order, tmp_path, 1500, file.read(1500, file.size)).have == order.facts[BASE_VERSION]
    kept = open_checkpoint(tmp_path / "bases" / order.facts[BASE_VERSION])
    assert model_in(kept).ref.version == order.facts[BASE_VERSION]


def test_another_base_is_thrown_away_and_more_than_was_said_not_taken(base, tmp_path) -> None:
    order, file = asked(base)
    assert give(order, tmp_path, 0, bytes(file.size + 1)).at == 0
    altered = bytearray(file.read(0, file.size))
    altered[-1] ^= 1
    with pytest.raises(BaseMissingError, match="it is thrown away"):
        give(order, tmp_path, 0, bytes(altered))
    assert list((tmp_path / "bases").iterdir()) == []
    assert give(order, tmp_path, 0, file.read(0, file.size)).have


def test_who_does_not_take_it_is_left_behind_with_a_warning(
    memory_grid, toys, base, tmp_path, monkeypatch, caplog
):
    def refuse(content, order, folder):
        raise BaseMissingError("no room")

    monkeypatch.setattr("dare_agg.flower.mod.take_piece", refuse)
    caplog.set_level(logging.WARNING, "flwr")
    with pytest.raises(Exception, match="base-missing"):
        started(memory_grid(toys.app(), 3), base, tmp_path / "a")
    assert "does not take the base: no room" in caplog.text
