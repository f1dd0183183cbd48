"""Makes dp_accounting.json, in an environment of its own: pip install dp-accounting==0.6.0.

python tests/data/privacy/make_vectors.py > tests/data/privacy/dp_accounting.json
"""

import itertools
import json

import dp_accounting as dp
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

ADD_OR_REMOVE = dp.NeighboringRelation.ADD_OR_REMOVE_ONE


def gaussian(noise, rate):
    event = dp.GaussianDpEvent(noise)
    return event if rate == 1 else dp.PoissonSampledDpEvent(rate, event)


def main():
    rows = []
    cases = [
        *itertools.product((0.7, 1.0, 2.5), (0.01, 0.1, 0.5, 1.0), (1, 20), (1e-5,)),
        *itertools.product((8.0,), (0.01, 0.1, 0.5, 1.0), (1, 50, 1000), (1e-5,)),
        (1.0, 0.02, 200, 1e-3), (1.0, 0.02, 200, 1e-8), (20.0, 1.0, 10_000, 1e-6),
        (0.4, 1.0, 1, 1e-5), (4.0, 0.05, 10_000, 1e-5),
    ]  # fmt: skip
    for noise, rate, times, delta in cases:
        accountant = PLDAccountant(ADD_OR_REMOVE)
        accountant.compose(gaussian(noise, rate), times)
        epsilon = accountant.get_epsilon(delta)
        if epsilon < 100:
            rows.append({"parts": [[noise, rate, times]], "delta": delta, "epsilon": epsilon})
    for parts, delta in (
        ([[1.0, 0.1, 30], [2.0, 0.3, 20]], 1e-5),
        ([[5.0, 1.0, 10], [0.8, 0.05, 100], [1.5, 0.05, 100]], 1e-6),
    ):
        accountant = PLDAccountant(ADD_OR_REMOVE)
        for noise, rate, times in parts:
            accountant.compose(gaussian(noise, rate), times)
        rows.append({"parts": parts, "delta": delta, "epsilon": accountant.get_epsilon(delta)})
    concentrated = []
    orders = [1 + x / 50 for x in range(1, 1000)] + [*range(21, 400), *range(400, 4000, 20)]
    for rho, delta in itertools.product((0.001, 0.02, 0.5, 3.0), (1e-3, 1e-5)):
        accountant = RdpAccountant(orders)
        accountant.compose(dp.ZCDpEvent(rho))
        epsilon = accountant.get_epsilon(delta)
        concentrated.append({"rho": rho, "delta": delta, "epsilon": epsilon})
    print(json.dumps({"dp-accounting": "0.6.0", "pld": rows, "zcdp": concentrated}, indent=1))


main()
