"""A malicious server fails, a passive one learns nothing."""

from collections.abc import Callable
from dataclasses import replace
from time import process_time

import numpy as np
import pytest
from parties import BASE, Consortium, Session, consortium, seeded, session, step
from safetensors.numpy import save_file

from dare_agg.errors import ProtocolError
from dare_agg.secure import SecureServer
from dare_agg.secure import client as party
from dare_agg.secure import messages as wire
from dare_agg.secure import terms as terms_module
from dare_agg.secure.ledger import FileLedger, MemoryLedger
from dare_agg.secure.own_model import open_own
from dare_agg.secure.packing import pack_party
from dare_agg.secure.policy import SecurePolicy
from dare_agg.secure.stream import unpack_words


def refused(reason: str, do: Callable[[], object]) -> ProtocolError:
    with pytest.raises(ProtocolError) as error:
        do()
    assert error.value.reason == reason, error.value
    return error.value


# --- keys ---------------------------------------------------------------------------------


def test_substituted_keys_are_refused() -> None:
    """The server puts its own key in party 2's advert: the signature no longer holds."""
    run = session(consortium(), "adverts")
    request = run.server.close()[1]
    forged = bytearray(request)
    at = 40 + wire.ADVERT_BYTES + 40  # the second advert's sealing key
    forged[at : at + 32] = seeded(1)(32)
    for p in (1, 3):
        refused("signature", lambda p=p: _share(run, p, bytes(forged)))


def test_adverts_of_another_session_or_twice_are_refused() -> None:
    run, other = session(consortium(), "adverts"), session(consortium(round_number=2), "adverts")
    mine, theirs = run.server.close()[1], other.server.close()[1]
    refused("session", lambda: _share(run, 1, theirs))
    adverts = [mine[40 + i * wire.ADVERT_BYTES :][: wire.ADVERT_BYTES] for i in range(4)]
    old = theirs[40 + wire.ADVERT_BYTES :][: wire.ADVERT_BYTES]
    head = mine[:40]
    refused("session", lambda: _share(run, 1, head + adverts[0] + old + b"".join(adverts[2:])))
    twice = head + adverts[0] + adverts[1] + adverts[1] + adverts[3]
    refused("duplicate", lambda: _share(run, 1, twice))
    without_me = mine[:36] + wire.u32(3) + b"".join(adverts[1:])
    refused("own-keys", lambda: _share(run, 1, without_me))
    refused("threshold", lambda: _share(run, 1, mine[:36] + wire.u32(2) + b"".join(adverts[:2])))


def test_low_order_and_reused_keys_are_refused_by_the_server() -> None:
    group = consortium()
    server = SecureServer(group.terms, group.roster)
    session_, me = group.terms.session, group.identities[1]
    key = seeded(3)(32)
    low = wire.encode_advert(me, session_, 1, bytes(32), key, bytes(32), bytes(32))
    refused("low-order", lambda: server.take(low))
    same = wire.encode_advert(me, session_, 1, key, key, bytes(32), bytes(32))
    refused("duplicate", lambda: server.take(same))
    foreign = wire.encode_advert(
        group.identities[2], session_, 1, key, seeded(4)(32), bytes(32), bytes(32)
    )
    refused("signature", lambda: server.take(foreign))
    good = wire.encode_advert(me, session_, 1, key, seeded(4)(32), bytes(32), bytes(32))
    assert server.take(good) == 1
    refused("duplicate", lambda: server.take(good))


# --- bases and masks ----------------------------------------------------------------------


def test_another_base_layout_or_roster_is_refused() -> None:
    group = consortium()
    me, roster = group.identities[1], group.roster
    for change, reason in (
        ({"base": "ee" * 32}, "base"),
        ({"layout": "ee" * 32}, "layout"),
        ({"roster": bytes(32)}, "roster"),
        ({"clip": 2.0}, "clip"),
    ):
        terms = replace(group.terms, **change)
        refused(reason, lambda t=terms: party.advertise(me, roster, t, group.policy()))
    refused(
        "parties",
        lambda: party.advertise(me, roster, group.terms, group.policy(min_parties=5)),
    )
    refused(
        "threshold",
        lambda: party.advertise(me, roster, group.terms, group.policy(min_threshold_share=0.9)),
    )
    refused(
        "aggregate",
        lambda: party.advertise(me, roster, group.terms, group.policy(aggregates=("ties",))),
    )


