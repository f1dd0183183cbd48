"""What a SuperNode is told about its part in secure sums: ``--node-config`` and environment.

Keys of the node config: ``secure-identity`` (private key file), ``secure-roster``,
``secure-trust`` (public key files of who must have signed the roster, comma-separated),
``secure-passphrase-file``, ``secure-state`` (folder), ``secure-ledger`` (file), and what the
party insists on: ``secure-colluding`` (the share of the roster that may collude; a fifth by
default), ``secure-min-parties`` (honest parties in a sum: those who must stay less those who
may collude; 3), ``secure-min-cohort`` (the cohort must be more than this share of the roster;
half), ``secure-min-threshold`` (share of the cohort that must stay, more than half; two
thirds by default), ``secure-min-norm`` (a delta must be larger; 0), ``secure-max-clip``,
``secure-methods``, ``secure-groups`` (it takes part in sums over one of so many groups of the
roster; 1: in those of all alone). Of noised sums ``secure-epsilon`` and ``secure-delta``, the
most that all runs together may spend, and ``secure-budget``, the file where it stands; with an ε
of its own the party takes part in no sum without noise. For merges ``model-path``, ``base-path``
and ``merged-path``.
A node with a ``secure-identity`` takes part in nothing else, whatever the server asks for:
``secure-evaluate=true`` lets it report metrics, ``secure-only=false`` lets it train in the
clear too.

In a simulation on one machine ``DARE_AGG_SECURE_KEYS`` names a folder that has it all:
``party-0.key`` and so on by partition, ``roster.json``, ``coordinator.pub``, for merges
``party-0.model``, and what all insist on, ``node.json`` (`dare_agg.secure.practice`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from dare_agg.errors import ConfigError
from dare_agg.files.cache import cache_folder
from dare_agg.secure.aggregates import AGGREGATES
from dare_agg.secure.graph import COLLUDING, MOST_COLLUDING
from dare_agg.secure.guard import PrivacyGuard
from dare_agg.secure.identity import Identity, need_passphrase, read_identity, read_trusted
from dare_agg.secure.ledger import FileLedger
from dare_agg.secure.party import Party
from dare_agg.secure.policy import SecurePolicy
from dare_agg.secure.practice import KEYS_VARIABLE, practice_words
from dare_agg.secure.roster import check_roster, read_roster
from dare_agg.secure.terms import MIN_PARTIES
from dare_agg.secure.vault import Vault, default_folder


def secure_party(context: Context) -> Party:
    """Open this node's identity, check its roster. Raises `ConfigError`, `StateError`,
    `ProtocolError`."""
    node = {key: str(value) for key, value in context.node_config.items()}
    folder = os.environ.get(KEYS_VARIABLE)
    identity_file = _path(node, "secure-identity", folder, f"party-{node.get('partition-id')}.key")
    roster_file = _path(node, "secure-roster", folder, "roster.json")
    passphrase_file = node.get("secure-passphrase-file")
    passphrase = need_passphrase(Path(passphrase_file) if passphrase_file else None)
    identity = _identity(identity_file, passphrase, _stamp(identity_file))
    roster = read_roster(roster_file)
    check_roster(roster, _trusted(node, folder))
    state = Path(node["secure-state"]) if "secure-state" in node else default_folder()
    ledger = node.get("secure-ledger", str(identity_file.with_suffix(".ledger")))
    least = _number(context.node_config, "secure-min-norm", 0.0, 0.0)
    vault, guard = Vault(state, identity), _guard(context.node_config, identity_file, folder)
    return Party(identity, roster, vault, FileLedger(Path(ledger)), least, guard)


def _guard(config: Mapping[str, object], identity_file: Path, practice: str | None) -> PrivacyGuard:
    """This party's budget of noised sums."""
    node = {**practice_words(), **config}
    path = Path(str(node.get("secure-budget", identity_file.with_suffix(".budget"))))
    said = "secure-epsilon" in node
    simulated = practice is not None and "secure-identity" not in node
    # With the folder of their keys the parties of a simulation are gone.
    marks = Path(str(practice)) / "marks" if simulated else cache_folder("privacy-marks")
    return PrivacyGuard(
        path.expanduser(),
        marks,
        epsilon=_number(node, "secure-epsilon", 0.0, 1e-3 if said else 0.0),
        delta=_number(node, "secure-delta", 0.0, 0.0, 1.0),
        colluding=_number(node, "secure-colluding", COLLUDING, 0.0, MOST_COLLUDING),
        insists=said,
        practice=simulated,
    )


def node_policy(context: Context, base: str, layout: str) -> SecurePolicy:
    """What this node insists on, for a model it holds itself."""
    node = {**practice_words(), **context.node_config}
    methods = str(node.get("secure-methods", ",".join(AGGREGATES)))
    aggregates = tuple(word.strip() for word in methods.split(",") if word.strip())
    unknown = [word for word in aggregates if word not in AGGREGATES]
    if unknown or not aggregates:
        raise ConfigError(
            f"node config secure-methods = {methods!r}; of {', '.join(AGGREGATES)} are possible"
        )
    return SecurePolicy(
        base,
        layout,
        min_parties=int(_number(node, "secure-min-parties", MIN_PARTIES, MIN_PARTIES)),
        min_threshold_share=_number(node, "secure-min-threshold", 2 / 3, 0.5),
        min_cohort_share=_number(node, "secure-min-cohort", 0.5, 0.0),
        colluding=_number(node, "secure-colluding", COLLUDING, 0.0, MOST_COLLUDING),
        aggregates=aggregates,
        max_clip=_number(node, "secure-max-clip", 1.0, 0.0),
        groups=int(_number(node, "secure-groups", 1, 1)),
    )


def node_models(context: Context) -> tuple[Path, Path | None]:
    """This node's own model, and where the merged one goes (None: nowhere)."""
    node = context.node_config
    out = node.get("merged-path")
    if "model-path" in node:
        return Path(str(node["model-path"])), None if out is None else Path(str(out))
    folder = os.environ.get(KEYS_VARIABLE)
    if folder:
        for path in Path(folder).glob(f"party-{node.get('partition-id')}.model*"):
            merged = path.name.replace(".model", ".merged")
            return path.resolve(), Path(folder).parent / "parties" / merged
    raise ConfigError(
        "this node has no model to merge; name it in --node-config: model-path=FOLDER"
    )


def _number(
    node: Mapping[str, object], key: str, default: float, least: float, most: float = math.inf
) -> float:
    value = node.get(key, default)
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not least <= value <= most:  # type: ignore[operator]
        bound = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:.3g}"
        raise ConfigError(f"node config {key} = {value!r}; a number {bound} is needed")
    return float(value)  # type: ignore[arg-type]


def _path(node: Mapping[str, str], key: str, folder: str | None, name: str) -> Path:
    if key in node:
        return Path(node[key])
    if folder and (Path(folder) / name).is_file():
        return Path(folder) / name
    raise ConfigError(
        f"this node has no {key}; make keys with dare-agg keys and name the file in --node-config"
    )


def _trusted(node: Mapping[str, str], folder: str | None) -> list[bytes]:
    if "secure-trust" in node:
        files = [Path(word.strip()) for word in node["secure-trust"].split(",") if word.strip()]
    else:
        files = [_path(node, "secure-trust", folder, "coordinator.pub")]
    return [read_trusted(file) for file in files]


@lru_cache(maxsize=64)
def _identity(path: Path, passphrase: str, stamp: int) -> Identity:
    # Processes that live on between messages need not stretch the passphrase each time.
    return read_identity(path, passphrase)


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
