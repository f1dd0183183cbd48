"""Whoever runs one party's SuperNode tries to be another party, or to use another's session."""

import shutil

import pytest
from guarded import Parties, base_arrays, digest_of, learner, quick_keys, training_content

from dare_agg.errors import ProtocolError, StateError
from dare_agg.flower.secure.records import (
    Introduce,
    Proof,
    Step,
    answer_record,
    content_of,
    hello_input,
    read_message,
)
from dare_agg.secure.identity import new_identity, read_identity, verify
from dare_agg.secure.roster import make_roster, sign_roster, write_roster
from dare_agg.secure.server import SecureServer
from dare_agg.secure.vault import Vault


@pytest.fixture
def parties(tmp_path, monkeypatch):
    quick_keys(monkeypatch)
    return Parties(tmp_path, learner())


def prove(parties, party, node=None):
    challenge = b"c" * 32
    reply = parties.send(party, content_of(Introduce(challenge=challenge)), "query.secure")
    proof = Proof.read(answer_record(reply))
    said = hello_input(challenge, party if node is None else node)
    verify(proof.public, proof.signature, said, "node")
    return parties.roster.id_of(proof.public)


def advert_of(parties, party, terms):
    content = training_content(terms, base_arrays(), {"lr": 0.01})
    reply = parties.send(party, content, "train")
    answer_record(reply)
    return read_message(reply.content, 1 << 30)


@pytest.fixture
def terms(parties):
    arrays = base_arrays()
    return parties.terms(arrays, training=digest_of(arrays, {"lr": 0.01}, {}))


def test_a_proof_passed_on_to_another_node(parties):
    assert prove(parties, parties.ids[0]) == parties.ids[0]
    with pytest.raises(ProtocolError):
        prove(parties, parties.ids[0], node=parties.ids[1])


def test_two_answers_under_one_identity(parties, terms):
    """One operator copies its key to a second node: the second advert of a party is refused."""
    first, second = parties.ids[:2]
    parties.nodes[second] = {
        **parties.nodes[first],
        "secure-state": parties.nodes[first]["secure-state"] + "2",
    }
    server = SecureServer(terms, parties.roster)
    server.take(advert_of(parties, first, terms))
    with pytest.raises(ProtocolError) as caught:
        server.take(advert_of(parties, second, terms))
    assert caught.value.reason == "duplicate"


def test_the_key_of_another_without_its_passphrase(parties, tmp_path):
    mine, other = parties.ids[:2]
    (tmp_path / "guess").write_text("a guessed passphrase")
    (tmp_path / "guess").chmod(0o600)
    parties.nodes[mine] = {
        **parties.nodes[other], "secure-passphrase-file": str(tmp_path / "guess")
    }  # fmt: skip
    reply = parties.send(mine, content_of(Introduce(challenge=b"c" * 32)), "query.secure")
    assert reply.content["dare.secure"]["refused"] == "refused"


def test_the_sealed_session_of_another_party(parties, terms, tmp_path):
    """Its files copied into one's own state open for its identity alone."""
    mine, other = parties.ids[:2]
    advert_of(parties, other, terms)
    identity = read_identity(parties.path_of(other), parties.passphrase)
    thief = read_identity(parties.path_of(mine), parties.passphrase)
    theirs = Vault(tmp_path / "state", identity)
    assert theirs.holds(terms.session, "state") and theirs.holds(terms.session, "delta")
    own = Vault(tmp_path / "stolen", thief)
    # Under the folder that the thief's own key names.
    shutil.copytree(theirs.folder, own.folder)
    with pytest.raises((StateError, ProtocolError)):
        own.get(terms.session, "state")


def test_a_stage_answered_before_its_time(parties, terms):
    party = parties.ids[0]
    advert_of(parties, party, terms)
    for stage in ("contribute", "sign", "reveal"):
        reply = parties.send(
            party, content_of(Step(stage=stage, session=terms.session), b"x"), "query.secure"
        )
        assert "refused" in reply.content["dare.secure"]
        assert "dare.secure.message" not in reply.content
        advert_of(parties, party, terms)  # a refusal ended the session


def test_a_roster_of_the_operators_own_making(parties, tmp_path):
    """A member adds itself twice, or drops others: the coordinator's signature is missing."""
    me = new_identity("me")
    others = [(f"party {number}", new_identity("x").public) for number in range(3)]
    forged = sign_roster(make_roster("hospitals", [*others, ("me", me.public)]), me)
    write_roster(tmp_path / "forged.json", forged)
    party = parties.ids[0]
    parties.nodes[party] = {**parties.nodes[party], "secure-roster": str(tmp_path / "forged.json")}
    reply = parties.send(party, content_of(Introduce(challenge=b"c" * 32)), "query.secure")
    assert "signature" not in reply.content["dare.secure"]
