"""Every reader that is fuzzed, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from simulations.bench.file_readers.keys import (
    identities_file_reader,
    identity_reader,
    kept_state_reader,
    ledger_reader,
    passphrase_reader,
    pem_reader,
    public_reader,
    roster_reader,
    vault_reader,
)
from simulations.bench.file_readers.models import (
    adapter_reader,
    checkpoint_reader,
    fingerprints_file_reader,
    model_folder_reader,
    recipe_reader,
)
from simulations.bench.file_readers.reader import Reader
from simulations.bench.file_readers.rounds import base_reader, state_reader, versions_reader
from simulations.bench.file_readers.runs import log_reader, run_folder_reader

READERS: Mapping[str, Callable[[Path], Reader]] = {
    "state": state_reader,
    "state-base": partial(state_reader, name="base.state"),
    "version-base": base_reader,
    "version-cached": partial(versions_reader, which="base"),
    "version-head": partial(versions_reader, which="head"),
    "version-steps": partial(versions_reader, which="steps"),
    "roster": roster_reader,
    "identity": identity_reader,
    "public-key": public_reader,
    "passphrase": passphrase_reader,
    "client-key": pem_reader,
    "identities": identities_file_reader,
    "ledger": ledger_reader,
    "vault": vault_reader,
    "kept-state": kept_state_reader,
    "fingerprints": fingerprints_file_reader,
    "safetensors": partial(checkpoint_reader, which="file"),
    "shard": partial(checkpoint_reader, which="shard"),
    "index": partial(checkpoint_reader, which="index"),
    "config": partial(model_folder_reader, name="config.json"),
    "modules": partial(model_folder_reader, name="modules.json"),
    "card": partial(model_folder_reader, name="README.md"),
    "adapter": partial(adapter_reader, which="weights"),
    "adapter-config": partial(adapter_reader, which="config"),
    "recipe-yaml": partial(recipe_reader, kind="yaml"),
    "recipe-toml": partial(recipe_reader, kind="toml"),
    "recipe-json": partial(recipe_reader, kind="json"),
    "metrics": partial(run_folder_reader, name="metrics.jsonl"),
    "run": partial(run_folder_reader, name="run.json"),
    "log": log_reader,
}
