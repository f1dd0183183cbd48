"""The ways down to the clients as rows of one table: their names, and both halves of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare_agg.downlink.base import (
    BASE_BYTES,
    BASE_NAME,
    BASE_VERSION,
    CHAIN_NAME,
    DOWNLINK_NAME,
    VERIFY,
)
from dare_agg.downlink.client import VersionReceiver
from dare_agg.downlink.following import ChainReceiver
from dare_agg.downlink.forms import FORMS
from dare_agg.downlink.protocol import Downlink, FullDownlink, FullReceiver, Receiver
from dare_agg.downlink.server import VersionDownlink
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.vectors.model import GlobalModel


@dataclass(frozen=True)
class Place:
    """Where, and as whom, a client keeps versions, and what its model is grouped by.

    ``base`` is the run's base where it lies on this machine, for ways that need it.
    """

    folder: Path
    client: str
    dense: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    by_form: bool = False
    apart: tuple[str, ...] = ()
    base: GlobalModel | None = None


@dataclass(frozen=True)
class Way:
    """A row of `WAYS`.

    ``forms`` are what a run may choose, with what each does; ``send`` makes the server's half
    of a form from its options, ``options``, None where a run is on this way by what it begins
    from; ``receive`` opens the client's half from what the order says, ``facts``
    (`Downlink.facts`).
    """

    forms: Mapping[str, str]
    send: Callable[..., Downlink] | None
    receive: Callable[[Place, Mapping[str, str]], Receiver]
    options: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()


# By the name that orders and kept states bear.
WAYS: Mapping[str, Way] = {
    FullDownlink.name: Way(
        {FullDownlink.name: "the full arrays, every time"},
        lambda form: FullDownlink(),
        lambda place, facts: FullReceiver(),
    ),
    DOWNLINK_NAME: Way(
        {name: form.about for name, form in FORMS.items()},
        VersionDownlink,
        lambda place, facts: VersionReceiver(
            place.folder,
            place.client,
            facts.get(BASE_VERSION, ""),
            dense=place.dense,
            exclude=place.exclude,
            by_form=place.by_form,
            apart=place.apart,
        ),
        options=("dense_values", "drop_rate", "keep_bytes"),
        facts=(BASE_VERSION,),
    ),
    # Of a run that begins from a base on disk.
    CHAIN_NAME: Way(
        {},
        None,
        lambda place, facts: ChainReceiver(
            place.folder,
            place.client,
            place.base,
            facts.get(BASE_VERSION, ""),
            verify=facts.get(VERIFY, ""),
        ),
        facts=(BASE_VERSION, BASE_NAME, BASE_BYTES, VERIFY),
    ),
}

# What a run may choose → its row.
DOWNLINKS: Mapping[str, Way] = {form: way for way in WAYS.values() for form in way.forms}


def make_downlink(form: str = FullDownlink.name, **options: Any) -> Downlink:
    """Make the server's half by its form; raises `ConfigError` for an unknown word or option."""
    way = DOWNLINKS.get(form)
    if way is None or way.send is None:
        raise ConfigError(f"downlink {form!r} is unknown{did_you_mean(form, DOWNLINKS)}")
    for key in options:
        if key not in way.options:
            raise ConfigError(f"downlink has no option {key!r}{did_you_mean(key, way.options)}")
    return way.send(form, **options)
