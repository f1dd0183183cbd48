"""A party's state as canonical bytes, to be sealed between two messages."""

from __future__ import annotations

from dare_agg.errors import ProtocolError
from dare_agg.secure.client import STAGES, ClientState
from dare_agg.secure.encoding import Reader, blob, identifiers, u8, u32
from dare_agg.secure.roster import MAX_MEMBERS
from dare_agg.secure.terms import decode_terms

_MOST = 1 << 28


def encode_state(state: ClientState) -> bytes:
    """All fields in their order; it holds secrets in clear and is for a `Vault` alone."""
    parts = [
        blob(state.terms.encode()),
        u32(state.party),
        u8(STAGES.index(state.stage)),
        *(
            blob(secret)
            for secret in (
                state.own,
                state.sealing_secret,
                state.mask_seed,
                state.self_seed,
                state.nonce,
                state.keys_digest,
                state.shares_digest,
                state.alive_digest,
            )
        ),
        identifiers(state.drawn),
        identifiers(state.shared),
        identifiers(state.alive),
        u32(len(state.adverts)),
        *(blob(advert) for advert in state.adverts),
        u32(len(state.openers)),
        *(u32(party) + blob(key) for party, key in state.openers),
        u32(len(state.held)),
        *(u32(party) + blob(mask) + blob(own) for party, mask, own in state.held),
    ]
    return b"".join(parts)


def decode_state(data: bytes) -> ClientState:
    """Read what `encode_state` wrote. Raises `ProtocolError`."""
    read = Reader(data, "kept state")
    terms = decode_terms(read.blob(_MOST))
    party = read.u32()
    stage = read.u8()
    if stage >= len(STAGES):
        raise ProtocolError(f"kept state: stage {stage} of {len(STAGES)}", reason="state")
    own, sealing, mask_seed, self_seed, nonce, keys, shares, alive_digest = (
        read.blob(_MOST) for _ in range(8)
    )
    drawn, shared, alive = (read.identifiers(MAX_MEMBERS) for _ in range(3))
    adverts = tuple(read.blob(_MOST) for _ in range(read.count(4, MAX_MEMBERS)))
    openers = tuple((read.u32(), read.blob(_MOST)) for _ in range(read.count(8, MAX_MEMBERS)))
    held = tuple(
        (read.u32(), read.blob(_MOST), read.blob(_MOST)) for _ in range(read.count(12, MAX_MEMBERS))
    )
    read.done()
    return ClientState(
        terms=terms,
        party=party,
        stage=STAGES[stage],
        own=own,
        sealing_secret=sealing,
        mask_seed=mask_seed,
        self_seed=self_seed,
        nonce=nonce,
        adverts=adverts,
        drawn=drawn,
        openers=openers,
        shared=shared,
        held=held,
        keys_digest=keys,
        shares_digest=shares,
        alive=alive,
        alive_digest=alive_digest,
    )
