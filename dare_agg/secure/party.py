"""A party with its files: answers requests, each of which may come to a new process.

Between two requests the session's secrets lie in the party's `Vault`. A step's new state is
on disk before its answer is returned, so no crash or repeated message makes a party take a
step twice. A refusal (`ProtocolError`) ends the session for this party: its secrets go.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dare_agg.codec.mask import Mask
from dare_agg.errors import DareError, LayoutError, PrivacyError, ProtocolError
from dare_agg.secure import client
from dare_agg.secure.guard import PrivacyGuard
from dare_agg.secure.identity import Identity
from dare_agg.secure.kept_state import decode_state, encode_state
from dare_agg.secure.ledger import Ledger
from dare_agg.secure.policy import SecurePolicy, check_group, check_terms
from dare_agg.secure.roster import Roster
from dare_agg.secure.terms import SecureTerms, decode_terms
from dare_agg.secure.vault import Vault
from dare_agg.vectors.layout import FloatVector

# The requests that follow `Party.advertise`, in their order.
REQUESTS = ("share", "contribute", "sign", "reveal")
_STATE, _DELTA = "state", "delta"
_LENGTHS = struct.Struct("<dQ")

Deltas = Callable[[SecureTerms], "Contribution"]


@dataclass(frozen=True)
class Contribution:
    """What a party puts in: its full delta, the dense part after it, and its examples.

    ``sketch`` is what it adds where Gram matrices are summed (`dare_agg.secure.sketch`).

    ``tensors`` names the model it was taken from, where that may be asked for again
    (`dare_agg.secure.ledger.tensor_claim`).
    """

    delta: FloatVector = field(repr=False)
    dense: FloatVector = field(repr=False, default_factory=lambda: np.empty(0, np.float32))
    examples: float = 1.0
    tensors: tuple[bytes, ...] = field(repr=False, default=())
    sketch: FloatVector = field(repr=False, default_factory=lambda: np.empty(0, np.float32))


@dataclass(frozen=True)
class Party:
    """One member of a roster, with what outlives a process. ``roster`` has been checked.

    A delta whose norm is not above ``min_norm`` goes into no sum: a party that stands still
    hides nobody, and one that is made to stand still is being used to show another. Noise hides
    both: noised sums, which go by the ``guard``, look at no norm.
    """

    identity: Identity
    roster: Roster
    vault: Vault
    ledger: Ledger
    min_norm: float = 0.0
    guard: PrivacyGuard | None = None
    random: client.Random = field(default=os.urandom, repr=False)

    def advertise(
        self, terms: bytes, policy: SecurePolicy, contribution: Contribution | None = None
    ) -> bytes:
        """Check the terms and answer with one-time keys; earlier sessions are over.

        A ``contribution`` given here is kept, sealed, until the session's mask is known.
        """
        read = decode_terms(terms)
        self._check_privacy(read)
        state, answer = client.advertise(self.identity, self.roster, read, policy, self.random)
        with self.vault.alone():
            self.vault.drop_all()
            if contribution is not None:
                self._check_moved(contribution, read)
                self.vault.put(read.session, _DELTA, _encode(contribution))
            self._keep(state)
        return answer

    def check(self, terms: bytes, policy: SecurePolicy) -> None:
        """Refuse bad terms before anything is trained for them."""
        read = decode_terms(terms)
        check_terms(read, self.roster, policy)
        check_group(read, self.roster, self.roster.id_of(self.identity.public))
        self._check_privacy(read)

    def answer(
        self, stage: str, session: bytes, request: bytes, deltas: Deltas | None = None
    ) -> bytes:
        """Answer a request of `REQUESTS`; ``deltas`` gives what was not kept at the start."""
        with self.vault.alone():
            return self._answer(stage, session, request, deltas)

    def _answer(self, stage: str, session: bytes, request: bytes, deltas: Deltas | None) -> bytes:
        state = decode_state(self.vault.get(session, _STATE))
        try:
            if stage == "share":
                state, answer = client.share(
                    self.identity, self.roster, state, request, self.random
                )
            elif stage == "contribute":
                state, answer = self._contribute(state, request, deltas)
            elif stage == "sign":
                state, answer = client.sign_alive(self.identity, state, request)
                # On disk before the signature leaves, as a claim is before the vector.
                self.ledger.sign(state.terms, state.alive)
            elif stage == "reveal":
                state, answer = client.reveal(self.identity, self.roster, state, request)
            else:
                raise ProtocolError(f"stage {stage!r:.40} is unknown", reason="stage")
        except DareError:
            self.vault.drop(session)
            raise
        self._keep(state)
        return answer

    def _contribute(
        self, state: client.ClientState, request: bytes, deltas: Deltas | None
    ) -> tuple[client.ClientState, bytes]:
        state = client.open_shares(state, request)
        terms = state.terms
        if deltas is None or self.vault.holds(terms.session, _DELTA):
            given = _decode(self.vault.get(terms.session, _DELTA), terms.dense)
        else:
            given = deltas(terms)
        if given.delta.shape != (terms.size,) or given.dense.shape != (terms.dense,):
            raise LayoutError(
                f"a delta of {given.delta.size} and {given.dense.size} values; the terms have "
                f"{terms.size} and {terms.dense}"
            )
        if given.sketch.shape != (terms.sketch,):
            raise LayoutError(
                f"a sketch of {given.sketch.size} values; the terms have {terms.sketch}"
            )
        self._check_moved(given, terms)
        values = np.concatenate([state.mask.gather(given.delta), given.dense, given.sketch])
        state, answer = client.contribute(
            self.identity, state, values, examples=given.examples, random=self.random
        )
        # Claimed last, so that a refusal above does not use the delta up; before it leaves.
        self.ledger.claim(terms, np.concatenate([given.delta, given.dense]), given.tensors)
        if self.guard is not None:
            self.guard.charge(terms, self.roster, state.party)
        self.vault.drop(terms.session, _DELTA)
        return state, answer

    def _check_privacy(self, terms: SecureTerms) -> None:
        if self.guard is not None:
            self.guard.check(terms, self.roster, self.roster.id_of(self.identity.public))
        elif terms.variance:
            raise PrivacyError("a party without a budget of its own takes part in no noised sum")

    def _check_moved(self, given: Contribution, terms: SecureTerms) -> None:
        if terms.variance:
            return
        norm = float(np.linalg.norm(given.delta.astype(np.float64)))
        if not norm > self.min_norm:
            raise ProtocolError(
                f"a delta of norm {norm:.3g}; one above {self.min_norm:.3g} is needed "
                "(secure-min-norm): nothing was learnt here",
                reason="norm",
            )

    def seen_through(self, session: bytes) -> tuple[SecureTerms, Mask]:
        """What the result of a session lies on, for a party that has taken its last step."""
        state = decode_state(self.vault.get(session, _STATE))
        if state.stage != "revealed":
            raise ProtocolError(
                f"a result came while this party is at {state.stage!r}; refused", reason="stage"
            )
        return state.terms, state.mask

    def end(self, session: bytes) -> None:
        """Forget a session; nothing of it can be asked for any more."""
        with self.vault.alone():
            self.vault.drop(session)

    def _keep(self, state: client.ClientState) -> None:
        self.vault.put(state.terms.session, _STATE, encode_state(state))


def _encode(given: Contribution) -> bytes:
    head = _LENGTHS.pack(given.examples, given.delta.size)
    return (
        head
        + given.delta.astype("<f4", copy=False).tobytes()
        + given.dense.astype("<f4", copy=False).tobytes()
        + given.sketch.astype("<f4", copy=False).tobytes()
    )


def _decode(data: bytes, dense: int) -> Contribution:
    examples, size = _LENGTHS.unpack_from(data)
    values = np.frombuffer(data, "<f4", offset=_LENGTHS.size).astype(np.float32, copy=False)
    behind = size + dense
    return Contribution(values[:size], values[size:behind], examples, sketch=values[behind:])
