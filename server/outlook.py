"""What each method of a run would send and do, in words and bytes, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dare_agg.codec.budget import plan_budget
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.merge.methods import find_method
from dare_agg.rounds.auto import AUTO, choices
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import split_tensors
from server.compared import METHODS
from server.config import RunConfig
from server.reading import read_config, settled
from server.several import rows_of

_FLOAT = 4


def outlook(run: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """``methods``: of each what it does and the bytes a client and round, up and down.

    ``found["states"]`` has the shapes of what is trained (`client.outlook`); a method whose shapes
    are not known has no bytes. ``down`` is the first round's and ``down_later`` what each further
    one takes at most, None where only running tells.
    """
    config = read_config(run)
    states = found.get("states", {})
    if config.secure:
        return {"methods": [_method(config, f"secure-{config.secure}", states)]}
    rows = rows_of(config, settled)
    return {"methods": [{**_method(own, one.method, states), "name": one.name}
                        for one, own in rows]}  # fmt: skip


def _method(config: RunConfig, name: str, states: Mapping[str, Any]) -> dict[str, Any]:
    row = METHODS[name].words if name in METHODS else {}
    words = {"method": config.secure or "task-arithmetic", "drop_rate": config.drop_rate,
             "values": config.values, "dense_values": config.dense_values, **row}  # fmt: skip
    train = config.train_by(name)
    told: dict[str, Any] = {"name": name, "train": train, "up": None, "down": None}
    shapes = states.get(train)
    chosen = words["drop_rate"] == AUTO
    rate, values = parse_drop_rate(0 if chosen else words["drop_rate"]), words["values"]
    if shapes is not None:
        sizes = {n: np.broadcast_to(np.float32(0), tuple(s)) for n, s in shapes.items()}
        groups = split_tensors(sizes, dense=config.dense_by(name), exclude=config.exclude)
        size, dense = groups.layout.size, groups.dense_layout.size
        told |= {"parameters": size, "dense_parameters": dense}
        if chosen:
            first = choices(groups.layout, values).first
            rate, values = first.drop_rate, first.values
        budget = config.budget()
        if budget is not None and budget.nbytes and "drop_rate" not in row:
            own = plan_budget(size, nbytes=budget.nbytes, mask=config.mask)
            rate, values = own.drop_rate, own.values
        if not config.secure:
            head = HEADER_BYTES + payload_bytes(words["dense_values"], dense) if dense else 0
            update = HEADER_BYTES + payload_bytes(values, rate.survivors(size))
            told["up"] = update + head
            told |= _down(config, size, dense, rate, head)
    values = values if values in VALUE_FORMATS else UpdateTerms.values
    told["says"] = _says(config, words, train, float(rate.keep), values)
    if chosen:
        told["says"] += "; that is round 1, later rounds choose by what they measure"
    return told


def _down(config: RunConfig, size: int, dense: int, rate: Any, head: int) -> dict[str, Any]:
    whole = _FLOAT * (size + dense)
    if config.downlink == "full":
        return {"down": whole, "down_later": whole}
    if config.downlink in ("auto", "union-b1"):
        kept = min(size, rate.survivors(size) * config.min_clients)
        step = HEADER_BYTES + payload_bytes("b1", kept) + head
        return {"down": whole, "down_later": min(whole, step)}
    return {"down": whole, "down_later": None}


def _says(config: RunConfig, words: Mapping[str, Any], train: str, keep: float, values: str) -> str:
    what = {"full": "the whole model", "lora": "adapters", "head": "the head"}[train]
    bits = VALUE_FORMATS[values].bits
    if config.secure:
        sent = "what the secure sum asks for; no single update is seen"
    elif keep == 1:
        sent = f"all of the change, {bits:g} bits a value"
    else:
        sent = f"one value in {1 / keep:,.4g} of the change, {bits:g} bits each"
    found = find_method(words["method"])
    needs = f"; clients send {found.statistics} statistics besides" if found.statistics else ""
    return f"trains {what}; sends {sent}; merged by {words['method']} ({found.formula}){needs}"