def test_terms_shown_differently_share_no_key() -> None:
    """Party 1 is told another base (and holds it): the others do not take its advert."""
    group = consortium()
    told = replace(group.terms, base="ee" * 32)
    policy = SecurePolicy(told.base, told.layout)
    _, advert = party.advertise(group.identities[1], group.roster, told, policy)
    run = session(group, "adverts")
    honest = run.server.close()[2]
    mixed = honest[:40] + advert + honest[40 + wire.ADVERT_BYTES :]
    refused("session", lambda: _share(run, 2, mixed))


def test_different_nonces_shown_to_parties_end_in_nothing_unmasked() -> None:
    """Another set of nonces is another mask: vectors are refused, alive sets do not match."""
    run = session(consortium(5, threshold=3), "shares")
    requests = run.server.close()
    delivery = wire.decode_delivery(requests[1], run.group.terms)
    bad = ((2, bytes(32)), *delivery.nonces[1:])
    swapped = wire.encode_delivery(
        run.group.terms.session,
        wire.Delivery((delivery.nonces[0], *bad[:1], *delivery.nonces[2:]), delivery.sealed),
    )
    refused("nonce", lambda: party.open_shares(run.states[1], swapped))
    fewer = wire.encode_delivery(
        run.group.terms.session,
        wire.Delivery(
            tuple(n for n in delivery.nonces if n[0] != 5),
            tuple(s for s in delivery.sealed if s[0] != 5),
        ),
    )
    state = party.open_shares(run.states[1], fewer)
    assert state.mask.key != run.server.mask.key
    _, vector = party.contribute(run.group.identities[1], state, run.values[1])
    refused("session", lambda: run.server.take(vector))


# --- shares -------------------------------------------------------------------------------


def test_replayed_swapped_and_missing_shares_are_refused() -> None:
    run = session(consortium(), "shares")
    requests = run.server.close()
    terms = run.group.terms
    mine, theirs = (wire.decode_delivery(requests[p], terms) for p in (1, 2))

    def deliver(sealed: tuple) -> bytes:
        return wire.encode_delivery(terms.session, wire.Delivery(mine.nonces, sealed))

    (a, first), (b, second), (c, third) = mine.sealed
    refused(
        "shares",
        lambda: party.open_shares(run.states[1], deliver(((a, second), (b, first), (c, third)))),
    )
    replayed = dict(theirs.sealed)[3]
    refused(
        "shares",
        lambda: party.open_shares(run.states[1], deliver(((a, first), (b, replayed), (c, third)))),
    )
    refused("shares", lambda: party.open_shares(run.states[1], deliver(mine.sealed[:2])))
    altered = bytes([first[0] ^ 1]) + first[1:]
    refused(
        "shares",
        lambda: party.open_shares(run.states[1], deliver(((a, altered), *mine.sealed[1:]))),
    )


# --- who is alive -------------------------------------------------------------------------


def test_overlapping_and_forged_alive_lists_are_refused() -> None:
    run = session(consortium(5, threshold=4), "vectors")
    session_ = run.group.terms.session
    run.server.close()
    for alive, dead, reason in (
        ((1, 2, 3, 4, 5), (3,), "overlap"),
        ((1, 2, 3, 4), (), "cohort"),
        ((1, 2, 3, 4, 5), (9,), "cohort"),
        ((2, 3, 4, 5), (1,), "alive"),
        ((1, 2, 3), (4, 5), "threshold"),
    ):
        request = wire.encode_alive_list(session_, alive, dead)
        refused(reason, lambda r=request: _sign(run, 1, r))


