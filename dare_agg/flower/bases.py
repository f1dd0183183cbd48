"""The base of a run at a client: found where it lies on this machine, and never copied.

Looked at are, in this order, what the node config names (``base``: a file, a folder, or a name
on the hub), what the hub's cache has under the name that the order calls it, the client's own
cache of bases, and what the app offers (`offer_base`). One that has another fingerprint than
the run's base is passed over; where none has it, the error says what to put where.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from flwr.app import Context

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.hub import in_cache, located
from dare_agg.checkpoint.hub_names import hub_name
from dare_agg.checkpoint.model import model_in
from dare_agg.downlink.base import BASE_BYTES, BASE_NAME, BASE_VERSION
from dare_agg.errors import BaseMissingError, DareError
from dare_agg.rounds.messages import Order, one_line
from dare_agg.vectors.model import Arrays, GlobalModel, global_model

# What an app offers: named arrays, or where they lie.
Offer = Arrays | str | os.PathLike[str]
# Characters of what was wrong with a place that was looked at in vain.
_MOST_NAMED = 80


def find_base(
    order: Order, context: Context, folder: Path, offers: Callable[[], Iterable[Offer]]
) -> GlobalModel | None:
    """The run's base as it lies on this machine; ``folder`` is where this client keeps versions.

    None where there is none and the server sends it. Raises `BaseMissingError` where it does not.
    """
    wanted = order.facts.get(BASE_VERSION, "")
    passed_over: list[str] = []
    for what, place in _places(order, context, folder, offers):
        try:
            model = open_base_of(place(), order)
        except (DareError, OSError) as error:
            passed_over.append(f"{what}: {one_line(error, _MOST_NAMED)}")
            continue
        if model.ref.version == wanted:
            return model
        passed_over.append(f"{what} has {model.ref.version[:12]}")
    if BASE_BYTES in order.facts:
        return None
    raise BaseMissingError(missing(order, passed_over))


def open_base_of(place: Path, order: Order) -> GlobalModel:
    """The model at a place, in the order's groups; raises as `open_checkpoint`, `model_in`."""
    return model_in(
        open_checkpoint(place), dense=order.dense, exclude=order.exclude, apart=order.apart
    )


def kept_place(folder: Path, version: str) -> Path:
    """Where a client keeps a base that it has from elsewhere."""
    return folder / "bases" / version


def missing(order: Order, passed_over: Iterable[str]) -> str:
    """What to put where, for a client that has not the base that an order names."""
    version, name = order.facts.get(BASE_VERSION, "")[:12], order.facts.get(BASE_NAME, "")
    on_hub = hub_name(name) if name else None
    if on_hub is None:
        remedy = "copy its folder to this machine"
    else:
        revision = "" if on_hub.revision == "main" else f" --revision {on_hub.revision}"
        remedy = f"hf download {on_hub.repository}{revision}, or copy its folder here"
    found = "; ".join(passed_over)
    return (
        f"this node lacks the run's base {name}, fingerprint {version}; {remedy}, start the node "
        f"with base=FOLDER in --node-config{f' ({found})' if found else ''}"
    )


def _places(
    order: Order, context: Context, folder: Path, offers: Callable[[], Iterable[Offer]]
) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Where the base may lie, each with how it is called; the cheapest to ask first."""
    own = str(context.node_config.get("base", ""))
    if own:
        yield f"base={own}", partial(located, own)
    # A party of secure sums tells nobody what else its machine has.
    if "secure-identity" not in context.node_config:
        cached = in_cache(order.facts.get(BASE_NAME, ""))
        if cached is not None:
            yield "the hub's cache", partial(Path, cached)
    kept = kept_place(folder, order.facts.get(BASE_VERSION, ""))
    for place in (kept, kept.with_name(f"{kept.name}.safetensors")):
        if place.exists():
            yield "the cache", partial(Path, place)
    for offered in offers():
        if isinstance(offered, str | os.PathLike):
            yield "offer_base", partial(located, offered)
        elif offered:
            yield "offer_base", partial(_keep, offered, order, kept)


def _keep(arrays: Arrays, order: Order, place: Path) -> Path:
    """Write arrays that are the run's base where this client keeps it; another one is none."""
    offered = global_model(
        arrays, dense=order.dense, exclude=order.exclude, by_form=order.by_form, apart=order.apart
    )
    if offered.ref.version != order.facts.get(BASE_VERSION):
        raise BaseMissingError(f"has {offered.ref.version[:12]}")
    write_checkpoint(place, dict(arrays), overwrite=True)
    return place


__all__ = ["Offer", "find_base", "kept_place", "missing", "open_base_of"]
