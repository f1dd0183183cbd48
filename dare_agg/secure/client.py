"""A party's side of a secure sum: pure steps from (state, message) to (state, answer).

The five answers follow Bonawitz et al. 2017 (section 4, malicious setting), with a graph as
in Bell et al. 2020: `advertise`, `share`, `contribute` (after `open_shares`), `sign_alive`,
`reveal`. Each step is taken once. Every refusal is a `ProtocolError` with a reason, after
which the caller drops the state: the party takes no further part in the session.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from dare_agg.codec.mask import Mask
from dare_agg.errors import ConfigError, ProtocolError
from dare_agg.secure import messages as wire
from dare_agg.secure.graph import draw_neighbours
from dare_agg.secure.identity import Identity, verify
from dare_agg.secure.keys import (
    agree,
    masking_secret,
    nonce_commitment,
    pair_mask_key,
    private_key,
    public_of,
    sealing_context,
    sealing_key,
    self_commitment,
    self_mask_key,
)
from dare_agg.secure.packing import pack_party, pack_private
from dare_agg.secure.policy import SecurePolicy, check_group, check_terms
from dare_agg.secure.roster import Roster
from dare_agg.secure.shamir import SECRET_BYTES, SHARE_BYTES, share_value, split
from dare_agg.secure.stream import add_mask, cut_words, pack_words
from dare_agg.secure.terms import SecureTerms
from dare_agg.vectors.layout import FloatVector

STAGES = ("advertised", "shared", "opened", "contributed", "signed", "revealed")
_NO_NONCE = bytes(12)

Random = Callable[[int], bytes]


@dataclass(frozen=True)
class ClientState:
    """A party's secrets between two messages; never printed, sealed before it is stored.

    ``own`` is its advert, ``adverts`` all of them; ``drawn`` are the parties it deals shares
    to, ``openers`` the keys of those that may come to it, ``held`` maps who dealt to it (and
    itself) to the two shares. Secrets are dropped at the step that last needs them.
    """

    terms: SecureTerms
    party: int
    stage: str
    own: bytes = field(repr=False)
    sealing_secret: bytes = field(repr=False)
    mask_seed: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)
    nonce: bytes = field(repr=False)
    adverts: tuple[bytes, ...] = field(default=(), repr=False)
    drawn: tuple[int, ...] = ()
    openers: tuple[tuple[int, bytes], ...] = field(default=(), repr=False)
    shared: tuple[int, ...] = ()
    held: tuple[tuple[int, bytes, bytes], ...] = field(default=(), repr=False)
    keys_digest: bytes = b""
    shares_digest: bytes = b""
    alive: tuple[int, ...] = ()
    alive_digest: bytes = b""

    @property
    def mask(self) -> Mask:
        """The session's mask, known once shares are open."""
        if not self.shares_digest:
            raise ProtocolError("the mask is not yet agreed on", reason="stage")
        return self.terms.mask(self.shares_digest)


def advertise(
    identity: Identity,
    roster: Roster,
    terms: SecureTerms,
    policy: SecurePolicy,
    random: Random = os.urandom,
) -> tuple[ClientState, bytes]:
    """Check the terms and answer with signed one-time keys and commitments."""
    check_terms(terms, roster, policy)
    party = roster.id_of(identity.public)
    check_group(terms, roster, party)
    if party not in terms.cohort:
        raise ProtocolError(f"party {party} is not in the cohort it was asked for", reason="cohort")
    sealing_secret, nonce = random(32), random(wire.NONCE_BYTES)
    mask_seed, self_seed = random(SECRET_BYTES), random(SECRET_BYTES)
    message = wire.encode_advert(
        identity,
        terms.session,
        party,
        public_of(sealing_secret),
        public_of(masking_secret(mask_seed, terms.session, party)),
        nonce_commitment(nonce, terms.session, party),
        self_commitment(self_seed, terms.session, party),
    )
    state = ClientState(
        terms, party, "advertised", message, sealing_secret, mask_seed, self_seed, nonce
    )
    return state, message


