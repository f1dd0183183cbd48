"""Clients of different uplinks in one round, through the strategy and the mod."""

from __future__ import annotations

import numpy as np

from dare_agg.codec.budget import UploadBudget
from dare_agg.flower import DareStrategy


def test_a_round_of_different_uplinks(memory_grid, toys):
    """Each client gets terms of its own, keeps to its budget, and the mean stays right."""

    def node_config(partition):
        return {"partition-id": partition, "uplink-kbit-s": (1.0, 4.0, 1000.0)[partition]}

    outcomes = []
    strategy = DareStrategy(
        seed=1, fraction_evaluate=0.0, min_evaluate_nodes=0, round_hook=outcomes.append,
        upload_budget=UploadBudget(seconds=3.0), weighting="equal", drop_rate=0.9,
    )  # fmt: skip
    grid = memory_grid(toys.app(), 3, node_config=node_config)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=1, timeout=30)
    plans = sorted(outcomes[0].plans, key=lambda plan: plan.client)
    assert [plan.terms.values for plan in plans[-1:]] == ["f32"]
    assert plans[0].drop_rate.p > plans[1].drop_rate.p >= plans[2].drop_rate.p == 0
    sent = np.array(outcomes[0].measurements["update_bytes"])
    sent += np.array(outcomes[0].measurements["dense_bytes"])
    assert np.all(sent[:2] <= np.array([375, 1500]))
