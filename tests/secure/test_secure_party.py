"""A party over processes that come and go: its secrets are sealed, each step taken once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parties import BASE, LAYOUT, Consortium, consortium, seeded, session

from dare_agg.errors import ConfigError, LayoutError, ProtocolError
from dare_agg.secure import SecureServer
from dare_agg.secure import messages as wire
from dare_agg.secure.kept_state import decode_state, encode_state
from dare_agg.secure.ledger import FileLedger
from dare_agg.secure.party import REQUESTS, Contribution, Party
from dare_agg.secure.policy import SecurePolicy
from dare_agg.secure.practice import practice_consortium
from dare_agg.secure.result import merged_sum
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.vault import Vault, default_folder


def party(group: Consortium, p: int, folder: Path) -> Party:
    """Made anew for every step, as a new process would."""
    identity = group.identities[p]
    ledger = FileLedger(folder / f"ledger-{p}.jsonl")
    return Party(identity, group.roster, Vault(folder / "vault", identity), ledger)


def contribution(p: int, group: Consortium) -> Contribution:
    rng = np.random.default_rng(p)
    terms = group.terms
    return Contribution(
        rng.uniform(-0.9, 0.9, terms.size).astype(np.float32),
        rng.uniform(-0.9, 0.9, terms.dense).astype(np.float32),
    )


def begin(group: Consortium, folder: Path, keep: bool = True) -> SecureServer:
    server = SecureServer(group.terms, group.roster)
    for p in group.terms.cohort:
        policy = SecurePolicy(BASE, LAYOUT)
        mine = contribution(p, group) if keep else None
        server.take(party(group, p, folder).advertise(group.terms.encode(), policy, mine))
    return server


@pytest.mark.parametrize("aggregate", ["mean", "ties"])
def test_a_session_over_fresh_processes_with_a_dense_part(tmp_path: Path, aggregate: str) -> None:
    group = consortium(4, aggregate=aggregate, dense=7, bits=16)
    server = begin(group, tmp_path)
    secrets: list[bytes] = []
    for stage in REQUESTS:
        for p, request in server.close().items():
            one = party(group, p, tmp_path)
            state = decode_state(one.vault.get(group.terms.session, "state"))
            secrets += [state.sealing_secret, state.mask_seed, state.self_seed, state.nonce]
            secrets += [share for _, *shares in state.held for share in shares]
            server.take(one.answer(stage, group.terms.session, request))
        on_disk = b"".join(f.read_bytes() for f in sorted(tmp_path.rglob("*")) if f.is_file())
        assert not any(secret and secret in on_disk for secret in secrets)
        for p in group.terms.cohort:
            assert group.identities[p].secret not in on_disk
            assert contribution(p, group).delta[:8].tobytes() not in on_disk
    sums = server.finish()
    found = merged_sum(sums, group.terms, server.mask)
    delta, dense, measured = found.vector(), found.dense, found.measured
    given = [contribution(p, group) for p in group.terms.cohort]
    mean = np.mean([g.dense for g in given], axis=0)
    assert dense is not None and np.abs(dense - mean).max() < 1e-4
    assert delta.shape == (300,) and np.count_nonzero(delta) == 30 and measured.parties == 4
    for p in group.terms.cohort:
        terms, mask = party(group, p, tmp_path).seen_through(group.terms.session)
        assert terms == group.terms and mask.key == server.mask.key
        party(group, p, tmp_path).end(group.terms.session)
    left = [f for f in (tmp_path / "vault").rglob("*") if f.is_file()]
    assert {f.name for f in left} == {"lock"} and not any(f.stat().st_size for f in left)


def test_no_step_twice_and_no_second_cohort(tmp_path: Path) -> None:
    group = consortium(4)
    server = begin(group, tmp_path)
    session_ = group.terms.session
    requests = server.close()
    one = party(group, 1, tmp_path)
    one.answer("share", session_, requests[1])
    with pytest.raises(ProtocolError) as twice:
        party(group, 1, tmp_path).answer("share", session_, requests[1])
    assert twice.value.reason == "stage"
    # A refusal ends the session for this party: nothing of it is left to be asked for.
    with pytest.raises(ProtocolError) as over:
        party(group, 1, tmp_path).answer("share", session_, requests[1])
    assert over.value.reason == "state"
    with pytest.raises(ProtocolError) as early:
        party(group, 2, tmp_path).seen_through(session_)
    assert early.value.reason == "stage"
    # The whole sum once more among others, with the same delta: the ledger refuses.
    group = consortium(4, round_number=5)
    for attempt, chosen in enumerate((group, consortium(4, round_number=6, cohort=(1, 2, 3)))):
        server = begin(chosen, tmp_path)
        for stage in REQUESTS[:2]:
            for p, request in server.close().items():
                try:
                    answer = party(chosen, p, tmp_path).answer(stage, chosen.terms.session, request)
                except ProtocolError as error:
                    assert (attempt, stage, error.reason) == (1, "contribute", "second-cohort")
                else:
                    assert (attempt, stage) != (1, "contribute")
                    server.take(answer)


@pytest.mark.parametrize("stage", REQUESTS)
def test_no_process_takes_a_step_again(tmp_path: Path, stage: str) -> None:
    """Asked twice for the same step over a restart, a party refuses and its secrets go."""
    group = consortium(4)
    server = begin(group, tmp_path)
    session_ = group.terms.session
    for at in REQUESTS[: REQUESTS.index(stage) + 1]:
        requests = server.close()
        for p, request in requests.items():
            server.take(party(group, p, tmp_path).answer(at, session_, request))
    for reason in ("stage", "state"):
        with pytest.raises(ProtocolError) as again:
            party(group, 1, tmp_path).answer(stage, session_, requests[1])
        assert again.value.reason == reason


def test_a_crash_between_ledger_and_send_uses_the_delta_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows then whether the vector left: the party does not send another one."""
    group = consortium(4)
    server = begin(group, tmp_path)
    session_ = group.terms.session
    for p, request in server.close().items():
        server.take(party(group, p, tmp_path).answer("share", session_, request))
    request = server.close()[1]

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FileLedger, "claim", crash)
        party(group, 1, tmp_path).answer("contribute", session_, request)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Before the claim nothing is lost; this time it crashes behind it.
        patch.setattr(Party, "_keep", crash)
        party(group, 1, tmp_path).answer("contribute", session_, request)
    assert len(FileLedger(tmp_path / "ledger-1.jsonl").entries()) == 1
    with pytest.raises(ProtocolError) as refused:
        party(group, 1, tmp_path).answer("contribute", session_, request)
    assert refused.value.reason in ("second-cohort", "state")


