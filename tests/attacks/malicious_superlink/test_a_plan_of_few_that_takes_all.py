"""A plan says p = .99, and its table of keep rates has the client send every element."""

import numpy as np
import pytest

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.rates import MAX_LEVEL, RateTable
from dare_agg.errors import UpdateError
from dare_agg.rounds.client import update_of_arrays
from dare_agg.rounds.plan import make_plans, plan_from_record
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model


def test_told_rates_beyond_the_drop_rate():
    drawn = np.random.default_rng(3)
    base = {f"w{n}": drawn.normal(size=(80, 60)).astype(np.float32) for n in range(3)}
    tuned = {name: array + np.float32(0.01) for name, array in base.items()}
    model = global_model(base)
    layout = model.groups.layout
    terms = UpdateTerms(drop_rate=parse_drop_rate("0.99"), keep_rates="last")
    (honest,) = make_plans(
        bytes(32), 1, [None], terms, model.ref, layout=layout, levels=bytes([90, 100, 110])
    )
    assert len(update_of_arrays(honest, model, tuned).blob) < 1000
    for levels, threshold in ((MAX_LEVEL, 0), (100, 30 << 15)):
        told = RateTable(bytes([levels]) * 3, threshold).to_bytes()
        greedy = plan_from_record({**honest.to_record(), "told-rates": told})
        with pytest.raises(UpdateError, match="its drop rate allows") as refused:
            update_of_arrays(greedy, model, tuned)
        assert refused.value.reason == "plan"
