"""A party's own privacy budget: which trainings it has paid for, in a file of its own.

The file has the secret seed of the party's batches and noise and one entry for each training,
replaced on disk before the training begins. An entry gets the SHA-256 of what was trained before
that is sent. Beside it, in another folder, stands a mark: which ledger this is and how far it had
come. So a ledger that was lost, rolled back or is another's is refused; one whose folder and
mark are both put back to an older day is not found out.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.errors import PrivacyError, StateError
from dare_agg.files.file_lock import locked
from dare_agg.files.state_file import parse_state, write_state
from dare_agg.files.trust import own_folder, read_own
from dare_agg.privacy.accountant import Spent

SEED_BYTES = 32
_KIND = "dare-agg record budget 1"
_MARK = "dare-agg record budget mark 1"
_MOST_CHARGES = 1_000_000
_UNSENT = bytes(32)
_REMEDY = "name a file in a folder of this user's own (dp-budget in the node config)"


@dataclass(frozen=True)
class RecordCharge:
    """One training: its run, what it is of, noise, sampling and steps; what it made, if sent.

    ``attempt`` counts trainings of the same commitment.
    """

    run: str
    commitment: bytes
    attempt: int
    noise: float
    rate: float
    steps: int
    result: bytes = _UNSENT

    def packed(self) -> bytes:
        """What a mark covers of it; the result comes later."""
        numbers = np.array([self.attempt, self.noise, self.rate, self.steps], "<f8").tobytes()
        return hashlib.sha256(self.run.encode() + b"\0" + self.commitment + numbers).digest()


@dataclass(frozen=True)
class RecordLedger:
    """The trainings of ``party`` so far, at its δ; ``path`` and ``mark`` are its two files.

    ``words`` is what the words of the node config begin with that a party sets it by.
    """

    party: str
    delta: float
    path: Path
    mark: Path
    identity: bytes = field(default_factory=lambda: os.urandom(16))
    seed: bytes = field(default_factory=lambda: os.urandom(SEED_BYTES), repr=False)
    charges: tuple[RecordCharge, ...] = ()
    words: str = "dp"

    @property
    def spent(self) -> Spent:
        """All that was charged."""
        return self._spent(None)

    @property
    def noises(self) -> Mapping[str, float]:
        """The noise multiplier that each run was begun with."""
        return {charge.run: charge.noise for charge in reversed(self.charges)}

    def _spent(self, run: str | None) -> Spent:
        total = Spent()
        for charge in self.charges:
            if run is None or charge.run == run:
                total = total.add(charge.noise, charge.rate, charge.steps)
        return total

    def count_of(self, commitment: bytes) -> int:
        """How many trainings of this commitment were charged."""
        return sum(charge.commitment == commitment for charge in self.charges)

    def last_of(self, commitment: bytes) -> RecordCharge | None:
        """The newest training of this commitment, None where there was none."""
        found = [charge for charge in self.charges if charge.commitment == commitment]
        return found[-1] if found else None

    def check(self, charge: RecordCharge, run_epsilon: float, bound: float) -> RecordLedger:
        """With a training, charged nowhere; raises as `charged`."""
        found = replace(self, charges=(*self.charges, charge))
        for whose, run, most in (("the run's", charge.run, run_epsilon), ("its", None, bound)):
            after = found._spent(run).epsilon(self.delta)
            if not after <= most:
                before = self._spent(run).epsilon(self.delta)
                raise PrivacyError(
                    f"party {self.party!r}: this training would spend ε = {after:.4g}, more than "
                    f"{whose} budget of {most:g} at δ = {self.delta:.2g}, of which {before:.4g} "
                    f"are spent; nothing is trained. Only the party can allow more: {self.words}-"
                    "epsilon in its node config, for a run that asks it"
                )
        return found

    def charged(self, charge: RecordCharge, run_epsilon: float, bound: float) -> RecordLedger:
        """With a training, on disk before this returns; to be called within `alone`.

        Raises `PrivacyError` where it would spend more than the run's ε or the party's.
        """
        found = self.check(charge, run_epsilon, bound)
        found._write()
        return found

    def settled(self, charge: RecordCharge, result: bytes) -> bool:
        """Note what a training made; False where it had made something else before."""
        with self.alone() as held:
            at = [(one.commitment, one.attempt) for one in held.charges].index(
                (charge.commitment, charge.attempt)
            )
            known = held.charges[at].result
            if known != _UNSENT:
                return known == result
            charges = list(held.charges)
            charges[at] = replace(charges[at], result=result)
            replace(held, charges=tuple(charges))._write()
            return True

    @contextmanager
    def alone(self) -> Iterator[RecordLedger]:
        """The ledger as its file has it now, while no other process of the party is at it."""
        with locked(self.path, remedy=_REMEDY):
            yield self.read_again()

    def read_again(self) -> RecordLedger:
        """The ledger as its file has it now, checked against its mark."""
        if not self.path.exists():
            return self
        return _checked(self.path, self.mark, self.party, self.words)

    def _head(self, count: int) -> bytes:
        packed = b"".join(charge.packed() for charge in self.charges[:count])
        return hashlib.sha256(self.identity + packed).digest()

    def _write(self) -> None:
        charges = self.charges
        runs = list(dict.fromkeys(charge.run for charge in charges))
        place = {run: number for number, run in enumerate(runs)}
        facts = {
            "kind": _KIND,
            "party": self.party,
            "identity": self.identity.hex(),
            "seed": self.seed.hex(),
            "delta": self.delta,
            "runs": runs,
        }
        arrays = {
            "run": np.array([place[charge.run] for charge in charges], np.int64),
            "attempt": np.array([charge.attempt for charge in charges], np.int64),
            "steps": np.array([charge.steps for charge in charges], np.int64),
            "noise": np.array([charge.noise for charge in charges], np.float64),
            "rate": np.array([charge.rate for charge in charges], np.float64),
            "commitments": _bytes([charge.commitment for charge in charges]),
            "results": _bytes([charge.result for charge in charges]),
        }
        remedy = "nothing was trained: free space or fix the permissions"
        write_state(self.path, arrays, facts, remedy=remedy)
        own_folder(self.mark.parent, remedy=_REMEDY)
        write_state(
            self.mark,
            {
                "count": np.array([len(charges)], np.int64),
                "head": _bytes([self._head(len(charges))]),
            },
            {"kind": _MARK, "identity": self.identity.hex(), "party": self.party},
            remedy=remedy,
        )


def open_ledger(
    path: Path, marks: Path, party: str, delta: float, given: bool, words: str = "dp"
) -> RecordLedger:
    """The ledger in a file, or a new one where there never was one.

    ``marks`` is the folder of marks, and ``given`` says that δ was named. Raises `PrivacyError`
    for a ledger that was lost, damaged or rolled back, is another party's, or was begun with
    another δ; `StateError` where other users could change it.
    """
    own_folder(path.parent, remedy=_REMEDY)
    name = hashlib.sha256(f"{path.resolve()}\0{party}".encode()).hexdigest()[:32]
    mark = marks / f"{name}.mark"
    if not path.exists():
        if mark.exists():
            raise PrivacyError(
                f"the privacy budget {path} of party {party!r} is gone ({mark} knows of it); what "
                "was spent is not known: put it back, or begin another one under another name "
                f"({words}-budget in the node config) if these rows were never trained on"
            )
        return RecordLedger(party, delta, path, mark, words=words)
    ledger = _checked(path, mark, party, words)
    if given and ledger.delta != delta:
        raise PrivacyError(
            f"the privacy budget {path} was begun with δ = {ledger.delta:.4g}, and {words}-delta "
            f"is {delta:.4g}; leave {words}-delta out, or set it to that"
        )
    return ledger


def _checked(path: Path, mark: Path, party: str, words: str) -> RecordLedger:
    try:
        read = parse_state(read_own(path, remedy=_REMEDY, private=True), path)
        ledger = replace(_parsed(*read, path, mark), words=words)
        seen = parse_state(read_own(mark, remedy=_REMEDY), mark) if mark.exists() else None
        count = int(seen[0]["count"][0]) if seen else 0
        identity = bytes.fromhex(seen[1]["identity"]) if seen else ledger.identity
        head = seen[0]["head"].tobytes() if seen else b""
    except (StateError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"the privacy budget {path} cannot be read ({str(error)[:200]}); what was spent is not "
            "known: put its newest copy back; nothing is trained until then"
        ) from error
    if ledger.party != party:
        raise PrivacyError(
            f"the privacy budget {path} is party {ledger.party!r}'s, and this is {party!r}; name "
            f"a file of its own ({words}-budget in the node config), or the party as before "
            "(client-name)"
        )
    if identity != ledger.identity:
        raise PrivacyError(
            f"the privacy budget {path} is another one than {party!r} had there before; put that "
            "one back; nothing is trained until then"
        )
    if len(ledger.charges) < count or (seen and ledger._head(count) != head):
        raise PrivacyError(
            f"the privacy budget {path} was rolled back: it knows {len(ledger.charges)} trainings "
            f"of party {party!r}, which has made {count}; put its newest copy back; nothing is "
            "trained until then"
        )
    return ledger


def _parsed(
    arrays: Mapping[str, Any], facts: Mapping[str, Any], path: Path, mark: Path
) -> RecordLedger:
    if facts.get("kind") != _KIND:
        raise ValueError("it is no privacy budget of a party")
    count = arrays["run"].size
    whole = {name: arrays[name] for name in ("run", "attempt", "steps")}
    real = {name: arrays[name] for name in ("noise", "rate")}
    commitments, results = arrays["commitments"].tobytes(), arrays["results"].tobytes()
    runs = [str(run) for run in facts["runs"]]
    if (
        count > _MOST_CHARGES
        or {len(commitments), len(results)} != {32 * count}
        or any(a.shape != (count,) or a.dtype != np.int64 for a in whole.values())
        or any(a.shape != (count,) or a.dtype != np.float64 for a in real.values())
        or (count and (arrays["run"].min() < 0 or arrays["steps"].min() < 1))
    ):
        raise ValueError("its columns differ in length or hold no numbers")
    seed, identity = bytes.fromhex(facts["seed"]), bytes.fromhex(facts["identity"])
    delta = float(facts["delta"])
    if len(seed) != SEED_BYTES or len(identity) != 16 or not 0 < delta < math.inf:
        raise ValueError("its seed or numbers are none")
    charges = tuple(
        RecordCharge(
            runs[int(arrays["run"][i])],
            commitments[32 * i : 32 * i + 32],
            int(arrays["attempt"][i]),
            float(arrays["noise"][i]),
            float(arrays["rate"][i]),
            int(arrays["steps"][i]),
            results[32 * i : 32 * i + 32],
        )
        for i in range(count)
    )
    ledger = RecordLedger(str(facts["party"]), delta, path, mark, identity, seed, charges)
    _ = ledger.spent  # noises and rates that can be accounted for
    return ledger


def _bytes(parts: list[bytes]) -> Any:
    return np.frombuffer(b"".join(parts), np.uint8)
