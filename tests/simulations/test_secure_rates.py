"""Secure rounds by keep rates: the same words, and an error that is that of the plain mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from simulations.runs import secure_rates
from simulations.runs.scenario import KINDS

pytestmark = pytest.mark.usefixtures("made_up_digits")
WORDS = {**KINDS["secure-rates"][1], "rounds": 3, "clients": 4, "steps": 2, "alpha": 100.0}


def run(**words: Any) -> dict[str, Any]:
    return secure_rates.run_row(SimpleNamespace(settings={**WORDS, **words}, seed=0))


def test_rates_of_the_last_round_take_no_word_more() -> None:
    uniform, last = run(drop_rate="0.9"), run(drop_rate="0.9", keep_rates="last")
    assert len(set(uniform["words"])) == 1 and last["words"][0] == uniform["words"][0]
    assert all(0.9 * uniform["words"][0] < w <= uniform["words"][0] for w in last["words"])
    # The first round is the same, to the bit; then fewer words tell of what hardly changes.
    assert last["errors"][0] == uniform["errors"][0]
    assert sum(last["errors"][1:]) < sum(uniform["errors"][1:])


def test_without_a_drop_the_step_is_the_mean() -> None:
    assert max(run(drop_rate="0", rounds=1)["errors"]) < 1e-3