def share(
    identity: Identity,
    roster: Roster,
    state: ClientState,
    request: bytes,
    random: Random = os.urandom,
) -> tuple[ClientState, bytes]:
    """Verify everyone's keys and answer with one's secrets, shared and sealed.

    Raises `ProtocolError`: too few parties or holders ("threshold"), own keys missing ("own-keys").
    """
    _expect(state, "advertised")
    terms, me = state.terms, state.party
    adverts = wire.decode_keys(request, terms, roster)
    if len(adverts) < terms.threshold:
        raise ProtocolError(
            f"{len(adverts)} parties advertised keys; {terms.threshold} are needed: the round ends",
            reason="threshold",
        )
    if state.own not in [advert.data for advert in adverts]:
        raise ProtocolError("the key list lacks this party's own keys: refused", reason="own-keys")
    digest = wire.keys_digest(terms, adverts)
    keys = {advert.party: advert.sealing_key for advert in adverts}
    drawn = draw_neighbours(me, tuple(keys), terms.degree, random)
    holders = sorted((me, *drawn))
    if len(holders) < terms.share_threshold:
        raise ProtocolError(
            f"{len(holders)} parties would hold shares; {terms.share_threshold} are needed",
            reason="threshold",
        )
    points = [terms.cohort.index(holder) + 1 for holder in holders]
    mask_shares = split(state.mask_seed, points, terms.share_threshold, random)
    self_shares = split(state.self_seed, points, terms.share_threshold, random)
    dealt = dict(zip(holders, zip(mask_shares, self_shares, strict=True), strict=True))
    sealed, openers = [], []
    secret = private_key(state.sealing_secret)
    for other, key in keys.items():
        if other == me:
            continue
        agreed = agree(secret, key, other)
        openers.append((other, sealing_key(agreed, digest, other, me)))
        if other in dealt:
            box = ChaCha20Poly1305(sealing_key(agreed, digest, me, other))
            context = sealing_context(terms.session, me, other)
            sealed.append((other, box.encrypt(_NO_NONCE, b"".join(dealt[other]), context)))
    message = wire.encode_shares(identity, terms.session, me, state.nonce, sealed)
    state = replace(
        state,
        stage="shared",
        adverts=tuple(advert.data for advert in adverts),
        drawn=drawn,
        openers=tuple(openers),
        held=((me, *dealt[me]),),
        keys_digest=digest,
        sealing_secret=b"",
    )
    return state, message


def open_shares(state: ClientState, request: bytes) -> ClientState:
    """Open the shares of one's neighbours; from here on the mask is known.

    Raises `ProtocolError`: too few shared ("threshold"), other parties ("cohort"), nonces or shares
    that do not fit ("nonce", "shares").
    """
    _expect(state, "shared")
    terms, me = state.terms, state.party
    delivery = wire.decode_delivery(request, terms)
    adverts = _adverts(state)
    shared = tuple(party for party, _ in delivery.nonces)
    if me not in shared or not set(shared) <= set(adverts):
        raise ProtocolError("share delivery names other parties than the key list", reason="cohort")
    if len(shared) < terms.threshold:
        raise ProtocolError(
            f"{len(shared)} parties shared keys; {terms.threshold} are needed: the round ends",
            reason="threshold",
        )
    for party, nonce in delivery.nonces:
        if nonce_commitment(nonce, terms.session, party) != adverts[party].nonce_commitment:
            raise ProtocolError(
                f"nonce of party {party} is not the one it committed to", reason="nonce"
            )
    senders, others = {party for party, _ in delivery.sealed}, {*shared} - {me}
    # Who drew this party it learns here; where all draw all, none may be missing.
    complete = terms.degree >= len(adverts) - 1
    if not senders <= others or (complete and senders != others):
        raise ProtocolError(
            "share delivery lacks a neighbour's shares or has others", reason="shares"
        )
    held, openers = list(state.held), dict(state.openers)
    for party, data in delivery.sealed:
        box = ChaCha20Poly1305(openers[party])
        try:
            plain = box.decrypt(_NO_NONCE, data, sealing_context(terms.session, party, me))
        except InvalidTag as error:
            raise ProtocolError(
                f"shares of party {party} do not open: they were altered, replayed, or it saw "
                "another key list: refused",
                reason="shares",
            ) from error
        halves = plain[:SHARE_BYTES], plain[SHARE_BYTES:]
        for half in halves:
            share_value(half)
        held.append((party, *halves))
    return replace(
        state,
        stage="opened",
        shared=shared,
        held=tuple(sorted(held)),
        shares_digest=wire.shares_digest(state.keys_digest, delivery.nonces),
        openers=(),
        nonce=b"",
    )


