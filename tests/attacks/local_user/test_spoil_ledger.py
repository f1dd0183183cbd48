"""They spoil the ledger, so that what has gone into a sum goes into a second one."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from parties import consortium

from dare_agg.errors import ProtocolError, StateError
from dare_agg.secure.ledger import FileLedger

DELTA = np.ones(10, np.float32)


def ledger_of(folder: Path, sums: int = 2) -> FileLedger:
    """A ledger with some contributions."""
    ledger = FileLedger(folder / "north.ledger")
    for number in range(1, sums + 1):
        ledger.claim(consortium(round_number=number).terms, DELTA * number)
    return ledger


def changed(line: bytes, **fields: object) -> bytes:
    return json.dumps({**json.loads(line), **fields}).encode()


def without(line: bytes, key: str) -> bytes:
    record = json.loads(line)
    del record[key]
    return json.dumps(record).encode()


SPOILT = {
    "garbled": lambda line: line.replace(b'"delta"', b'"delt\x07"'),
    "zeros": lambda line: bytes(len(line)),
    "cut in the middle": lambda line: line[:40],
    "not JSON": lambda line: b"# old",
    "no object": lambda line: b"[]",
    "another field": lambda line: changed(line, more=[]),
    "without claims": lambda line: without(line, "tensors"),
    "claims as text": lambda line: changed(line, delta=json.loads(line)["delta"][0]),
    "another claim": lambda line: changed(line, delta=["ab"]),
    "claim is a number": lambda line: changed(line, round=[1]),
    "no session": lambda line: changed(line, session=None),
    "nested": lambda line: b"[" * 100_000 + b"]" * 100_000,
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_line_that_cannot_be_read_stops_every_sum(tmp_path: Path, how: str) -> None:
    ledger = ledger_of(tmp_path)
    first, second, _ = ledger.path.read_bytes().split(b"\n")
    spoilt = SPOILT[how](first) + b"\n" + second + b"\n"
    ledger.path.write_bytes(spoilt)
    for act in (
        lambda: ledger.claim(consortium(round_number=9).terms, DELTA * 9),
        lambda: ledger.claim(consortium(round_number=1).terms, DELTA),
        ledger.entries,
        lambda: ledger.forget("ab"),
    ):
        with pytest.raises(StateError, match=r"line 1 cannot be read.*nothing is contributed"):
            act()
    assert ledger.path.read_bytes() == spoilt
    # The remedy that the error names.
    ledger.path.write_bytes(first + b"\n" + second + b"\n")
    with pytest.raises(ProtocolError, match="already gone into a secure sum"):
        ledger.claim(consortium(round_number=1).terms, DELTA)


@pytest.mark.parametrize("how", SPOILT)
def test_a_last_line_that_no_crash_can_have_left(tmp_path: Path, how: str) -> None:
    if how == "cut in the middle":
        pytest.skip("that is what a crash leaves")
    ledger = ledger_of(tmp_path)
    first, second, _ = ledger.path.read_bytes().split(b"\n")
    ledger.path.write_bytes(first + b"\n" + SPOILT[how](second))
    with pytest.raises(StateError, match="line 2 cannot be read"):
        ledger.claim(consortium(round_number=9).terms, DELTA * 9)


@pytest.mark.parametrize("spoil", ["alive as a list", "no digest", "cut short"])
def test_a_line_that_says_who_was_alive_counts_as_much(tmp_path: Path, spoil: str) -> None:
    ledger = FileLedger(tmp_path / "north.ledger")
    terms = consortium(5, training=b"t" * 32).terms
    ledger.sign(terms, (1, 2, 3))
    line = ledger.path.read_bytes()
    other = {"alive as a list": [1, 2, 3], "no digest": "ab"}
    bad = changed(line, signed=other[spoil]) if spoil in other else line[:30]
    ledger.path.write_bytes(bad + b"\n")
    with pytest.raises(StateError, match="line 1 cannot be read"):
        ledger.sign(terms, (1, 2, 3, 4))
    # What a crash leaves: no signature has left, so another set may be signed.
    ledger.path.write_bytes(line[:30])
    ledger.sign(terms, (1, 2, 3, 4))
    with pytest.raises(ProtocolError, match="has signed a sum"):
        ledger.sign(terms, (1, 2, 3))


@pytest.mark.parametrize("kept", [1, 5, 12, 40, -2])
def test_a_crash_at_any_byte_of_a_line_costs_that_line_alone(tmp_path: Path, kept: int) -> None:
    ledger = ledger_of(tmp_path)
    first, second, _ = ledger.path.read_bytes().split(b"\n")
    ledger.path.write_bytes(first + b"\n" + second[:kept])
    # No vector of the second left: the same delta may go into a sum, the first may not.
    assert [entry.number for entry in ledger.entries()] == [1]
    with pytest.raises(ProtocolError, match="already gone into"):
        ledger.claim(consortium(round_number=9).terms, DELTA)
    ledger.claim(consortium(round_number=2).terms, DELTA * 2)
    assert [entry.number for entry in ledger.entries()] == [1, 2]
    assert ledger.path.read_bytes().startswith(first + b"\n" + second[:40])


def test_a_line_that_lacks_its_newline_alone_counts(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1])
    with pytest.raises(ProtocolError, match="already gone into"):
        ledger.claim(consortium(round_number=9).terms, DELTA * 2)
    ledger.claim(consortium(round_number=3).terms, DELTA * 3)
    assert [entry.number for entry in ledger.entries()] == [1, 2, 3]


def test_a_link_they_planted_where_the_ledger_will_be(place, tmp_path, nobody) -> None:
    victim = tmp_path / "victim"
    victim.write_text("")
    link = place / "north.ledger"
    link.symlink_to(victim)
    os.chown(link, nobody, nobody, follow_symlinks=False)
    with pytest.raises(StateError, match="belongs to user nobody"):
        ledger_of(place)
    assert victim.read_text() == ""


@pytest.mark.parametrize("mode", [0o644, 0o600])
def test_a_ledger_they_made_before_us(place: Path, nobody: int, mode: int) -> None:
    path = place / "north.ledger"
    path.touch()
    path.chmod(mode)
    os.chown(path, nobody, nobody)
    with pytest.raises(StateError, match="belongs to user nobody"):
        ledger_of(place)
    assert path.read_bytes() == b""


def test_a_ledger_that_others_may_write(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)
    ledger.path.chmod(0o666)
    with pytest.raises(StateError, match="has mode 666"):
        ledger.claim(consortium(round_number=9).terms, DELTA * 9)
    ledger.path.chmod(0o600)
    tmp_path.chmod(0o777)
    with pytest.raises(StateError, match=r"could swap .*north\.ledger; chmod go-w"):
        ledger.entries()


def test_a_pipe_in_place_of_the_ledger(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "north.ledger")
    with pytest.raises(StateError):
        ledger_of(tmp_path)
