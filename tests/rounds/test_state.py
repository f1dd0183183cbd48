"""State files: whole or not at all, the last good one kept, clear errors."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.errors import StateError
from dare_agg.files.state_file import read_state, write_state
from dare_agg.rounds.state import RoundState, StateFolder


def a_round(number: int) -> RoundState:
    return RoundState(
        number, {"note": "x"}, {"w": np.arange(50, dtype=np.float32) * number, "n": np.zeros(0)}
    )


def test_a_state_reads_back(tmp_path):
    folder = StateFolder(tmp_path / "deep" / "state")
    assert folder.load() == (None, [])
    for number in (1, 2, 3):
        folder.save(a_round(number))
    assert folder.rounds() == [2, 3]
    state, problems = folder.load()
    assert (state.round, state.facts["note"], problems) == (3, "x", [])
    assert state.arrays["w"].tobytes() == a_round(3).arrays["w"].tobytes()


def test_the_base_is_kept_in_order_and_never_under_finished_rounds(tmp_path):
    folder = StateFolder(tmp_path)
    folder.save_base({"z": np.ones(2, np.float32), "a": np.asarray(4)})
    folder.save_base({"z": np.zeros(2, np.float32), "a": np.asarray(4)})
    base = folder.load_base()
    assert list(base) == ["z", "a"] and base["z"].tolist() == [0, 0]
    folder.save(a_round(1))
    with pytest.raises(StateError, match="holds 1 rounds of an earlier run"):
        folder.save_base({"z": np.ones(2, np.float32)})


def test_one_process_at_a_time_and_a_dead_one_counts_no_more(tmp_path):
    folder = StateFolder(tmp_path / "state")
    code = (
        "import sys, time; from dare_agg.rounds.state import StateFolder\n"
        "StateFolder(sys.argv[1]).claim(); print('mine', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(StateError, match="another run is at work"):
        folder.claim()
    other.kill()
    other.wait()
    other.stdout.close()
    folder.claim()
    folder.claim()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_damaged_newest_state_costs_one_round(tmp_path_factory, data):
    folder = StateFolder(tmp_path_factory.mktemp("state"))
    for number in (1, 2):
        folder.save(a_round(number))
    path = folder.path / "round-00000002.state"
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    state, problems = folder.load()
    assert state.round == 1 and len(problems) == 1


def test_no_whole_state_is_an_error_with_the_path(tmp_path):
    folder = StateFolder(tmp_path)
    folder.save(a_round(1))
    (tmp_path / "round-00000001.state").write_bytes(b"DAREST1\n")
    with pytest.raises(StateError, match="none of the 1 round states"):
        folder.load()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failed_write_keeps_what_was_there(tmp_path, monkeypatch, code):
    path = tmp_path / "x.state"
    write_state(path, {"w": np.ones(3)}, {"n": 1})

    def fail(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StateError, match=r"was not written.*; make room$"):
        write_state(path, {"w": np.zeros(3)}, {"n": 2}, remedy="make room")
    monkeypatch.undo()
    assert read_state(path)[1] == {"n": 1}
    assert os.listdir(tmp_path) == ["x.state"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"last good state is kept.*--resume"):
        StateFolder(tmp_path / "file" / "state").save(a_round(1))


def test_states_are_private(tmp_path):
    write_state(tmp_path / "s", {}, {})
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("facts", [7, [], None, {}, {"round": "2"}, {"round": 3}])
def test_a_whole_file_of_other_facts_costs_one_round_too(tmp_path, facts):
    folder = StateFolder(tmp_path)
    folder.save(a_round(1))
    write_state(tmp_path / "round-00000002.state", {"w": np.ones(3, np.float32)}, facts)
    state, problems = folder.load()
    assert state.round == 1 and len(problems) == 1


@pytest.mark.parametrize("order", [None, 5, "w", ["w", "x"], [["w"]], {"w": 1}])
def test_a_base_that_names_other_arrays_is_refused(tmp_path, order):
    write_state(tmp_path / "base.state", {"w": np.ones(3, np.float32)}, {"order": order})
    with pytest.raises(StateError, match="names"):
        StateFolder(tmp_path).load_base()


@pytest.mark.parametrize("kept", [{}, {"version": 5}, {"version": "zz"}])
def test_a_fact_of_another_kind_is_refused(kept):
    state = RoundState(2, kept, {})
    with pytest.raises(StateError, match="version"):
        state.raw("version")
