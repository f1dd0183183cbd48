"""Time and bytes of a secure sum, beside Flower's SecAgg+ on the same sizes.

``python -m simulations.bench.secure [--json] [--secagg]`` runs whole sessions with all
parties in this process, one thread. Seconds are CPU time: for a party the median over all
parties of all five answers, for the server everything it does. ``client_bytes`` is what a
party uploads, ``client_bytes_down`` what it receives.

With ``--secagg`` Flower's own functions run on the same sizes: all of one client's work; of
the server's, the unmasking of a few clients, scaled up to all (a full run takes minutes).
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from dare_agg.cli.output import print_json
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.secure import SecureServer, make_roster, new_identity, secure_terms
from dare_agg.secure import client as party
from dare_agg.secure.aggregates import AGGREGATES
from dare_agg.secure.policy import SecurePolicy

DROP_RATE = parse_drop_rate("0.9")


def measure(aggregate: str, clients: int, words: int, dropouts: int, bits: int) -> dict[str, Any]:
    """Run one session in which ``dropouts`` parties vanish before they send their vectors."""
    identities = [new_identity(f"party {i}") for i in range(clients)]
    roster = make_roster("bench", [(i.name, i.public) for i in identities])
    by_id = {roster.id_of(i.public): i for i in identities}
    terms = secure_terms(
        run="bench",
        round_number=1,
        roster=roster.digest,
        cohort=list(by_id),
        base="0" * 64,
        layout="0" * 64,
        size=words * DROP_RATE.numerator // DROP_RATE.denominator,
        drop_rate=DROP_RATE,
        aggregate=aggregate,
        bits=bits,
    )
    policy = SecurePolicy(terms.base, terms.layout)
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.002, terms.survivors).astype(np.float32)
    spent = dict.fromkeys(by_id, 0.0)
    up = dict.fromkeys(by_id, 0)
    down = dict.fromkeys(by_id, len(terms.encode()))
    gone = set(list(by_id)[:dropouts])
    states: dict[int, party.ClientState] = {}
    server_seconds = 0.0
    server = SecureServer(terms, roster)

    def advertise(p: int, _: bytes) -> tuple[party.ClientState, bytes]:
        return party.advertise(by_id[p], roster, terms, policy)

    def share(p: int, request: bytes) -> tuple[party.ClientState, bytes]:
        return party.share(by_id[p], roster, states[p], request)

    def contribute(p: int, request: bytes) -> tuple[party.ClientState, bytes]:
        return party.contribute(by_id[p], party.open_shares(states[p], request), values)

    def sign(p: int, request: bytes) -> tuple[party.ClientState, bytes]:
        return party.sign_alive(by_id[p], states[p], request)

    def reveal(p: int, request: bytes) -> tuple[party.ClientState, bytes]:
        return party.reveal(by_id[p], roster, states[p], request)

    requests = dict.fromkeys(by_id, b"")
    wall = time.perf_counter()
    for step in (advertise, share, contribute, sign, reveal):
        if step is not advertise:
            began = time.process_time()
            requests = server.close()
            server_seconds += time.process_time() - began
        for p, request in requests.items():
            if step is contribute and p in gone:
                continue
            began = time.process_time()
            states[p], answer = step(p, request)
            middle = time.process_time()
            server.take(answer)
            server_seconds += time.process_time() - middle
            spent[p] += middle - began
            up[p] += len(answer)
            down[p] += len(request)
    began = time.process_time()
    sums = server.finish()
    server_seconds += time.process_time() - began
    if sums.parties != clients - dropouts:
        raise SystemExit(f"{sums.parties} parties in the sum, {clients - dropouts} were due")
    stayed = [p for p in by_id if p not in gone]
    return {
        "aggregate": aggregate,
        "clients": clients,
        "words": words,
        "dropouts": dropouts,
        "client_seconds": round(median(spent[p] for p in stayed), 4),
        "server_seconds": round(server_seconds, 4),
        "client_bytes": max(up[p] for p in stayed),
        "client_bytes_down": max(down[p] for p in stayed),
        "word_bits": terms.quantiser.word_bits,
        "degree": terms.degree,
        "wall_seconds": round(time.perf_counter() - wall, 2),
    }


def measure_secagg(clients: int, words: int, dropouts: int) -> dict[str, Any]:
    """Flower's SecAgg+ with its default ranges, complete graph, the same threshold."""
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
        encrypt,
        generate_shared_key,
    )
    from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_subtraction
    from flwr.common.secure_aggregation.secaggplus_constants import Key
    from flwr.common.secure_aggregation.secaggplus_utils import (
        pseudo_rand_gen,
        share_keys_plaintext_concat,
    )
    from flwr.supercore.primitives.asymmetric import (
        bytes_to_private_key,
        bytes_to_public_key,
    )

    # The package offers the mod function under the module's own name.
    mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
    threshold = 2 * clients // 3 + 1
    configs = {
        Key.SAMPLE_NUMBER: clients,
        Key.SHARE_NUMBER: clients,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: 8.0,
        Key.TARGET_RANGE: 1 << 22,
        Key.MOD_RANGE: 1 << 32,
        Key.MAX_WEIGHT: 1000.0,
    }
    vector = np.random.default_rng(0).normal(0, 0.002, words).astype(np.float32)
    states = [mod.SecAggPlusState(nid=i) for i in range(clients)]
    for state in states[1:]:
        mod._setup(state, configs)
    me = states[0]
    began = time.process_time()
    mod._setup(me, configs)
    seconds = time.process_time() - began
    keys = {str(s.nid): [s.pk1, s.pk2] for s in states}
    began = time.process_time()
    shares = mod._share_keys(me, keys)
    seconds += time.process_time() - began
    inbox = []
    for state in states[1:]:
        key = generate_shared_key(bytes_to_private_key(state.sk2), bytes_to_public_key(me.pk2))
        inbox.append(encrypt(key, share_keys_plaintext_concat(state.nid, 0, b"s" * 48, b"k" * 128)))
    asked = {Key.CIPHERTEXT_LIST: inbox, Key.SOURCE_LIST: list(range(1, clients))}
    began = time.process_time()
    masked = mod._collect_masked_vectors(me, asked, 500, ndarrays_to_parameters([vector]))
    active, dead = list(range(clients - dropouts)), list(range(clients - dropouts, clients))
    revealed = mod._unmask(me, {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead})
    seconds += time.process_time() - began

    def timed(do: Callable[[], object], times: int = 3) -> float:
        start = time.process_time()
        for _ in range(times):
            do()
        return (time.process_time() - start) / times

    seed_shares = create_shares(b"s" * 32, threshold, clients)[: len(active)]
    key_shares = create_shares(me.sk1, threshold, clients)[: len(active)]
    total = [np.zeros(words, np.int64)]

    def off() -> None:
        mask = pseudo_rand_gen(b"s" * 32, 1 << 32, [(words,)])
        parameters_subtraction(total, mask)

    def agree() -> None:
        generate_shared_key(bytes_to_private_key(me.sk1), bytes_to_public_key(states[1].pk1))

    mask_seconds, agree_seconds = timed(off), timed(agree)
    server = len(active) * (timed(lambda: combine_shares(seed_shares), 2) + mask_seconds)
    # Flower takes a dropped client's masks off with every neighbour, dropped ones too.
    server += len(dead) * timed(lambda: combine_shares(key_shares), 1)
    server += len(dead) * (clients - 1) * (agree_seconds + mask_seconds)
    up = sum(map(len, masked[Key.MASKED_PARAMETERS])) + sum(map(len, shares[Key.CIPHERTEXT_LIST]))
    up += sum(map(len, revealed[Key.SHARE_LIST])) + len(me.pk1) + len(me.pk2)
    return {
        "aggregate": "mean",
        "clients": clients,
        "words": words,
        "dropouts": dropouts,
        "client_seconds": round(seconds, 4),
        "server_seconds": round(server, 2),
        "server_seconds_scaled": True,
        "client_bytes": up,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.secure", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--words", type=int, default=100_000)
    parser.add_argument("--dropouts", type=int, default=10)
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--secagg", action="store_true", help="measure Flower's SecAgg+ too")
    options = parser.parse_args()
    size = options.clients, options.words, options.dropouts
    rows = [measure(aggregate, *size, options.bits) for aggregate in AGGREGATES]
    found: dict[str, Any] = {"rows": rows}
    if options.secagg:
        found["secagg_plus"] = [measure_secagg(*size)]
    if options.json:
        print_json(found)
        return 0
    for row in [*rows, *found.get("secagg_plus", [])]:
        who = "SecAgg+" if "server_seconds_scaled" in row else "dare-agg"
        print(
            f"{who:9} {row['aggregate']:5} n={row['clients']} k={row['words']} "
            f"drop-outs {row['dropouts']}: client {row['client_seconds']:.3f} s, server "
            f"{row['server_seconds']:.2f} s, {row['client_bytes'] / 1e6:.3f} MB a client"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
