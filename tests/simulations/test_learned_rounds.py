"""Survivors that learn alone, in rounds: what moves, and in how many bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from simulations.runs import learned_rounds
from simulations.runs.scenario import KINDS

pytestmark = pytest.mark.usefixtures("made_up_digits")
WORDS = {**KINDS["learned-rounds"][1], "rounds": 1, "clients": 4, "steps": 2, "alpha": 100.0}


def run(**words: Any) -> dict[str, Any]:
    return learned_rounds.run_row(SimpleNamespace(settings={**WORDS, **words}, seed=0))


@pytest.mark.parametrize("way", ["learned", "learned, one mask"])
def test_nothing_but_survivors_moves(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[np.ndarray] = []
    real = learned_rounds.resent

    def watched(spec: Any, delta: Any) -> Any:
        kept = learned_rounds.survivors_of(spec)
        assert not delta[kept == 0].any() and delta[kept == 1].any()
        moved.append(kept)
        return real(spec, delta)

    monkeypatch.setattr(learned_rounds, "resent", watched)
    run(way=way, drop_rate="0.9")
    assert len(moved) == 4
    # Each client's own elements, or the same of all.
    assert np.max(np.sum(moved, axis=0)) == (1 if way == "learned" else 4)


def test_all_ways_send_as_many_bytes() -> None:
    sizes = {way: run(way=way)["bytes"] for way in learned_rounds.WAYS}
    assert sizes.pop("fedavg") == 4 * 15_010 and len(set(sizes.values())) == 1


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'learned'"):
        run(way="learnt")
