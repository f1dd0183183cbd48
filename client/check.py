"""What every client would refuse at once, found before one starts: words, data and model.

`dare-agg run` asks this where the clients run on this machine too. What only a hub can tell,
or only reading a large file or tokens, clients say themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from client.adapters.four_bits import check_four_bits
from client.config import DEFAULTS, ConfigValue, TaskConfig, data_sources, task_config
from client.data import FILE_READERS
from client.division import check_division
from client.images import BUILT_IN_IMAGES
from client.instructions.sources import BUILT_IN_CONVERSATIONS
from client.models import MODELS, package_path, refuse_pickled_model
from client.tasks.table import find_task
from client.text_files import kind_of
from client.text_sets import BUILT_IN, built_in_folder
from dare_agg.checkpoint.hub import in_cache
from dare_agg.errors import ConfigError, did_you_mean

# Variables that keep Hugging Face's libraries from asking a hub.
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
# From which likeness on a name is taken for a slip.
_NEAR = 0.85
_ON = {"1", "TRUE", "YES", "ON"}


def check(run: Mapping[str, ConfigValue]) -> None:
    """Raise `ConfigError` for a run config that no client on this machine can train by."""
    sources = data_sources(str(run.get("data", DEFAULTS["data"])))
    configs = []
    for number in range(len(sources)):
        node = {"partition-id": number, "num-partitions": len(sources)}
        config = task_config({**DEFAULTS, **run}, node)
        _check_data(config)
        if config.test_data:
            _check_data(replace(config, data=config.test_data), "test-data")
        _check_model(config.model)
        check_four_bits(config)
        task = find_task(config)
        task.check((config.train,))
        task.look(config)
        configs.append(config)
    if "min-clients" in run:  # how many there are, a simulation knows
        check_division(run, configs)


def _check_data(config: TaskConfig, key: str = "data") -> None:
    word = config.data
    if word in BUILT_IN:
        built_in_folder(word)
    elif word in BUILT_IN_IMAGES:
        row = BUILT_IN_IMAGES[word]
        if not Path(row.folder).is_dir():
            raise ConfigError(f"data {word!r} is not installed; get it with: {row.remedy}")
    elif word not in BUILT_IN_CONVERSATIONS and not Path(word).exists():
        known = (*BUILT_IN, *BUILT_IN_IMAGES, *BUILT_IN_CONVERSATIONS)
        if _is_path(word, FILE_READERS):
            raise ConfigError(f"{key} {word!r} does not exist; check the path")
        _refuse_near(key, word, known)
        if _offline():
            raise ConfigError(
                f"{key} {word!r} is no built-in set, file or folder, and no hub is asked "
                f"({_offline()} is set){did_you_mean(word, known)}"
            )


def _check_model(word: str) -> None:
    if word in MODELS:
        row = MODELS[word]
        package_path(row.path.format(n=1, m=0), f"model {word!r}", row.packages)
    elif not Path(word).exists():
        if _is_path(word, (".gguf", ".safetensors")):
            raise ConfigError(
                f"model {word!r} does not exist; check the path, or give the "
                "name of a built-in model or of one on the hub"
            )
        _refuse_near("model", word, MODELS)
        if _offline() and in_cache(word) is None and "/" in word:
            raise ConfigError(
                f"model {word!r} is no folder here, not in the hub's cache, and no hub is asked "
                f"({_offline()} is set); where one can be reached: hf download {word}"
            )
    else:
        refuse_pickled_model(word)


def _is_path(word: str, suffixes: Sequence[str]) -> bool:
    """Whether a word that names nothing here can only be meant as a path."""
    path = Path(word)
    plain = word.startswith((".", "~", "/")) or word.count("/") > 1
    return plain or kind_of(path) in suffixes


def _refuse_near(what: str, word: str, known: Iterable[str]) -> None:
    """Refuse what is a known name but for a letter, rather than ask a hub for it."""
    near = get_close_matches(word, known, n=1, cutoff=_NEAR)
    if near and "/" not in word:
        raise ConfigError(
            f"{what} {word!r} is unknown; did you mean {near[0]!r}? (One of a hub: OWNER/NAME.)"
        )


def _offline() -> str:
    """The variable that forbids asking a hub, "" where none does."""
    return next((name for name in _OFFLINE if os.environ.get(name, "").upper() in _ON), "")