def test_two_alive_sets_at_once_get_one_signature(tmp_path: Path) -> None:
    """Two processes are asked at the same moment to sign different sets: one of them refuses."""
    group = consortium(5, threshold=3)
    session_ = group.terms.session
    server = SecureServer(group.terms, group.roster)
    policy = SecurePolicy(BASE, LAYOUT, min_threshold_share=0.5, colluding=0.0)
    for p in group.terms.cohort:
        mine = contribution(p, group)
        server.take(party(group, p, tmp_path).advertise(group.terms.encode(), policy, mine))
    for stage in REQUESTS[:2]:
        for p, request in server.close().items():
            server.take(party(group, p, tmp_path).answer(stage, session_, request))
    server.close()
    views = [(1, 2, 3), (1, 4, 5), (1, 2, 3, 4), (1, 2, 3, 4, 5)]
    begin_ = threading.Barrier(len(views))

    def ask(alive: tuple[int, ...]) -> str:
        dead = tuple(sorted({1, 2, 3, 4, 5} - set(alive)))
        request = wire.encode_alive_list(session_, alive, dead)
        one = party(group, 1, tmp_path)
        begin_.wait()
        try:
            one.answer("sign", session_, request)
        except ProtocolError as error:
            return error.reason
        return "signed"

    with ThreadPoolExecutor(len(views)) as pool:
        said = sorted(pool.map(ask, views))
    # The second finds the step taken and ends the session; the others find nothing.
    assert said == ["signed", "stage", "state", "state"]


def test_a_delta_of_another_size_is_refused(tmp_path: Path) -> None:
    group = consortium(4)
    server = begin(group, tmp_path, keep=False)
    for p, request in server.close().items():
        server.take(party(group, p, tmp_path).answer("share", group.terms.session, request))
    request = server.close()[1]
    with pytest.raises(LayoutError, match="300 and 0"):
        party(group, 1, tmp_path).answer(
            "contribute", group.terms.session, request, lambda _: Contribution(np.ones(5, "f4"))
        )
    assert not (tmp_path / "ledger-1.jsonl").exists()


@pytest.mark.parametrize("until", ["adverts", "shares", "vectors", "signatures", "reveals"])
def test_states_read_back_as_written(until: str) -> None:
    run = session(consortium(4, aggregate="ties"), until)
    for state in run.states.values():
        data = encode_state(state)
        assert decode_state(data) == state
        with pytest.raises(ProtocolError):
            decode_state(data[:-1])
        with pytest.raises(ProtocolError):
            decode_state(data + b"\0")
        secrets = {"sealing_secret", "mask_seed", "self_seed", "nonce", "held", "openers"}
        shown = repr(state)
        for item in fields(state):
            if item.name in secrets:
                assert f"{item.name}=" not in shown


