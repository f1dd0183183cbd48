"""Nine parties over TLS in three groups: one lies, and the median of the groups bears it."""

from __future__ import annotations

import importlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dare_agg.flower.processes.launch import run_app
from dare_agg.secure.division import divided

APP = Path(__file__).parents[1] / "apps" / "groups"
NAMES = [f"party-{number}" for number in range(9)]
GROUPS = 3


@pytest.mark.federation
@pytest.mark.slow
def test_the_median_of_groups_bears_a_lying_party(
    federation, consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roster, node_config = consortium(NAMES)
    groups = [[roster[p].name for p in group] for group in divided(roster, GROUPS)]
    liar = groups[1][0]
    fed = federation(
        names=NAMES, app=APP, supernode=("dare-agg", "supernode", "--app", str(APP), "--")
    )
    fed.start_superlink()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fed.register, NAMES))
    for name in NAMES:
        fed.node_config = {
            **node_config(name),
            "secure-groups": GROUPS,
            "secure-colluding": 0.0,
            "lies": name == liar,
        }
        fed.start_node(name)
    lines: list[str] = []
    settings = fed._settings(tmp_path / "out", {"roster": str(tmp_path / "roster.json")})
    status = run_app(APP, fed.home, "dep", settings, on_line=lines.append)
    assert status.ok, (status, lines[-30:])
    (measured,) = json.loads((tmp_path / "out" / "report.json").read_text())
    assert measured["accepted"] == 9 and measured["secure"]["lost_groups"] == {}
    monkeypatch.syspath_prepend(str(APP))
    learning = importlib.import_module("groups.learning")
    step = np.load(tmp_path / "out" / "body.npy") - learning.base()
    touched = step != 0
    assert 0.45 < touched.mean() < 0.55
    # What the two honest groups say, and the spoilt one: the liar's values end at the bound.
    honest = {name: learning.learned(name) for name in NAMES if name != liar}
    lie = np.clip(10_000 * learning.learned(liar), -0.1, 0.1)
    means = [np.mean([honest.get(name, lie) for name in group], axis=0) for group in groups]
    assert np.abs(step - 2 * np.median(means, axis=0))[touched].max() < 1e-4
    # It follows the honest parties, where a mean of the same groups would follow the liar.
    wanted = np.mean(list(honest.values()), axis=0)
    followed, misled = (np.abs(of(means, axis=0) - wanted).mean() for of in (np.median, np.mean))
    assert misled > 5 * followed
