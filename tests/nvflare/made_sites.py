"""Sites in memory: both halves of a job's rounds, without NVFlare between them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dare_agg.nvflare.payloads import pull
from dare_agg.nvflare.run import Run
from dare_agg.nvflare.turn import Site, begin
from dare_agg.nvflare.words import read_words

LOG = logging.getLogger("dare-agg tests")


def made(clients=3, **words):
    """A run of these words."""
    return Run(read_words({"seed": 7, **words}), clients, LOG)


def toy_arrays(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "encoder.weight": generator.normal(size=(40, 25)).astype(np.float32),
        "encoder.bias": generator.normal(size=25).astype(np.float32),
        "norm.num_batches_tracked": np.asarray(0, np.int64),
        "head.weight": generator.normal(size=(25, 3)).astype(np.float32),
    }


def trained(arrays, number, server_round):
    """What site ``number`` makes of arrays in a round: small, deterministic, its own."""
    found = {}
    for name, array in arrays.items():
        generator = np.random.default_rng([number, server_round, *name.encode()])
        moved = generator.normal(0.002, 0.004, size=array.shape).astype(np.float32)
        found[name] = array + moved if array.dtype.kind == "f" else array
    return found


def turn_of(run, site, folder, ask=None):
    """A site's turn in the open round, its version pulled."""

    def pulled(version, have):
        return pull(ask or (lambda at: run.piece(site, version, have, at)))

    whole = dict(run.model.arrays()) if run.whole else None
    return begin(run.order(site), Site(site, Path(folder) / site), whole, pulled)


def answer(run, site, folder, train, server_round, local=None):
    """Have a site train and its answer judged; returns whether it counts."""
    turn = turn_of(run, site, folder)
    own = {} if local is None else local.setdefault(site, {})
    returned = train(turn.arrays(own), int(site.rsplit("-", 1)[1]), server_round)
    payloads, reply, kept = turn.answer(returned, differences=False)
    own.update(kept)
    return run.take(site, reply, payloads, 10 * int(site.rsplit("-", 1)[1]), {"loss": 0.5})


def rounds(run, folder, *, arrays=None, sites=3, last=2, train=trained, local=None):
    """Run rounds up to ``last`` of all sites; returns what each came to."""
    done = run.begin(toy_arrays() if arrays is None else arrays)
    names = [f"site-{number + 1}" for number in range(sites)]
    found = []
    for number in range(done + 1, last + 1):
        for site in run.open(number, names).plans:
            answer(run, site, folder, train, number, local)
        found.append(run.close())
    return found
