"""Secure rounds whose keep rates follow the last merged change, beside one rate for all tensors.

The whole protocol, message by message, at equal words; every party trains as in
`simulations.runs.learned_rounds`, and counts alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from client.partition import partition
from dare_agg.codec.derive import Keystream, derive_key, seed_secret
from dare_agg.codec.fitted_rates import tensor_squares
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.protocol import SharedMask
from dare_agg.rounds.levels import levels_told
from dare_agg.secure import Identity, make_roster, secure_sum
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.layout import fingerprint
from simulations.runs.learned_rounds import LAST, learner_of, specs_of


def run_row(row: Any) -> dict[str, Any]:
    """Accuracy at the end, and the squared error of each merged step beside the mean of all."""
    settings, seed = row.settings, row.seed
    learner, n = learner_of(settings, seed), settings["clients"]
    layout, state = learner.layout, dict(learner.state)
    parts = partition(
        "dirichlet", learner.labels, learner.groups, n, alpha=settings["alpha"], seed=seed
    )
    stream, drawn = Keystream(derive_key(seed_secret(seed), "secure rates")), 0

    def random(count: int) -> bytes:
        nonlocal drawn
        drawn += count
        return stream.read(drawn - count, count).tobytes()

    identities = [Identity(f"party {i}", random(32)) for i in range(n)]
    roster = make_roster("parties", [(i.name, i.public) for i in identities])
    held = {roster.id_of(one.public): i for i, one in enumerate(identities)}
    secure = SecureSettings(
        settings["method"], drop_rate=settings["drop_rate"], clip=settings["clip"],
        keep_rates=settings["keep_rates"],
    )  # fmt: skip
    levels, words, errors, curve = b"", [], [], []
    for number in range(1, settings["rounds"] + 1):
        before = layout.flatten(state)
        specs = specs_of("fedavg", layout.size, "0", seed, number, n)
        tuned = learner.train(state, parts, number, specs)
        deltas = [layout.flatten(one) - before for one in tuned]
        terms = secure.terms(
            run="secure-rates", round_number=number, roster=roster, cohort=list(held),
            base=fingerprint(layout, before), layout=layout.fingerprint, size=layout.size,
            model=layout, levels=levels,
        )  # fmt: skip
        found = secure_sum(
            terms, roster, {party: identities[i] for party, i in held.items()},
            lambda party, mask, own=deltas: mask.gather(own[held[party]]), random=random,
        )  # fmt: skip
        step = found.merged()[0]
        drop_rate = parse_drop_rate(settings["drop_rate"])
        mask = SharedMask(number, drop_rate, found.mask.key, rates=found.mask.rates)
        levels = levels_told(layout.sizes, tensor_squares(layout.sizes, step), [mask])
        whole = np.mean(deltas, axis=0, dtype=np.float64)
        errors.append(round(float(np.square(step - whole).sum() / np.square(whole).sum()), 4))
        words.append(terms.words)
        heads = {
            name: np.mean([one[name] for one in tuned], axis=0, dtype=np.float32)
            for name in state
            if name not in layout
        }
        state = {**layout.unflatten(before + step), **heads}
        if number > settings["rounds"] - LAST:
            curve.append(round(learner.accuracy(state), 4))
    return {
        "method": settings["method"],
        "drop_rate": settings["drop_rate"],
        "keep_rates": settings["keep_rates"],
        "accuracy": round(float(np.mean(curve)), 4),
        "curve": curve,
        "errors": errors,
        "words": words,
        "parameters": layout.size,
    }