def contribute(
    identity: Identity,
    state: ClientState,
    values: FloatVector,
    *,
    examples: float = 1.0,
    random: Random = os.urandom,
) -> tuple[ClientState, bytes]:
    """Answer with ``values``, masked: the survivors (``state.mask.gather(delta)``), then the
    dense part and the sketch where the terms have them.

    ``examples`` counts only where the terms weigh by examples. Callers claim the delta in a
    ledger first (`dare_agg.secure.ledger`): this state cannot know of other sessions.

    Raises `ProtocolError` "shape" for another number of values, `ConfigError` for no examples.
    """
    _expect(state, "opened")
    terms, me = state.terms, state.party
    if values.shape != (terms.values,):
        raise ProtocolError(
            f"{values.shape} values; the terms have ({terms.values},)", reason="shape"
        )
    gain = 1.0
    if terms.weighting == "examples":
        if not (np.isfinite(examples) and examples > 0):
            raise ConfigError(f"examples = {examples}; a number above 0 is needed")
        gain = min(max(float(examples), terms.min_weight), terms.max_weight) / terms.max_weight
    if terms.variance:
        words = pack_private(values, state.mask, terms.quantiser, (random(16), random(16)))
    else:
        words = pack_party(values, terms.quantiser, random(16), gain)
    add_mask(words, self_mask_key(state.self_seed, state.shares_digest, me))
    secret = private_key(masking_secret(state.mask_seed, terms.session, me))
    adverts = _adverts(state)
    dealers = {party for party, _, _ in state.held}
    for party in sorted(({*state.drawn} | dealers) & {*state.shared} - {me}):
        agreed = agree(secret, adverts[party].masking_key, party)
        key = pair_mask_key(agreed, state.shares_digest, me, party)
        add_mask(words, key, negative=me > party)
    bits = terms.quantiser.word_bits
    packed = pack_words(cut_words(words, bits), bits)
    message = wire.encode_vector(identity, terms.session, me, state.shares_digest, packed)
    return replace(state, stage="contributed", mask_seed=b"", self_seed=b""), message


def sign_alive(identity: Identity, state: ClientState, request: bytes) -> tuple[ClientState, bytes]:
    """Sign the set of those whose vectors arrived: once, and only a possible one."""
    _expect(state, "contributed")
    alive, dead = wire.decode_alive_list(request, state.terms)
    _check_alive(state, alive, dead)
    digest = wire.alive_digest(state.shares_digest, alive, dead)
    body = wire.alive_body(state.terms.session, state.party, digest)
    state = replace(state, stage="signed", alive=alive, alive_digest=digest)
    return state, wire.signed(identity, body)


def _check_alive(state: ClientState, alive: tuple[int, ...], dead: tuple[int, ...]) -> None:
    both = set(alive) & set(dead)
    if both:
        raise ProtocolError(
            f"parties {sorted(both)[:8]} are listed alive and dead; both their secrets would "
            "show their data: refused",
            reason="overlap",
        )
    if set(alive) | set(dead) != set(state.shared):
        raise ProtocolError("alive and dead are not the parties who shared keys", reason="cohort")
    if state.party not in alive:
        raise ProtocolError("this party is listed dead and is not: refused", reason="alive")
    if len(alive) < state.terms.threshold:
        raise ProtocolError(
            f"{len(alive)} parties are alive; {state.terms.threshold} are needed: nothing is "
            "unmasked",
            reason="threshold",
        )


def reveal(
    identity: Identity, roster: Roster, state: ClientState, request: bytes
) -> tuple[ClientState, bytes]:
    """Reveal one share a party: of the own mask of the alive, of the pair masks of the dead.

    Only against enough signatures over the very set this party has signed.

    Raises `ProtocolError` for another set than was signed ("alive") or too few signatures
    ("threshold"): nothing is revealed then.
    """
    _expect(state, "signed")
    terms = state.terms
    alive, dead, signatures = wire.decode_signatures(request, terms)
    if wire.alive_digest(state.shares_digest, alive, dead) != state.alive_digest:
        raise ProtocolError(
            "the server asks to unmask another set than this party signed: refused",
            reason="alive",
        )
    for party, signature in signatures:
        if party not in alive:
            raise ProtocolError(f"party {party} signed and is not alive", reason="signature")
        body = wire.alive_body(terms.session, party, state.alive_digest)
        verify(
            roster[party].public, signature, wire.signing_input(body), f"party {party} (alive set)"
        )
    if len(signatures) < terms.threshold:
        raise ProtocolError(
            f"{len(signatures)} parties signed the alive set; {terms.threshold} are needed: "
            "nothing is unmasked",
            reason="threshold",
        )
    stayed = set(alive)
    shares = [
        (owner, self_share if owner in stayed else mask_share)
        for owner, mask_share, self_share in state.held
    ]
    message = wire.encode_reveal(identity, terms.session, state.party, state.alive_digest, shares)
    return replace(state, stage="revealed", held=(), adverts=()), message


def _expect(state: ClientState, stage: str) -> None:
    if state.stage != stage:
        raise ProtocolError(
            f"party {state.party} has {state.stage} already or not yet {stage}; each step is "
            "taken once in a session: refused",
            reason="stage",
        )


def _adverts(state: ClientState) -> dict[int, wire.Advert]:
    """Adverts by party, verified when they came."""
    return {advert.party: advert for advert in map(wire.split_advert, state.adverts)}
