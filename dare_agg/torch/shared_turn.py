"""The turn of a model that lies in pieces over processes (FSDP2), taken by all of them.

The first process is Flower's: it has the message and the version, and makes the reply. The
others are told what to hold and what to encode; no process holds a whole tensor of the delta group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from dare_agg.errors import ConfigError, DareError
from dare_agg.files.json_text import parse_json
from dare_agg.rounds.client import ClientUpdate, Measured, check_start, completed_update
from dare_agg.rounds.plan import RoundPlan, plan_from_record
from dare_agg.rounds.same_code import check_same_code
from dare_agg.rounds.statistics import Statistics
from dare_agg.torch.delta import TrainedDelta
from dare_agg.torch.holding import HeldModel, check_tied, dense_vector, hold
from dare_agg.torch.loading import as_source
from dare_agg.torch.places import held
from dare_agg.torch.ranks import Ranks, SharedSource
from dare_agg.torch.sharded import encode_shared, measure_shared
from dare_agg.vectors.layout import Layout, layout_of
from dare_agg.vectors.model import Arrays, GlobalModel, Groups, ModelRef
from dare_agg.vectors.tiled import TiledVector

if TYPE_CHECKING:
    from flwr.app import ConfigRecord, Message, MetricRecord

    from dare_agg.flower.turns import Number, Turn

# Of what the first process tells the others: bytes and values, of 100,000 tensors too.
_MOST = 1 << 28


class SharedTurn:
    """A turn that `dare_mod` opened at the first process, taken by all processes of a model.

    Raises at every process what the first one met, and as `dare_agg.torch.holding.hold`.
    """

    def __init__(self, model: nn.Module, turn: Turn | None, ranks: Ranks) -> None:
        self._turn, self._ranks = turn, ranks
        try:
            self._plan, self._held = _taken(model, turn, ranks)
        except DareError as error:
            if turn is not None:
                turn.failed = error
            raise

    def reply(
        self,
        num_examples: int,
        metrics: Mapping[str, Number] | None = None,
        *,
        records: Mapping[str, ConfigRecord | MetricRecord] | None = None,
        statistics: Statistics | None = None,
    ) -> Message | None:
        """As `FederatedTurn.reply`, by all processes; None at all but the first."""
        from dare_agg.flower.turns import missing_statistics

        turn, plan, update = self._turn, self._plan, None
        if plan is not None:
            # Before anything that one process alone may fail at: all of them must ask.
            own = self._held.own_tensors()
            lacks = turn is not None and plan.terms.statistics and statistics is None
            try:
                self._ranks.told(missing_statistics(plan) if lacks else None)
                update = update_shared(self._held, plan, self._ranks, statistics)
            except DareError as error:
                return None if turn is None else turn.refuse(error)
            if turn is not None:
                turn.keep_own(own, self._held.start)
        if turn is None:
            return None
        return turn.answer(update, {"num-examples": num_examples, **(metrics or {})}, records)


def update_shared(
    model: HeldModel, plan: RoundPlan, ranks: Ranks, statistics: Statistics | None = None
) -> ClientUpdate | None:
    """As `HeldModel.update`, by all processes of a model; None at all but the first."""
    start = model.start
    check_same_code(plan.codec, plan.package, "the round plan", "this client")
    check_start(plan, start)
    tensors = model.tensors()
    parts = {name: held(tensor, ranks.leads) for name, tensor in tensors.items()}
    wrong: DareError | None = None
    try:
        check_tied(start, parts)
    except DareError as error:
        wrong = error
    ranks.agree(wrong)
    layout = start.groups.layout
    delta = TrainedDelta(layout, parts, as_source(start.delta), ranks.leads)
    found = measure_shared(delta, ranks)
    spec = plan.spec(layout)
    if spec.rates is not None and not spec.rates.told:
        raise ConfigError(
            "keep rates of the client's own ('own', and 'last' in its first round) are not made by "
            "a model in several processes; set keep_rates='uniform', or train it in one"
        )
    blob = encode_shared(spec, delta, ranks)
    dense = dense_vector(start, tensors)
    if not ranks.leads:
        return None
    measured = Measured(found.norm, found.largest, found.above / layout.size)
    return completed_update(plan, start, blob, dense, measured, statistics)


def _taken(model: nn.Module, turn: Turn | None, ranks: Ranks) -> tuple[RoundPlan | None, HeldModel]:
    """What the first process is asked, and the model that holds the version, at every process."""
    version: GlobalModel | None = None
    word, small = b"", b""
    wrong: DareError | None = None
    if ranks.leads:
        try:
            if turn is None:
                raise ConfigError(
                    "the model is sharded (FSDP2), and the message holds whole arrays, of FedAvg "
                    "or of a secure sum; use DareStrategy, or a model in one process"
                )
            version = turn.version()
            known = {**version.local, **turn.own_tensors()}
            word = _described(version, known, turn.order.exclude, turn.order.plan)
            small = _bytes_of(version.dense, known)
        except DareError as error:
            wrong = error
    ranks.told(wrong)
    facts, small = parse_json(ranks.share(word), most=_MOST, cost=_MOST), ranks.share(small)
    shown, own = _read(facts, small, ranks, version)
    plan = None
    if facts["plan"] is not None:
        keys = {key: bytes.fromhex(value) for key, value in facts["keys"].items()}
        plan = plan_from_record({**facts["plan"], **keys})
    return plan, hold(model, shown, own, tuple(facts["exclude"]))


def _described(
    version: GlobalModel, own: Arrays, exclude: tuple[str, ...], plan: RoundPlan | None
) -> bytes:
    """All of a version but its numbers, as JSON: groups, names, and what is asked."""
    groups = version.groups
    record: Mapping[str, Any] = {} if plan is None else plan.to_record()
    facts = {
        "layouts": [
            [[entry.name, entry.shape] for entry in layout.entries]
            for layout in (groups.layout, groups.dense_layout)
        ],
        "local": groups.local,
        "names": groups.names,
        "dtypes": {name: dtype.str for name, dtype in groups.dtypes.items()},
        "copies": dict(groups.copies),
        "ref": asdict(version.ref),
        "own": [[name, array.dtype.str, array.shape] for name, array in own.items()],
        "exclude": exclude,
        "plan": None
        if plan is None
        else {key: value for key, value in record.items() if not isinstance(value, bytes)},
        "keys": {key: value.hex() for key, value in record.items() if isinstance(value, bytes)},
    }
    return json.dumps(facts).encode()


def _bytes_of(dense: np.ndarray, own: Arrays) -> bytes:
    parts = [dense, *own.values()]
    return b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def _read(
    facts: Any, small: bytes, ranks: Ranks, version: GlobalModel | None
) -> tuple[GlobalModel, Arrays]:
    """The version as every process sees it: large tensors are the first one's, read together."""
    layout, dense_layout = (_layout(entries) for entries in facts["layouts"])
    dtypes = {name: np.dtype(word) for name, word in facts["dtypes"].items()}
    groups = Groups(
        layout, dense_layout, tuple(facts["local"]), tuple(facts["names"]), dtypes, facts["copies"]
    )
    dense = np.frombuffer(small, np.float32, dense_layout.size).copy()
    own, at = {}, dense.nbytes
    for name, word, shape in facts["own"]:
        count = int(np.prod(shape, dtype=np.int64))
        own[name] = np.frombuffer(small, np.dtype(word), count, at).reshape(shape).copy()
        at += own[name].nbytes
    source = SharedSource(ranks, layout.size, None if version is None else as_source(version.delta))
    local = {name: own[name] for name in groups.local if name in own}
    named = ModelRef(**facts["ref"])
    return GlobalModel(groups, TiledVector(source), dense, local, named), own


def _layout(entries: Any) -> Layout:
    return layout_of({name: tuple(shape) for name, shape in entries})