def test_split_view_of_the_alive_set_unmasks_nothing() -> None:
    """n = 5: {1,2,3,4} shown to some, all to others: neither reaches enough signatures."""
    run = session(consortium(5, threshold=4), "vectors")
    run.server.close()
    session_, shares = run.group.terms.session, run.states[1].shares_digest
    views = {1: (1, 2, 3, 4), 2: (1, 2, 3, 4), 3: (1, 2, 3, 4, 5), 4: (1, 2, 3, 4, 5)}
    signatures: dict[tuple[int, ...], list[tuple[int, bytes]]] = {}
    for p, alive in views.items():
        dead = tuple(sorted({1, 2, 3, 4, 5} - set(alive)))
        run.states[p], answer = _sign(run, p, wire.encode_alive_list(session_, alive, dead))
        signatures.setdefault(alive, []).append((p, answer[-64:]))
    small = wire.encode_signatures(session_, (1, 2, 3, 4), (5,), signatures[(1, 2, 3, 4)])
    refused("threshold", lambda: _reveal(run, 1, small))
    # Signatures over the other set do not count, nor do forged ones, nor one twice.
    mixed = [*signatures[(1, 2, 3, 4)], *signatures[(1, 2, 3, 4, 5)]]
    refused(
        "signature",
        lambda: _reveal(run, 1, wire.encode_signatures(session_, (1, 2, 3, 4), (5,), mixed)),
    )
    one = signatures[(1, 2, 3, 4)][0]
    refused(
        "duplicate",
        lambda: _reveal(run, 1, wire.encode_signatures(session_, (1, 2, 3, 4), (5,), [one] * 4)),
    )
    other = wire.encode_signatures(session_, (1, 2, 3, 4, 5), (), mixed)
    refused("alive", lambda: _reveal(run, 1, other))
    assert wire.alive_digest(shares, (1, 2, 3, 4), (5,)) == run.states[1].alive_digest


def test_every_step_is_taken_once() -> None:
    """No second answer in a round, no second unmasking, no stage skipped."""
    run = session(consortium(), "reveals")
    random = seeded(8)
    for stage in ("shares", "vectors", "signatures", "reveals"):
        refused("stage", lambda s=stage: step(run, 1, s, random))
    fresh = session(consortium(), "adverts")
    refused("stage", lambda: _sign(fresh, 1, b""))
    refused("stage", lambda: _reveal(fresh, 1, b""))
    refused("stage", lambda: party.open_shares(fresh.states[1], b""))


def test_a_party_that_comes_back_is_not_exposed() -> None:
    """Its late vector is not taken, and nobody holds both its secrets."""
    group = consortium(5, threshold=3)
    run = session(group, "shares")
    requests = run.server.close()
    random = seeded(4)
    run.requests = requests
    late = step(run, 5, "vectors", random)
    for p in (1, 2, 3, 4):
        run.server.take(step(run, p, "vectors", random))
    run.requests = run.server.close()
    with pytest.raises(ProtocolError):
        run.server.take(late)
    refused("alive", lambda: _sign(run, 5, run.requests[1]))
    for p in (1, 2, 3, 4):
        run.server.take(step(run, p, "signatures", random))
    run.requests = run.server.close()
    for p in (1, 2, 3, 4):
        held = {owner: (m, s) for owner, m, s in run.states[p].held}
        answer = step(run, p, "reveals", random)
        _, shares = wire.decode_reveal(
            answer, group.terms, group.roster, run.states[p].alive_digest
        )
        assert {o: held[o][0 if o == 5 else 1] for o in held} == dict(shares)
        run.server.take(answer)
        assert run.states[p].held == ()
    assert run.server.finish().parties == 4
    refused("stage", lambda: run.server.take(late))


# --- a second cohort ----------------------------------------------------------------------


def test_the_same_delta_does_not_enter_a_second_sum(tmp_path) -> None:
    """n − 1 differencing: the same delta with one party less would show that party's."""
    delta = np.arange(10, dtype=np.float32)
    for ledger in (MemoryLedger(), FileLedger(tmp_path / "ledger.jsonl")):
        ledger.claim(consortium().terms, delta)
        again = consortium(cohort=[1, 2, 3], round_number=2).terms
        error = refused("second-cohort", lambda x=ledger, t=again: x.claim(t, delta))
        assert "differ" in str(error)
        refused("second-cohort", lambda x=ledger: x.claim(consortium().terms, delta + 1))
        ledger.claim(consortium(round_number=2).terms, delta + 1)
    reopened = FileLedger(tmp_path / "ledger.jsonl")
    refused("second-cohort", lambda: reopened.claim(consortium(round_number=3).terms, delta))
    text = (tmp_path / "ledger.jsonl").read_text()
    (tmp_path / "ledger.jsonl").write_text(text[:-20])
    FileLedger(tmp_path / "ledger.jsonl").claim(consortium(round_number=4).terms, delta + 2)