def test_the_vault_seals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dare_agg.secure.vault._PIECE_BYTES", 1000)
    group = consortium(3)
    vault, other = (Vault(tmp_path, group.identities[p]) for p in (1, 2))
    one, two = bytes(32), b"\1" * 32
    for content in (b"", b"x", seeded(1)(1000), seeded(2)(3456)):
        vault.put(one, "state", content)
        assert vault.get(one, "state") == content
    path = vault.folder / f"{one.hex()}.state"
    assert path.stat().st_mode & 0o777 == 0o600 and vault.folder.stat().st_mode & 0o777 == 0o700
    whole = path.read_bytes()

    def refused(do: Any) -> str:
        with pytest.raises(ProtocolError) as error:
            do()
        assert error.value.reason == "state"
        return str(error.value)

    assert "holds no state" in refused(lambda: vault.get(two, "state"))
    for at in (0, 10, 40, 44, 500, 1100, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "does not open" in refused(lambda: vault.get(one, "state"))
    for cut in (0, 43, 44, 60, 1060, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refused(lambda: vault.get(one, "state"))
    path.write_bytes(whole)
    # Under another name, session or identity it does not open.
    for target in (
        vault.folder / f"{two.hex()}.state",
        vault.folder / f"{one.hex()}.delta",
        other.folder / path.name,
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(whole)
    refused(lambda: vault.get(two, "state"))
    refused(lambda: vault.get(one, "delta"))
    refused(lambda: other.get(one, "state"))
    assert vault.get(one, "state") == seeded(2)(3456)
    vault.drop(one, "delta")
    vault.drop(two)
    assert [p.name for p in vault.folder.iterdir()] == [path.name]
    vault.drop_all()
    assert not list(vault.folder.iterdir())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_folder() == tmp_path / "dare-agg"


# --- settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"method": "tie"}, "did you mean 'ties'"),
        ({"min_parties": 2}, "shows each the other's delta"),
        ({"method": "ties", "bits": 7}, "8 to 24"),
        ({"bits": 5}, "6 to 24"),
        ({"method": "ties", "weighting": "examples"}, "TIES counts parties"),
        ({"options": {"trim": 0.2}}, "magnitude trim"),
        ({"options": {"density": 0.2}}, "magnitude trim"),
        ({"options": {"gamma": 1}}, "'gamma' has no meaning"),
        ({"scaling": float("nan")}, "scaling"),
        ({"clip": 0.0}, "clip"),
        ({"threshold": 2}, "more than half"),
        ({"threshold": 5, "min_parties": 10}, "more than half"),
        ({"method": "ties", "bits": 16, "min_parties": 300}, "set bits = 14 or fewer"),
    ],
)
def test_unsafe_settings_are_refused(words: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SecureSettings(**words)


def test_bits_follow_from_the_parties() -> None:
    ties, mean = SecureSettings("ties"), SecureSettings("mean")
    assert [ties.bits_for(n) for n in (3, 100, 200, 1000, 4095)] == [16, 16, 16, 12, 8]
    assert mean.bits_for(10_000) == 16
    assert SecureSettings("mean", weighting="examples").bits_for(100) == 24
    with pytest.raises(ConfigError, match="smaller cohorts"):
        ties.bits_for(5000)
    group = consortium(4)
    terms = ties.terms(
        run="r", round_number=1, roster=group.roster, cohort=[1, 2, 3], base=BASE, layout=LAYOUT,
        size=100, dense=5,
    )  # fmt: skip
    assert (terms.threshold, terms.values, terms.quantiser.bits) == (3, 15, 16)
    with pytest.raises(ConfigError, match="2 parties"):
        ties.terms(
            run="r", round_number=1, roster=group.roster, cohort=[1, 2], base=BASE, layout=LAYOUT,
            size=100,
        )  # fmt: skip
    assert replace(ties, min_parties=5).min_parties == 5


def test_a_consortium_for_practice_has_three_at_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 clients; a secure sum needs at least 3"):
        practice_consortium(tmp_path / "keys", 2)
    with pytest.raises(ConfigError, match="1 secure-models for 3 clients"):
        practice_consortium(tmp_path / "keys", 3, ["a"])
    assert not (tmp_path / "keys").exists()
