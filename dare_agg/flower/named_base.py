"""The base of a run that lies on the server's disk, and is named instead of sent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_agg.checkpoint import Checkpoint, open_checkpoint
from dare_agg.checkpoint.hub import located
from dare_agg.checkpoint.hub_names import hub_name, shown_name
from dare_agg.checkpoint.model import model_in
from dare_agg.downlink.base import DOWNLINK_NAME
from dare_agg.downlink.protocol import Downlink
from dare_agg.downlink.store import VersionStore
from dare_agg.downlink.ways import WAYS
from dare_agg.errors import ConfigError
from dare_agg.vectors.model import GlobalModel

Place = str | os.PathLike[str]
# Bytes of what a base is called: an order holds it, and people read it.
_MOST_NAME = 256
# The folder of versions within a run's state.
_VERSIONS = "versions"
# What a store takes over of a downlink that keeps versions in memory.
_OPTIONS = ("form", *WAYS[DOWNLINK_NAME].options)


@dataclass(frozen=True)
class NamedBase:
    """A checkpoint that a run starts from; make one with `open_base`.

    ``name`` is what it is called for others: its name on the hub, or that of its folder.
    """

    checkpoint: Checkpoint = field(repr=False)
    name: str

    @property
    def place(self) -> Path:
        """The file or folder it lies in."""
        return self.checkpoint.path.absolute()

    def model(
        self, dense: Iterable[str] = (), exclude: Iterable[str] = (), apart: Iterable[str] = ()
    ) -> GlobalModel:
        """The model in it; nothing of it is copied. Raises as `model_in`."""
        return model_in(self.checkpoint, dense=dense, exclude=exclude, apart=apart)


def open_base(given: Place) -> NamedBase:
    """Open the base that a run names: a file, a folder, or a name on the hub.

    Raises `CheckpointError` for what is no model or cannot be had.
    """
    place = located(given)
    name = str(hub_name(given) or shown_name(place.absolute()))
    short = name.encode()[:_MOST_NAME].decode(errors="ignore")
    return NamedBase(open_checkpoint(place), short)


def store_for(
    base: NamedBase | None,
    state: Place | None,
    downlink: Downlink | None,
    verify_every: int = 0,
    send_base: bool = False,
) -> VersionStore | None:
    """The store of a run's versions beside its base on disk; None for a run without one.

    Raises `ConfigError` for words that are of use with a base alone, for a base without a folder
    for its versions, and for a downlink that such a run cannot have.
    """
    if base is None:
        words = {"state": state, "verify_every": verify_every, "send_base": send_base}
        for word, value in words.items():
            if value:
                raise ConfigError(
                    f"{word} = {str(value)!r} is of a run whose base lies on disk; give base too: "
                    "a folder, a file or a name on the hub"
                )
        return None
    if not state:
        raise ConfigError(
            f"base {base.name!r} without state; name the folder in which the run's versions are "
            'kept, as in state="runs/first/state"'
        )
    options: dict[str, Any] = {}
    if downlink is not None and downlink.name == DOWNLINK_NAME:
        options = {name: getattr(downlink, name) for name in _OPTIONS}
    elif downlink is not None:
        raise ConfigError(
            f"downlink {downlink.name!r} sends the whole model, and of a base on disk only steps "
            'travel; leave downlink out, or choose a form of steps: make_downlink("auto")'
        )
    return VersionStore(
        Path(state) / _VERSIONS, base_name=base.name, verify_every=verify_every, **options
    )


__all__ = ["NamedBase", "open_base", "store_for"]