def test_another_base_or_other_tensors_do_not_bring_a_model_back(tmp_path) -> None:
    """The server names base and patterns: neither makes a contributed model look new."""
    rng = np.random.default_rng(0)
    base = {f"layer.{i}": rng.normal(size=(4, 5)).astype(np.float32) for i in range(3)}
    tuned = {name: array + np.float32(0.01) for name, array in base.items()}
    tuned["layer.2"] = base["layer.2"]  # frozen
    files = {"base": base, "tuned": tuned, "other": {n: a * 2 for n, a in base.items()}}
    retuned = {**tuned, "layer.0": tuned["layer.0"] + 1, "layer.1": tuned["layer.1"] + 1}
    files["retuned"] = retuned
    paths = {name: tmp_path / f"{name}.safetensors" for name in files}
    for name, arrays in files.items():
        save_file(arrays, paths[name])
    ledger = FileLedger(tmp_path / "ledger.jsonl")

    def claim(number: int, base_name: str, model: str, exclude: tuple[str, ...] = ()) -> None:
        own = open_own(paths[base_name], paths[model], exclude)
        delta = own.delta()
        ledger.claim(consortium(round_number=number).terms, delta, own.claims(delta))

    claim(1, "base", "tuned")
    refused("second-cohort", lambda: claim(2, "other", "tuned"))
    for number, pattern in enumerate((r"layer\.0", r"layer\.1", r"layer\.[02]"), 3):
        refused("second-cohort", lambda n=number, p=pattern: claim(n, "base", "tuned", (p,)))
    claim(6, "base", "retuned")  # what stayed frozen says nothing and may come again
    assert [(e.run, e.number) for e in ledger.entries()] == [("run", 1), ("run", 6)]
    first = ledger.entries()[0]
    assert ledger.forget("") == 2 and len(ledger.entries()) == 2  # not one: nothing happens
    assert ledger.forget(first.session) == 1 and [e.number for e in ledger.entries()] == [6]
    claim(7, "base", "tuned")


# --- a sparse graph -----------------------------------------------------------------------


