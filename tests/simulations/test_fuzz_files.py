"""A short fuzz of every reader of a file; the long one is a command."""

import pytest

from dare_agg.offline import yaml_text
from simulations.bench.fuzz_files import READERS, Files
from simulations.bench.fuzzing import fuzz


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_give_typed_errors_or_a_sound_read(monkeypatch, reader):
    monkeypatch.setenv("DARE_AGG_CACHE", "")  # set to its own folder, and set back
    figures = fuzz(Files(reader), 150, seed=5)
    assert sum(figures["reasons"].values()) == figures["mutants"] == 150


def test_a_reader_that_lets_anything_through_is_found(monkeypatch):
    monkeypatch.setattr(yaml_text.yaml, "load", lambda text, Loader: {}["x"])
    with pytest.raises(KeyError):
        fuzz(Files("recipe-yaml"), 150, seed=5)
