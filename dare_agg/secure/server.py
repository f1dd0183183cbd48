"""The server's side of a secure sum: collects answers, learns the sum and nothing else.

Stages run in order: adverts, shares, vectors, signatures, reveals. Within one, `take` an
answer at a time, in any order; `close` it when all are there or time is up, which gives the
requests of the next. A bad answer raises `ProtocolError` and changes nothing, so the caller
notes the rejection and goes on; a party that stays away is out from that stage on. Memory is
O(words + parties²).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from dare_agg.codec.mask import Mask
from dare_agg.errors import ConfigError, ProtocolError
from dare_agg.secure import messages as wire
from dare_agg.secure.aggregate import Sums
from dare_agg.secure.keys import (
    agree,
    masking_secret,
    nonce_commitment,
    pair_mask_key,
    private_key,
    public_of,
    self_commitment,
    self_mask_key,
)
from dare_agg.secure.packing import unpack_sums
from dare_agg.secure.roster import Roster
from dare_agg.secure.shamir import correct, recover
from dare_agg.secure.stream import (
    Words,
    add_mask,
    cut_words,
    packed_bytes,
    unpack_words,
    word_type,
)
from dare_agg.secure.terms import SecureTerms

LOG = logging.getLogger(__name__)
SERVER_STAGES = ("adverts", "shares", "vectors", "signatures", "reveals", "finished")


@dataclass
class SecureServer:
    """One secure sum. Make it with the terms and the roster; send `SecureTerms.encode` to the
    cohort; then ``take``/``close`` each stage and `finish`."""

    terms: SecureTerms
    roster: Roster
    stage: str = "adverts"
    _adverts: dict[int, wire.Advert] = field(default_factory=dict, repr=False)
    _uploads: dict[int, wire.ShareUpload] = field(default_factory=dict, repr=False)
    _vectors: set[int] = field(default_factory=set, repr=False)
    _signatures: dict[int, bytes] = field(default_factory=dict, repr=False)
    _reveals: dict[int, dict[int, bytes]] = field(default_factory=dict, repr=False)
    _holders: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _keys_digest: bytes = b""
    _shares_digest: bytes = b""
    _alive_digest: bytes = b""
    _alive: tuple[int, ...] = ()
    _dead: tuple[int, ...] = ()
    _sum: Words | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.terms.roster != self.roster.digest:
            raise ConfigError("the terms were made for another roster; make them anew")

    @property
    def mask(self) -> Mask:
        """The session's mask, known once the shares are closed."""
        if not self._shares_digest:
            raise ProtocolError("the mask is not yet agreed on", reason="stage")
        return self.terms.mask(self._shares_digest)

    @property
    def alive(self) -> tuple[int, ...]:
        """Parties in the sum, known once the vectors are closed."""
        return self._alive

    def of(self, party: int) -> Self:
        """The sum that a party takes part in: this one."""
        return self

    def take(self, message: bytes) -> int:
        """Check one answer to the stage's request and keep it; returns the party's id.

        Raises `ProtocolError` with the reason for an answer that is refused.
        """
        takers: Mapping[str, Callable[[bytes], int]] = {
            "adverts": self._take_advert,
            "shares": self._take_shares,
            "vectors": self._take_vector,
            "signatures": self._take_signature,
            "reveals": self._take_reveal,
        }
        if self.stage not in takers:
            raise ProtocolError("the sum is finished; nothing more is taken", reason="stage")
        return takers[self.stage](message)

    def close(self) -> dict[int, bytes]:
        """End the stage; returns the next request for each party that still takes part.

        Raises `ProtocolError` (reason "threshold") when too few are left.
        """
        closers: Mapping[str, Callable[[], dict[int, bytes]]] = {
            "adverts": self._close_adverts,
            "shares": self._close_shares,
            "vectors": self._close_vectors,
            "signatures": self._close_signatures,
        }
        if self.stage not in closers:
            raise ProtocolError(f"stage {self.stage!r} has no next request", reason="stage")
        requests = closers[self.stage]()
        self.stage = SERVER_STAGES[SERVER_STAGES.index(self.stage) + 1]
        return requests

    def _once(self, party: int, seen: Mapping[int, object] | set[int], among: object) -> None:
        if party in seen:
            raise ProtocolError(
                f"party {party} answered stage {self.stage!r} twice; the first answer stays",
                reason="duplicate",
            )
        if among is not None and party not in among:  # type: ignore[operator]
            raise ProtocolError(
                f"party {party} was not asked in stage {self.stage!r}", reason="cohort"
            )

    def _enough(self, count: int) -> None:
        if count < self.terms.threshold:
            raise ProtocolError(
                f"{count} of {len(self.terms.cohort)} parties answered stage {self.stage!r}; "
                f"{self.terms.threshold} are needed: the round ends, no data was shown",
                reason="threshold",
            )

    def _take_advert(self, message: bytes) -> int:
        advert = wire.decode_advert(message, self.terms, self.roster)
        self._once(advert.party, self._adverts, None)
        used = {k for a in self._adverts.values() for k in (a.sealing_key, a.masking_key)}
        if used & {advert.sealing_key, advert.masking_key} or (
            advert.sealing_key == advert.masking_key
        ):
            raise ProtocolError(f"party {advert.party} sent a key twice", reason="duplicate")
        probe = X25519PrivateKey.generate()
        for key in (advert.sealing_key, advert.masking_key):
            agree(probe, key, advert.party)
        self._adverts[advert.party] = advert
        return advert.party

    def _close_adverts(self) -> dict[int, bytes]:
        self._enough(len(self._adverts))
        adverts = [self._adverts[party] for party in sorted(self._adverts)]
        self._keys_digest = wire.keys_digest(self.terms, tuple(adverts))
        parties = tuple(sorted(self._adverts))
        request = wire.encode_keys(self.terms.session, adverts)
        return dict.fromkeys(parties, request)

    def _take_shares(self, message: bytes) -> int:
        upload = wire.decode_shares(message, self.terms, self.roster)
        party = upload.party
        self._once(party, self._uploads, self._adverts)
        commitment = nonce_commitment(upload.nonce, self.terms.session, party)
        if commitment != self._adverts[party].nonce_commitment:
            raise ProtocolError(
                f"nonce of party {party} is not the one it committed to", reason="nonce"
            )
        drawn = {receiver for receiver, _ in upload.sealed}
        due = min(self.terms.degree, len(self._adverts) - 1)
        if len(drawn) != due or party in drawn or not drawn <= self._adverts.keys():
            raise ProtocolError(
                f"party {party} dealt shares to {len(drawn)} parties; {due} others of the key "
                "list are due",
                reason="shares",
            )
        self._uploads[party] = upload
        self._holders[party] = tuple(sorted((party, *drawn)))
        return party

    def _close_shares(self) -> dict[int, bytes]:
        self._enough(len(self._uploads))
        parties = sorted(self._uploads)
        nonces = tuple((party, self._uploads[party].nonce) for party in parties)
        self._shares_digest = wire.shares_digest(self._keys_digest, nonces)
        inbox: dict[int, list[tuple[int, bytes]]] = {party: [] for party in parties}
        for sender in parties:
            for receiver, data in self._uploads[sender].sealed:
                if receiver in inbox:
                    inbox[receiver].append((sender, data))
        self._sum = np.zeros(self.terms.words, word_type(self.terms.quantiser.word_bits))
        return {
            party: wire.encode_delivery(
                self.terms.session, wire.Delivery(nonces, tuple(inbox[party]))
            )
            for party in parties
        }

    def _take_vector(self, message: bytes) -> int:
        assert self._sum is not None
        bits = self.terms.quantiser.word_bits
        limit = packed_bytes(self.terms.words, bits)
        upload = wire.decode_vector(message, self.terms, self.roster, limit)
        self._once(upload.party, self._vectors, self._uploads)
        if upload.shares != self._shares_digest:
            raise ProtocolError(
                f"party {upload.party} masked for another set of parties", reason="session"
            )
        try:
            words = unpack_words(upload.packed, self.terms.words, bits)
        except ValueError as error:
            raise ProtocolError(
                f"masked vector of party {upload.party}: {error}", reason="malformed"
            ) from error
        self._sum += words
        self._vectors.add(upload.party)
        return upload.party

    def _close_vectors(self) -> dict[int, bytes]:
        self._enough(len(self._vectors))
        self._alive = tuple(sorted(self._vectors))
        self._dead = tuple(sorted(set(self._uploads) - self._vectors))
        self._alive_digest = wire.alive_digest(self._shares_digest, self._alive, self._dead)
        request = wire.encode_alive_list(self.terms.session, self._alive, self._dead)
        return dict.fromkeys(self._alive, request)

    def _take_signature(self, message: bytes) -> int:
        party, signature = wire.decode_alive(message, self.terms, self.roster, self._alive_digest)
        self._once(party, self._signatures, self._vectors)
        self._signatures[party] = signature
        return party

    def _close_signatures(self) -> dict[int, bytes]:
        self._enough(len(self._signatures))
        signatures = sorted(self._signatures.items())
        # As many as a party asks for: more would only cost it time.
        chosen = signatures[: self.terms.threshold]
        request = wire.encode_signatures(self.terms.session, self._alive, self._dead, chosen)
        return {party: request for party, _ in signatures}

    def _take_reveal(self, message: bytes) -> int:
        party, shares = wire.decode_reveal(message, self.terms, self.roster, self._alive_digest)
        self._once(party, self._reveals, self._signatures)
        wanted = [o for o in self._uploads if party in self._holders[o]]
        if [owner for owner, _ in shares] != sorted(wanted):
            raise ProtocolError(
                f"party {party} revealed shares of other parties than its neighbours",
                reason="shares",
            )
        self._reveals[party] = dict(shares)
        return party

    def finish(self) -> Sums:
        """Recover the masks, take them off, check the sum.

        Raises `ProtocolError`: reason "threshold" when too few revealed, "shares" when
        someone's secret cannot be recovered, "words" when the sum is malformed.
        """
        if self.stage != "reveals":
            raise ProtocolError(f"stage {self.stage!r} cannot be finished", reason="stage")
        self._enough(len(self._reveals))
        assert self._sum is not None
        # Recover everything first: a failure leaves the sum masked.
        self_seeds = {party: self._recover_self(party) for party in self._alive}
        mask_secrets = {party: self._recover_masking(party) for party in self._dead}
        for party, seed in self_seeds.items():
            add_mask(self._sum, self_mask_key(seed, self._shares_digest, party), negative=True)
        for party, secret in mask_secrets.items():
            private = private_key(secret)
            drew = {other for other in self._vectors if party in self._holders[other]}
            for other in sorted(drew | {*self._holders[party]}):
                if other in self._vectors:
                    agreed = agree(private, self._adverts[other].masking_key, other)
                    key = pair_mask_key(agreed, self._shares_digest, party, other)
                    # The other added it where its id is the lower one.
                    add_mask(self._sum, key, negative=other < party)
        cut_words(self._sum, self.terms.quantiser.word_bits)
        self.stage = "finished"
        sums = unpack_sums(self._sum, self.terms.quantiser, len(self._alive))
        if sums.parties != len(self._alive):
            raise ProtocolError("the sum counts other parties than took part", reason="words")
        check_weight_sum(sums, self.terms)
        return sums

    def _recover_self(self, party: int) -> bytes:
        def fits(seed: bytes) -> bool:
            commitment = self_commitment(seed, self.terms.session, party)
            return commitment == self._adverts[party].self_commitment

        return self._recover(party, fits)

    def _recover_masking(self, party: int) -> bytes:
        def fits(seed: bytes) -> bool:
            secret = masking_secret(seed, self.terms.session, party)
            return public_of(secret) == self._adverts[party].masking_key

        return masking_secret(self._recover(party, fits), self.terms.session, party)

    def _recover(self, party: int, fits: Callable[[bytes], bool]) -> bytes:
        """Recover a party's seed; spare shares correct half as many wrong ones."""
        need = self.terms.share_threshold
        holders = [h for h in self._holders[party] if h in self._reveals]
        if len(holders) < need:
            raise ProtocolError(
                f"{len(holders)} parties revealed shares of party {party}; {need} are needed: "
                "the sum stays masked",
                reason="threshold",
            )
        points = [self.terms.cohort.index(h) + 1 for h in holders]
        shares = [self._reveals[h][party] for h in holders]
        with contextlib.suppress(ProtocolError):
            if fits(seed := recover(points[:need], shares[:need])):
                return seed
        with contextlib.suppress(ProtocolError):
            if fits(seed := correct(points, shares, need)):
                LOG.warning("some shares of party %d were wrong and have been corrected", party)
                return seed
        raise ProtocolError(
            f"the shares of party {party} do not recover its secret; it dealt or others "
            "revealed wrong ones: the sum stays masked",
            reason="shares",
        )


def check_weight_sum(sums: Sums, terms: SecureTerms) -> None:
    """Refuse a sum of weights that so many parties cannot have.

    Equal weights are exactly equal; weights by examples lie between the signed bounds. One
    party that sends another weight would else divide the whole mean by what it likes.
    Raises `ProtocolError` (reason "words").
    """
    least, most = (sums.parties * unit for unit in terms.weight_units)
    if not least <= sums.weight <= most:
        raise ProtocolError(
            f"the weights add up to {sums.weight}; {sums.parties} parties have {least} to {most}: "
            "a party sent another weight than it may, nothing was merged",
            reason="words",
        )