@pytest.fixture
def sparse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Consortium]:
    """Consortia with the graph of more than 100 parties, only smaller."""
    monkeypatch.setattr(terms_module, "COMPLETE_UP_TO", 5)
    # So few parties are never safe in a sparse graph; they are enough to look at its steps.
    monkeypatch.setattr("dare_agg.secure.policy.is_safe", lambda *graph: True)

    def make(n: int, degree: int, **settings: object) -> Consortium:
        group = consortium(n, **settings)
        terms = replace(group.terms, degree=degree, share_threshold=degree // 2 + 1)
        return Consortium(group.roster, group.identities, terms)

    return make


def test_nobody_steers_who_surrounds_a_party(sparse: Callable[..., Consortium]) -> None:
    """Neighbours are drawn after all keys are fixed, with the party's own randomness: the same
    keys with other randomness give others, so no choice of keys by a coalition decides them."""
    run = session(sparse(14, 6), "adverts")
    request = run.server.close()[1]
    drawn = {
        party.share(
            run.group.identities[1], run.group.roster, run.states[1], request, seeded(seed)
        )[0].drawn
        for seed in range(20)
    }
    assert len(drawn) > 15 and all(len(d) == 6 and 1 not in d for d in drawn)


def test_in_a_sparse_graph_shares_go_where_the_dealer_drew(
    sparse: Callable[..., Consortium],
) -> None:
    run = session(sparse(9, 4), "adverts")
    run.requests = run.server.close()
    state, answer = party.share(
        run.group.identities[1], run.group.roster, run.states[1], run.requests[1], seeded(1)
    )
    upload = wire.decode_shares(answer, run.group.terms, run.group.roster)
    fewer = wire.encode_shares(
        run.group.identities[1], run.group.terms.session, 1, upload.nonce, list(upload.sealed[:3])
    )
    refused("shares", lambda: run.server.take(fewer))
    assert run.server.take(answer) == 1 and state.drawn == tuple(p for p, _ in upload.sealed)
    for p in range(2, 10):
        run.server.take(step(run, p, "shares", seeded(p)))
    delivery = wire.decode_delivery(run.server.close()[1], run.group.terms)
    # Shares of a party that did not deal to this one do not open, nor do its own.
    dealt = {p for p, _ in delivery.sealed}
    stranger = next(p for p in range(2, 10) if p not in dealt)
    for sender in (stranger, 1):
        forged = tuple(sorted([*delivery.sealed, (sender, delivery.sealed[0][1])]))
        request = wire.encode_delivery(
            run.group.terms.session, wire.Delivery(delivery.nonces, forged)
        )
        refused("shares", lambda r=request: party.open_shares(state, r))


# --- a passive server ---------------------------------------------------------------------


def _masked(seed: int, value: float, aggregate: str, bits: int) -> dict[int, np.ndarray]:
    """Masked words of three parties who all hold the same constant."""
    group = consortium(3, size=60_000, aggregate=aggregate, bits=bits)
    run = session(group, "shares", seed)
    requests = run.server.close()
    words = {}
    values = np.full(group.terms.survivors, value, np.float32)
    for p in group.terms.cohort:
        state = party.open_shares(run.states[p], requests[p])
        _, answer = party.contribute(group.identities[p], state, values, random=seeded(seed + p))
        upload = wire.decode_vector(answer, group.terms, group.roster, 10**7)
        words[p] = unpack_words(upload.packed, group.terms.words, group.terms.quantiser.word_bits)
    return words


@pytest.mark.parametrize(("aggregate", "bits"), [("mean", 8), ("ties", 8)])
def test_masked_vectors_are_uniform_whatever_they_hold(aggregate: str, bits: int) -> None:
    """Chi-square of low and high bytes, and of every bit, at known plaintexts 0 and 1."""
    group = consortium(3, size=60, aggregate=aggregate, bits=bits)
    width = group.terms.quantiser.word_bits
    for value in (0.0, 1.0):
        for words in _masked(11, value, aggregate, bits).values():
            wide = words.astype(np.uint64)
            for shift in (0, width - 6):
                counts = np.bincount(
                    ((wide >> np.uint64(shift)) & np.uint64(63)).astype(np.int64), minlength=64
                )
                chi = ((counts - wide.size / 64) ** 2 / (wide.size / 64)).sum()
                assert 20 < chi < 130  # 63 degrees of freedom: p about 1e-6 outside
            for bit in range(width):
                ones = int(((wide >> np.uint64(bit)) & np.uint64(1)).sum())
                assert abs(ones - wide.size / 2) < 5 * (wide.size / 4) ** 0.5


def test_no_relation_to_known_plaintext_is_left() -> None:
    """Sums and differences of two parties' words, of consecutive words and of two rounds are
    uniform too: only all three parties together give the plain sum."""
    first, second = _masked(21, 1.0, "mean", 8), _masked(22, 1.0, "mean", 8)
    modulus = 1 << 11
    plain = pack_party(np.ones(1, np.float32), consortium(3).terms.quantiser, bytes(16))[0]
    a, b, c = (first[p].astype(np.int64) for p in (1, 2, 3))
    relations = {
        "sum": a + b,
        "difference": a - b,
        "sum 2": b + c,
        "shift": a[1:] - a[:-1],
        "rounds": a - second[1].astype(np.int64),
        "all": a + b + c,
    }
    for name, words in relations.items():
        cut = words % modulus
        assert (cut == plain).mean() < 0.005, name
        counts = np.bincount(cut >> 5, minlength=64)
        chi = ((counts - cut.size / 64) ** 2 / (cut.size / 64)).sum()
        assert 20 < chi < 130, name  # even the total carries the three parties' own masks


@pytest.mark.parametrize("stage", ["adverts", "shares", "vectors", "signatures", "reveals"])
def test_corrupted_answers_never_pass(stage: str) -> None:
    """A flipped bit anywhere in a party's answer, or a cut one, is refused and changes nothing."""
    group = consortium(3, size=40)
    stages = ["adverts", "shares", "vectors", "signatures", "reveals"]
    before = stages.index(stage)
    run = session(group, stages[before - 1]) if before else _fresh(group)
    run.requests = run.server.close() if before else {}
    answers = {p: step(run, p, stage, seeded(p)) for p in group.terms.cohort}
    good = answers[1]
    for at in range(0, len(good), 3):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        with pytest.raises(ProtocolError):
            run.server.take(bytes(bad))
    for cut in [*range(0, len(good), 7), len(good) - 1]:
        with pytest.raises(ProtocolError):
            run.server.take(good[:cut])
    with pytest.raises(ProtocolError):
        run.server.take(good + b"\0")
    for answer in answers.values():
        run.server.take(answer)
    if stage == "reveals":
        assert run.server.finish().parties == 3


@pytest.mark.parametrize("stage", ["shares", "vectors", "signatures", "reveals"])
def test_corrupted_requests_never_pass(stage: str) -> None:
    """The same for what the server sends: each is refused, or says exactly the same."""
    group = consortium(3, size=40)
    stages = ["adverts", "shares", "vectors", "signatures", "reveals"]
    run = session(group, stages[stages.index(stage) - 1])
    good = run.server.close()[1]
    states = dict(run.states)

    def ask(request: bytes) -> None:
        run.states, run.requests = dict(states), {1: request}
        step(run, 1, stage, seeded(1))

    for at in range(0, len(good), 3):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        with pytest.raises(ProtocolError):
            ask(bytes(bad))
    for cut in range(0, len(good), 7):
        with pytest.raises(ProtocolError):
            ask(good[:cut])
    with pytest.raises(ProtocolError):
        ask(good + b"\0")
    ask(good)


@pytest.mark.parametrize("stage", ["shares", "vectors", "signatures", "reveals"])
def test_a_list_longer_than_the_cohort_costs_nothing(stage: str) -> None:
    """One advert, nonce, id or signature 50,000 times: each was checked before the order was."""
    group = consortium(3, size=40)
    stages = ["adverts", "shares", "vectors", "signatures", "reveals"]
    run = session(group, stages[stages.index(stage) - 1])
    good = run.server.close()[1]
    size = {"shares": wire.ADVERT_BYTES, "vectors": 36, "signatures": 4, "reveals": 4}[stage]
    run.requests = {1: good[:36] + wire.u32(50_000) + good[40 : 40 + size] * 50_000}
    began = process_time()
    assert "at most 3" in str(refused("malformed", lambda: step(run, 1, stage, seeded(1))))
    assert process_time() - began < 1


def test_a_party_insists_on_two_thirds_unless_told_otherwise() -> None:
    """With t just above half, one colluder among five lets a server unmask two alive sets."""
    group = consortium(5, threshold=3)
    me, policy = group.identities[1], SecurePolicy(BASE, group.terms.layout)
    error = refused("threshold", lambda: party.advertise(me, group.roster, group.terms, policy))
    assert "0.667" in str(error) and "secure-min-threshold" in str(error)
    for n in range(3, 40):
        group = consortium(n)
        party.advertise(group.identities[1], group.roster, group.terms, policy)


def _fresh(group: Consortium) -> Session:
    return Session(group, SecureServer(group.terms, group.roster), {}, {}, _values(group))


def _values(group: Consortium) -> dict[int, np.ndarray]:
    return {p: np.zeros(group.terms.survivors, np.float32) for p in group.terms.cohort}


def _share(run, p: int, request: bytes) -> object:
    return party.share(run.group.identities[p], run.group.roster, run.states[p], request)


def _sign(run, p: int, request: bytes):
    return party.sign_alive(run.group.identities[p], run.states[p], request)


def _reveal(run, p: int, request: bytes) -> object:
    return party.reveal(run.group.identities[p], run.group.roster, run.states[p], request)
