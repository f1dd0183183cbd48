"""Files of keys and of secure sums: rosters, identities, ledgers, sealed secrets."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dare_agg.deploy.identities import load_identity, read_identities
from dare_agg.errors import DareError
from dare_agg.secure import identity as identities
from dare_agg.secure.identity import (
    find_passphrase,
    new_identity,
    read_identity,
    read_public,
    read_trusted,
    write_identity,
    write_public,
)
from dare_agg.secure.kept_state import decode_state
from dare_agg.secure.ledger import FileLedger
from dare_agg.secure.roster import check_roster, make_roster, read_roster, sign_roster, write_roster
from dare_agg.secure.vault import Vault
from simulations.bench.file_readers.reader import Reader, one_line, whole
from simulations.bench.secure_sessions import recordings

PASSPHRASE = "a passphrase"


def roster_reader(folder: Path) -> Reader:
    """A signed roster."""
    path, coordinator = folder / "roster.json", new_identity("coordinator")
    members = [(f"party {number}", new_identity("one").public) for number in range(4)]
    write_roster(path, sign_roster(make_roster("fuzz", members), coordinator))

    def read() -> None:
        check_roster(read_roster(path), [coordinator.public])

    return Reader(path, (path.read_bytes(),), read, whole)


def identity_reader(folder: Path) -> Reader:
    """An identity behind a passphrase."""
    path, own = folder / "own.key", new_identity("own")
    # The passphrase is stretched as always, only not as far.
    quick = partial(patch.object, identities, "_SCRYPT_N", 1 << 4)
    with quick():
        write_identity(path, own, PASSPHRASE)

    def read() -> None:
        read_public(path)
        with quick():
            assert read_identity(path, PASSPHRASE).public == own.public

    return Reader(path, (path.read_bytes(),), read, whole)


def public_reader(folder: Path) -> Reader:
    """A public key."""
    path = folder / "own.pub"
    write_public(path, "own", new_identity("own").public)

    def read() -> None:
        read_public(path)
        assert len(read_trusted(path)) == 32

    return Reader(path, (path.read_bytes(),), read, whole)


def passphrase_reader(folder: Path) -> Reader:
    """A passphrase in a file."""
    path = folder / "passphrase"
    return Reader(path, (b"a passphrase\n",), lambda: find_passphrase(path), is_text=True)


def pem_reader(folder: Path) -> Reader:
    """A client's signing key."""
    path, key = folder / "client.pem", Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Reader(path, (text,), lambda: load_identity(path), is_text=True)


def identities_file_reader(folder: Path) -> Reader:
    """The public keys of clients."""
    path = folder / "identities.json"
    known = {f"client {number}": os.urandom(32).hex() for number in range(3)}
    return Reader(path, (json.dumps(known).encode(),), lambda: read_identities(path), whole)


def ledger_reader(folder: Path) -> Reader:
    """A party's ledger."""
    path, run = folder / "own.ledger", recordings(7)[0]
    book, size = FileLedger(path), run.terms.size
    book.claim(run.terms, np.ones(size, np.float32), (bytes(32),))
    book.sign(run.terms, run.terms.cohort)
    later = recordings(8)[1].terms

    def read() -> None:
        before = path.read_bytes()
        try:
            book.claim(later, np.full(size, 2, np.float32))
        except DareError:
            assert path.read_bytes() == before, "a refusal changed the ledger"
            raise
        assert book.entries()[-1].session == later.session.hex()

    return Reader(path, (path.read_bytes(),), read, one_line)


def vault_reader(folder: Path) -> Reader:
    """What a party keeps sealed."""
    run = recordings(7)[0]
    vault, session = Vault(folder / "vault", run.identities[2]), run.terms.session
    vault.put(session, "state", run.kept["sign"][2])
    (path,) = vault.folder.iterdir()

    def read() -> None:
        assert decode_state(vault.get(session, "state")).party == 2

    return Reader(path, (path.read_bytes(),), read)


def kept_state_reader(folder: Path) -> Reader:
    """What a vault seals, as if somebody could seal another."""
    path = folder / "state"
    seeds = tuple(kept[2] for run in recordings(7) for kept in run.kept.values() if 2 in kept)
    return Reader(path, seeds, lambda: decode_state(path.read_bytes()))
