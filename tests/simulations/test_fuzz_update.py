"""A short fuzz of the decoder; the long one is a command."""

from simulations.bench.fuzz_update import Updates
from simulations.bench.fuzzing import fuzz


def test_damaged_updates_give_typed_errors_only():
    figures = fuzz(Updates(), 1500, seed=5)
    assert sum(figures["reasons"].values()) == figures["mutants"] == 1500
    assert {"truncated", "malformed", "checksum", "base", "layout"} <= set(figures["reasons"])
