"""Audit of the privacy of records: canary rows try to be found in the model that a party sends.

``python -m simulations.bench.record_audit`` makes 20 trainings with the noise that ε asks for and
20 with the noise switched off. In each, every canary, a row whose whole gradient is one direction
and as long as it likes, is among the party's rows with probability 1/2. From the model that
is sent (its value along each direction) an attacker guesses which were. The bound of
`simulations.bench.auditing` has to stay below the ε that the party's ledger has charged, and to
exceed the ε that is promised without noise.

Trainings go the whole way: charged to a ledger, drawn, clipped, noised and stepped by the code
of the client.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np

from client.config import configure
from client.devices import Compute
from client.learning import Lesson, Reading
from client.privately import PrivateSteps, learn_privately
from dare_agg.privacy import gradients
from dare_agg.privacy.accountant import noise_for
from dare_agg.privacy.record_ledger import open_ledger
from dare_agg.privacy.records import RecordPrivacy, Sitting, permit
from simulations.bench.auditing import Audit, audit_words, judged, report
from simulations.runs.rows import RESULTS

OUT = RESULTS / "record_audit.jsonl"
DELTA = 1e-5
OTHERS = 60  # rows that are there anyway, along directions of their own
# With rows without a gradient, as good as absent, in place of the canaries that are left out.
ROWS = 400


@lru_cache(maxsize=8)
def _noise(epsilon: float, steps: int, rate: float) -> float:
    return noise_for(epsilon, DELTA, steps, rate)


def audit_records(
    seed: int,
    *,
    noise: bool,
    epsilon: float = 2.0,
    canaries: int = 160,
    steps: int = 8,
    rate: float = 1.0,
) -> Audit:
    """Train once and attack what is sent; without ``noise`` all else is as with it."""
    import torch

    draw = np.random.default_rng([seed, 2])
    inside = draw.random(canaries) < 0.5
    rows = np.zeros((ROWS, canaries + OTHERS), np.float32)
    rows[:OTHERS, canaries:] = draw.normal(size=(OTHERS, OTHERS))
    taking_part = np.flatnonzero(inside)
    rows[np.arange(OTHERS, OTHERS + taking_part.size), taking_part] = 1e3
    features = torch.from_numpy(rows)
    network = torch.nn.Linear(canaries + OTHERS, 1, bias=False)
    torch.nn.init.zeros_(network.weight)

    def read(at: np.ndarray) -> Reading:
        return Reading({"x": features[torch.from_numpy(at)]}, None, len(at))

    lesson = Lesson(
        configure(learning_rate=1e-3, device="cpu"),
        Compute("cpu"),
        network,
        {"weight": network.weight},
        read=read,
        # Its gradient is the row itself, wherever the model stands.
        loss=lambda read: -network(read.batch["x"]).mean(),
    )
    batch = round(rate * ROWS)
    with tempfile.TemporaryDirectory() as folder:
        ledger = open_ledger(Path(folder, "budget"), Path(folder, "marks"), "audit", DELTA, True)
        terms = RecordPrivacy(epsilon, DELTA, noise=_noise(epsilon, steps, batch / ROWS))
        allowed = permit(ledger, terms, Sitting("audit", b"", ROWS, batch, steps, steps))
        charge = allowed.charge
        how = PrivateSteps(charge.steps, batch, charge.rate, terms.clip, charge.noise, allowed.key)
        silent = mock.patch.object(gradients, "gaussian", lambda key, count: np.zeros(count))
        with nullcontext() if noise else silent:
            learn_privately(lesson, np.arange(ROWS), how, lambda at: at)
        spent = allowed.measured()["privacy-epsilon"]
    scores = network.weight.detach().numpy().ravel()[:canaries].astype(np.float64)
    # Where nothing moved, which is first is a matter of chance.
    scores += 1e-12 * draw.random(canaries)
    return judged(scores, inside, spent, DELTA)


def main() -> int:
    """Entry point; exit status 1 where a bound is on the wrong side."""
    parser = audit_words("record_audit", __doc__, OUT)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    return report(audit_records, options, "record", {"steps": options.steps})


if __name__ == "__main__":
    sys.exit(main())
