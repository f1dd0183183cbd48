"""Whoever carries off a server's or a party's disk looks for single updates, deltas and keys."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from guarded import (
    PASSPHRASE,
    Parties,
    base_arrays,
    digest_of,
    learner,
    quick_keys,
    training_content,
)

from dare_agg.flower.resume import keep_base, save
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.rounds.state import StateFolder
from dare_agg.secure.identity import read_identity
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.vault import Vault
from simulations.runs.memory_grid import MemoryGrid

PIECE = 32


def files_below(folder):
    return b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def pieces(data: bytes):
    """Stretches of a secret that would be found whole in a file that holds it."""
    step = max(PIECE, len(data) // 50)
    return [data[at : at + PIECE] for at in range(0, len(data) - PIECE, step)]


def delta_of(party, arrays, rate):
    """What `guarded.learner` learns on a node, as it would lie in a file."""
    noise = np.random.default_rng(party).normal(size=arrays["body.w"].shape).astype(np.float32)
    tuned = arrays["body.w"] - np.float32(rate) * noise
    return tuned - arrays["body.w"], tuned


def test_the_servers_disk_after_secure_rounds(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    parties = Parties(tmp_path, learner())
    server = tmp_path / "server"
    kept = StateFolder(server)
    nodes = [parties.nodes[party] for party in parties.ids]
    grid = MemoryGrid(parties.app, 4, node_config=lambda number: nodes[number])
    arrays = ArrayRecord({name: Array(array) for name, array in base_arrays().items()})
    strategy = SecureStrategy(
        secure=SecureSettings("mean", drop_rate="0.5", clip=0.05),
        roster=parties.roster,
        stage_seconds=10,
        fraction_evaluate=0.0,
        seed=3,
        round_hook=lambda outcome: save(strategy, kept, outcome),
    )
    keep_base(kept, arrays)
    strategy.start(grid, arrays, num_rounds=2)
    disk = files_below(server)
    assert strategy.outcome.measurements["accepted"] == 4 and len(disk) > 2000
    # Every protocol message it was sent, and every party's delta of the first round.
    secrets = [
        array.data
        for reply in grid.received
        for record in reply.content.array_records.values()
        for array in record.values()
    ]
    secrets += [
        part.tobytes() for node in grid.partitions for part in delta_of(node, base_arrays(), 0.01)
    ]
    assert len(secrets) > 40
    for secret in secrets:
        assert not any(piece in disk for piece in pieces(secret))


@pytest.mark.parametrize("stage", ["trained", "ended"])
def test_a_partys_disk_between_two_messages(tmp_path, monkeypatch, stage):
    quick_keys(monkeypatch)
    parties = Parties(tmp_path, learner())
    arrays, config = base_arrays(), {"lr": 0.01}
    terms = parties.terms(arrays, training=digest_of(arrays, config, {}))
    if stage == "ended":
        assert parties.round(terms, lambda party: (arrays, config, {})) == {}
    else:
        for party in parties.ids:
            parties.send(party, training_content(terms, arrays, config), "train")
    (tmp_path / "passphrase").unlink()  # on a tmpfs, as SECURITY.md says
    disk = files_below(tmp_path)
    for party in parties.ids:
        identity = read_identity(parties.path_of(party), PASSPHRASE)
        assert identity.secret not in disk and identity.secret.hex().encode() not in disk
        if stage == "trained":  # it is what lies there, sealed
            sealed = Vault(tmp_path / "state", identity).get(terms.session, "delta")
            assert delta_of(party, arrays, 0.01)[0].tobytes() in sealed
        for part in delta_of(party, arrays, 0.01):
            assert not any(piece in disk for piece in pieces(part.tobytes()))
