"""A malicious server fails, a passive one learns nothing."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from parties import BASE, consortium, seeded, session, step

from dare_agg.errors import ProtocolError
from dare_agg.secure import SecureServer
from dare_agg.secure import client as party
from dare_agg.secure import messages as wire
from dare_agg.secure.ledger import FileLedger, MemoryLedger
from dare_agg.secure.packing import pack_party
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
    policy = party.SecurePolicy(told.base, told.layout)
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


def test_corrupted_messages_never_pass() -> None:
    """A flipped bit anywhere in any message is a typed refusal, by server or party."""
    run = session(consortium(3), "reveals")
    terms, roster = run.group.terms, run.group.roster
    _, advert = party.advertise(run.group.identities[1], roster, terms, run.group.policy())
    for at in range(0, len(advert), 7):
        bad = bytearray(advert)
        bad[at] ^= 4
        with pytest.raises(ProtocolError):
            wire.decode_advert(bytes(bad), terms, roster)
    for cut in range(len(advert)):
        with pytest.raises(ProtocolError):
            wire.decode_advert(advert[:cut], terms, roster)
    assert terms.base == BASE


def _share(run, p: int, request: bytes) -> object:
    return party.share(run.group.identities[p], run.group.roster, run.states[p], request)


def _sign(run, p: int, request: bytes):
    return party.sign_alive(run.group.identities[p], run.states[p], request)


def _reveal(run, p: int, request: bytes) -> object:
    return party.reveal(run.group.identities[p], run.group.roster, run.states[p], request)
