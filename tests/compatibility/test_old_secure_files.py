"""Keys, rosters, ledgers and sealed sessions of the first layout open and go on as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exact_app import SECURE_RUN, SECURE_SUM, exact, exact_app

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.deploy.identities import load_identity, public_hex, read_identities
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ProtocolError, StateError, UpdateError
from dare_agg.flower import dare_mod
from dare_agg.flower.resume import resume, save
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.rounds.signing import check_signature
from dare_agg.rounds.state import StateFolder
from dare_agg.secure import secure_terms
from dare_agg.secure.identity import read_identity, read_public
from dare_agg.secure.ledger import FileLedger, tensor_claim
from dare_agg.secure.party import REQUESTS, Party
from dare_agg.secure.roster import check_roster, read_roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.vault import Vault
from simulations.runs.memory_grid import MemoryGrid

DATA = Path(__file__).resolve().parents[1] / "data" / "made-by-0.1"
SECURE = json.loads((DATA / "secure" / "expected.json").read_text())
SIGNED = json.loads((DATA / "signatures" / "expected.json").read_text())
PASSPHRASE = "correct horse battery"
Old = Callable[[str], Path]


def test_identities_open_with_their_passphrase(old: Old) -> None:
    keys = old("secure/keys")
    for number, (name, public) in enumerate(SECURE["members"]):
        identity = read_identity(keys / f"party-{number}.key", PASSPHRASE)
        assert (identity.name, identity.public.hex()) == (name, public)
        assert read_public(keys / f"party-{number}.pub")["public"] == public
    coordinator = read_identity(keys / "coordinator.key", PASSPHRASE)
    assert read_public(keys / "coordinator.pub")["public"] == coordinator.public.hex()
    first = read_identity(keys / "party-0.key", PASSPHRASE)
    assert first.sign(b"words").hex() == SECURE["signature"]
    with pytest.raises(StateError, match="passphrase is wrong"):
        read_identity(keys / "party-0.key", "another passphrase")


def test_the_roster_holds_and_its_signatures_count(old: Old) -> None:
    keys = old("secure/keys")
    roster = read_roster(keys / "roster.json")
    assert (roster.name, roster.serial, roster.digest.hex()) == (
        "four winds", 3, SECURE["roster"]
    )  # fmt: skip
    assert sorted([m.name, m.public.hex()] for m in roster.members) == sorted(SECURE["members"])
    trusted = [
        bytes.fromhex(read_public(keys / f"{name}.pub")["public"])
        for name in ("coordinator", "party-2")
    ]
    check_roster(roster, trusted)
    with pytest.raises(ProtocolError, match="lacks the signature"):
        check_roster(roster, [bytes.fromhex(SECURE["members"][0][1])])


def test_a_ledger_still_refuses_what_it_saw(old: Old, call: Callable[..., str]) -> None:
    path = old("secure") / "merge.ledger"
    shown = json.loads(call("keys", "ledger", path, "--json"))["contributions"]
    assert shown == SECURE["ledger"] and [entry["number"] for entry in shown] == [0, 2]

    def claim(number: int, delta: int, tensor: int) -> None:
        terms = secure_terms(
            run="merge", round_number=number, roster=bytes(32), cohort=[1, 2, 3], base="0" * 64,
            layout="0" * 64, size=4, drop_rate=parse_drop_rate("0"),
        )  # fmt: skip
        tensors = [tensor_claim(exact("tensor", tensor, shape=(5,)))]
        FileLedger(path).claim(terms, exact("delta", delta, shape=(4,)), tensors)

    for number in (0, 2):
        seen = {"round": (number, 8, 8), "delta": (8, number, 8), "model": (8, 8, number)}
        for what, words in seen.items():
            with pytest.raises(ProtocolError, match=f"this {what} has already") as refused:
                claim(*words)
            assert refused.value.reason == "second-cohort"
    claim(1, 1, 1)  # the second one was let go


@pytest.mark.parametrize("stage", REQUESTS)
def test_a_sealed_session_of_the_old_protocol_ends_by_its_name(stage: str, old: Old) -> None:
    """Its vault opens; its terms bind less than today's, so no step of it is taken any more."""
    keys, folder = old("secure/keys"), old(f"secure/session/{stage}")
    roster = read_roster(keys / "roster.json")
    names = [name for name, _ in SECURE["members"]]
    number = names.index(SECURE["session"]["party"])
    identity = read_identity(keys / f"party-{number}.key", PASSPHRASE)
    assert roster.id_of(identity.public) == 1
    vault = Vault(folder / "vault", identity)
    party = Party(identity, roster, vault, FileLedger(folder / "l"))
    session = bytes.fromhex(SECURE["session"]["session"])
    if stage in ("share", "contribute"):  # the delta lies sealed until it is masked
        delta = exact("delta", 1, shape=(300,), exponent=16)
        assert delta.tobytes() in vault.get(session, "delta")
    with pytest.raises(ProtocolError, match="protocol version 1, this is 2") as refused:
        party.answer(stage, session, (folder / "request.bin").read_bytes())
    assert refused.value.reason == "version"


def test_a_secure_run_goes_on(
    old: Old, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parties open their old keys, and their old ledgers let a new round in."""
    keys, folder = old("secure/keys"), old("secure/state")
    monkeypatch.setenv("DARE_AGG_SECURE_KEYS", str(keys))
    monkeypatch.setenv("DARE_AGG_PASSPHRASE", PASSPHRASE)
    app = exact_app([secure_mod, dare_mod])
    secure_queries(app)
    kept = StateFolder(folder)
    strategy = SecureStrategy(
        **SECURE_RUN,
        secure=SecureSettings(**SECURE_SUM),
        roster=read_roster(keys / "roster.json"),
        downlink=make_downlink("auto"),
        round_hook=lambda outcome: save(strategy, kept, outcome),
    )
    resumed = resume(strategy, kept)
    assert resumed is not None and resumed.round == 2
    assert resumed.version == SECURE["run"]["version"]
    assert np.any(resumed.step_state.vectors["velocity"])
    strategy.start(
        MemoryGrid(app, 4),
        resumed.arrays,
        num_rounds=3,
        start_round=3,
        step_state=resumed.step_state,
    )
    assert strategy.outcome is not None and strategy.outcome.measurements["accepted"] == 4
    for number, known in enumerate(SECURE["run"]["ledgers"]):
        words = call("keys", "ledger", keys / f"party-{number}.ledger", "--json")
        entries = json.loads(words)["contributions"]
        assert entries[:2] == known and [entry["number"] for entry in entries] == [1, 2, 3]


def test_signing_keys_and_the_table_of_clients(old: Old) -> None:
    folder = old("signatures")
    known = read_identities(folder / "identities.json")
    assert known == SIGNED["public"]
    for name, public in known.items():
        assert public_hex(load_identity(folder / f"{name}.pem")) == public
    signature = bytes.fromhex(SIGNED["signature"])
    assert load_identity(folder / "north.pem").sign(bytes(32)) == signature
    check_signature(known["north"], bytes(32), signature, "north")
    with pytest.raises(UpdateError, match="does not fit"):
        check_signature(known["south"], bytes(32), signature, "south")
