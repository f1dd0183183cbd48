"""Accepted updates as files: read as they were written, and a copy that is not whole is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.rounds.buffer import Buffer, BufferSettings
from dare_agg.rounds.buffered import buffered_plan, is_of_run
from dare_agg.rounds.draws import run_secret
from dare_agg.rounds.kept_updates import KeptUpdate, KeptUpdates
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model

SECRET = run_secret(3)


def updates(count: int) -> list[KeptUpdate]:
    model = global_model({"w": np.ones((30, 20), np.float32)})
    buffer: Buffer[None] = Buffer(BufferSettings(2), SECRET)
    found = []
    for number in range(count):
        ticket = buffer.ask(f"client {number}", parse_drop_rate("0.9"))
        plan = buffered_plan(SECRET, ticket, UpdateTerms(), model.ref, run="bytes:x")
        said = {"weight": 7.5, "metrics": {"metrics": {"loss": 0.1, "losses": [1.0, 2.0]}}}
        dense = None if number % 2 else b"\0dense"
        # As answers come: the last one first.
        found.append(KeptUpdate(ticket, plan, count - number, bytes([number]) * 9, dense, said))
    return found


def test_updates_are_read_as_they_came(tmp_path: Path):
    kept, given = KeptUpdates(tmp_path / "buffer"), updates(4)
    assert kept.numbers() == [] and kept.read(range(9)) == []
    for one in given:
        kept.put(one)
    assert kept.numbers() == [0, 1, 2, 3]
    assert kept.read(range(9)) == given[::-1]
    assert kept.read([2, 77]) == [given[2]]
    kept.drop([0, 1, 77])
    assert kept.numbers() == [2, 3]
    assert all(is_of_run(one.plan, SECRET) for one in given)
    assert not is_of_run(given[0].plan, run_secret(4))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_copy_that_is_not_whole_is_none(tmp_path: Path, damage: str):
    kept, given = KeptUpdates(tmp_path), updates(2)
    for one in given:
        kept.put(one)
    path = tmp_path / "update-00000000.state"
    data = path.read_bytes()
    broken = {
        "cut": data[:-9],
        "flip": data[:60] + bytes([data[60] ^ 1]) + data[61:],
        "empty": b"",
        "other": b"no state",
    }
    path.write_bytes(broken[damage])
    assert kept.read([0, 1]) == [given[1]]
