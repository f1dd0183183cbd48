"""A consortium on one machine, for simulations: every key real, all in one folder.

It protects nothing, since whoever runs it holds all keys; the protocol, its checks and its
files are those of a deployment.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.files.json_text import parse_json
from dare_agg.secure.identity import VARIABLE, new_identity, write_identity, write_public
from dare_agg.secure.roster import make_roster, sign_roster, write_roster
from dare_agg.secure.terms import MIN_PARTIES

KEYS_VARIABLE = "DARE_AGG_SECURE_KEYS"
_WORDS = "node.json"


def check_consortium(parties: int, models: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for too few parties, or models that are missing or not one each."""
    if parties < MIN_PARTIES:
        raise ConfigError(
            f"{parties} clients; a secure sum needs at least {MIN_PARTIES}: of two each learns "
            "the other's delta"
        )
    if models and len(models) != parties:
        raise ConfigError(f"{len(models)} secure-models for {parties} clients; one each is needed")
    for model in models:
        if not Path(model).exists():
            raise ConfigError(f"secure-models: {model} does not exist; check the path")


def practice_consortium(
    folder: Path, parties: int, models: Sequence[str] = (), groups: int = 1
) -> dict[str, str]:
    """Write keys, roster and links to models into ``folder``, party i for partition i.

    Returns the environment that the simulation's processes need. Keys of a run before are
    replaced: their passphrase ended with it. Parties of ``groups`` take part in sums over so many,
    and count on nobody colluding, since groups of a few bear none who do. Raises `ConfigError` as
    `check_consortium`.
    """
    check_consortium(parties, models)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    passphrase = secrets.token_urlsafe(24)
    identities = [new_identity(f"party {number}") for number in range(parties)]
    for number, identity in enumerate(identities):
        write_identity(folder / f"party-{number}.key", identity, passphrase)
    for number, model in enumerate(models):
        path = Path(model).absolute()
        (folder / f"party-{number}.model{path.suffix}").symlink_to(path)
    if groups > 1:
        words = {"secure-groups": groups, "secure-colluding": 0.0}
        (folder / _WORDS).write_text(json.dumps(words) + "\n")
    coordinator = new_identity("coordinator")
    write_public(folder / "coordinator.pub", coordinator.name, coordinator.public)
    roster = make_roster("practice", [(i.name, i.public) for i in identities])
    write_roster(folder / "roster.json", sign_roster(roster, coordinator))
    return {KEYS_VARIABLE: str(folder), VARIABLE: passphrase}


def practice_words() -> Mapping[str, Any]:
    """What every party of a consortium for practice insists on; nothing of others."""
    folder = os.environ.get(KEYS_VARIABLE)
    path = Path(folder) / _WORDS if folder else None
    return parse_json(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
