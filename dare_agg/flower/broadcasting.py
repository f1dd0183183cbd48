"""The global model at the server, and what is known of the versions its clients hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from dare_agg.downlink.base import BASE_VERSION
from dare_agg.downlink.protocol import Downlink
from dare_agg.errors import LayoutError
from dare_agg.flower.clients import Client
from dare_agg.flower.decoded import GivenDelta
from dare_agg.flower.lazy import is_untouched, lazy_record, on_disk, record_of
from dare_agg.flower.records import DOWN_PREFIX, ORDER_KEY, REPLY_KEY, read_refusal
from dare_agg.flower.transport import pack, to_numpy, to_record
from dare_agg.rounds.messages import ASK_HELLO, Order
from dare_agg.rounds.plan import RoundPlan
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.model import GlobalModel, Groups, global_model
from dare_agg.vectors.tied import came_apart, sets_of
from dare_agg.vectors.tiled import TiledVector

LOG = logging.getLogger("flwr")


@dataclass
class Broadcasting:
    """Brings the global model to the clients, by ``downlink``.

    ``dense`` and ``exclude`` are the patterns of its groups, ``by_form`` and ``apart`` are as in
    `dare_agg.vectors.model.split_tensors`; ``arrays_key`` and ``config_key`` the app's own
    records. ``have`` maps a node to the version it holds. ``base`` opens the base of a run that
    lies on disk, with these tied tensors apart; ``base_facts`` are what orders say of it.
    """

    downlink: Downlink
    dense: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    arrays_key: str = "arrays"
    config_key: str = "config"
    by_form: bool = True
    apart: tuple[str, ...] = ()
    have: dict[int, str] = field(default_factory=dict)
    base: Callable[[tuple[str, ...]], GlobalModel] | None = None
    base_facts: Mapping[str, str] = field(default_factory=dict)
    _model: GlobalModel | None = None
    _arrays: ArrayRecord | None = None
    _moved_apart: set[str] = field(default_factory=set)
    _as_made: list[tuple[str, Array | bytes]] = field(default_factory=list)
    _packed: dict[str, tuple[bytes, ArrayRecord]] = field(default_factory=dict)

    @property
    def model(self) -> GlobalModel:
        """The newest version; `adopt` comes first."""
        assert self._model is not None
        return self._model

    @property
    def arrays(self) -> ArrayRecord:
        """The newest version as Flower's arrays, made once."""
        if self._arrays is None:
            self._keep(record_of(self.model))
            assert self._arrays is not None
        return self._arrays

    def begin(self) -> None:
        """Begin with the base that lies on disk; where a version of it is held, go on from that."""
        assert self.base is not None
        if self._model is None:
            self.move(self.downlink.start(self.base(self.apart)))

    def adopt(self, arrays: ArrayRecord) -> None:
        """Take over arrays that are not the ones made here, or no longer as they were made.

        Where the run's base lies on disk they are brought as a step of its newest version.
        """
        if self.is_newest(arrays):
            return
        if self.base is not None:
            self.begin()
            self.follow(arrays)
            return
        given = self._model_of(arrays)
        self._model = self.downlink.start(given)
        # A downlink may have rounded the model: then its arrays are not the given ones.
        self._keep(arrays if self._model is given else None)

    def follow(self, arrays: ArrayRecord) -> bool:
        """Go on within a run from arrays that may be others than those of the newest version.

        Returns whether they are. A downlink that keeps versions brings them as a step of its own,
        as close to them as its form comes.
        """
        if self.is_newest(arrays):
            return False
        model = self.model
        arrays = _in_dtypes(arrays, model)
        if on_disk(model):
            return self._follow_on_disk(model, arrays)
        if apart := _apart_in(arrays, model):
            if self.downlink.facts():
                raise LayoutError(
                    f"aggregate_train moved {apart[0]!r} away from its copy in the global model; "
                    f"name one of them in 'dense', or leave the downlink {self.downlink.name!r}"
                )
            self.apart = (*self.apart, *apart)
        given = self._model_of(arrays)
        if given.ref.version == model.ref.version:
            return False
        if not self.downlink.facts():
            self._model = given
            self._keep(arrays)
        elif given.groups == model.groups:
            self.move(
                self.downlink.advance(
                    model, given.delta[:] - model.delta[:], given.dense - model.dense, ()
                )
            )
        else:
            raise LayoutError(
                "aggregate_train returned other tensors than the global model's; the downlink "
                f"{self.downlink.name!r} brings changes of one model: return all of its tensors"
            )
        return True

    def _follow_on_disk(self, model: GlobalModel, arrays: ArrayRecord) -> bool:
        """As `follow`: what an app's own code changed is read tensor by tensor, and no other."""
        groups, known = model.groups, self.arrays
        if set(arrays) != set(groups.names):
            raise LayoutError(
                f"{len(arrays)} tensors were returned, the global model has {len(groups.names)}; a "
                "base on disk stays the run's: return all of its tensors, by their names"
            )
        changed = {
            name: array
            for name, array in arrays.items()
            if array is not known[name] or not is_untouched(array)
        }
        shared = {n: array for n, array in changed.items() if n not in groups.local}
        if not shared:
            return False
        if apart := _apart_in(arrays, model, set(shared)):
            raise LayoutError(
                f"aggregate_train moved {apart[0]!r} away from its copy in the global model; "
                f"name one of them in 'dense', or change both alike"
            )
        given = {groups.copies.get(name, name): array for name, array in shared.items()}
        delta = GivenDelta(groups.layout, model.delta, given, groups)
        dense = GivenDelta(groups.dense_layout, model.dense, given, groups)
        for group in (delta, dense):
            group.check("returned by aggregate_train")
        step = np.empty(dense.size, np.float32)
        dense.read(0, dense.size, step)
        # A store of versions on disk reads it in slices.
        self.move(self.downlink.advance(model, cast(FloatVector, TiledVector(delta)), step, ()))
        return True

    def _keep(self, arrays: ArrayRecord | None) -> None:
        self._arrays = arrays
        self._as_made = _parts(arrays) if arrays is not None else []

    def is_newest(self, arrays: ArrayRecord) -> bool:
        """Whether this is the newest version's record, and the app has put nothing else into it."""
        return arrays is self._arrays and (
            len(arrays) == len(self._as_made)
            and all(
                name == made and data is as_made
                for (name, data), (made, as_made) in zip(_parts(arrays), self._as_made, strict=True)
            )
        )

    def _model_of(self, arrays: ArrayRecord) -> GlobalModel:
        return global_model(
            to_numpy(arrays),
            dense=self.dense,
            exclude=self.exclude,
            by_form=self.by_form,
            apart=self.apart,
        )

    def note_apart(self, reply: Message) -> None:
        """Remember the tied tensors that a client's training moved apart, for `part`."""
        refusal = read_refusal(reply)
        if refusal is not None and self._model is not None:
            self._moved_apart.update(set(refusal.apart) & set(self._model.groups.copies))

    def part(self) -> Groups | None:
        """Keep apart what some training moved apart, from here on; returns the groups before.

        None where there is nothing to do, or nothing can be done: versions that clients keep are
        of one base with its groups. The second time, all tied tensors are parted.
        """
        names, self._moved_apart = self._moved_apart, set()
        model = self._model
        if not names or model is None:
            return None
        if self.downlink.facts() and model.ref.version not in self.downlink.facts().values():
            return None
        if self.apart:
            names = set(model.groups.copies)
        LOG.info(
            "%s: equal in the model that the run started from, and training moves it from its "
            "copies: %d tensors are kept apart from now on",
            min(names),
            len(names),
        )
        self.apart = tuple(sorted({*self.apart, *names}))
        if self.base is not None:
            parted = self.base(self.apart)
        else:
            parted = self._model_of(to_record(model.arrays()))
        self._model = self.downlink.start(parted)
        self._keep(None)
        return model.groups

    def move(self, model: GlobalModel) -> None:
        """Go on to the model after a round."""
        self._model = model
        self._keep(None)

    @property
    def base_version(self) -> str:
        """The name of the base that clients keep versions of, "" where they keep none."""
        return self.downlink.facts().get(BASE_VERSION, "")

    def order(self, ask: str, plan: RoundPlan | None = None) -> Order:
        """What is asked of a client, with the newest version."""
        return Order(
            ask=ask,
            version=self.model.ref.version,
            downlink=self.downlink.name,
            arrays_key=self.arrays_key,
            dense=self.dense,
            exclude=self.exclude,
            by_form=self.by_form,
            apart=self.apart,
            facts={**self.downlink.facts(), **self.base_facts},
            plan=plan,
        )

    def hello(self, config: ConfigRecord) -> RecordDict:
        """The question who a client is, made like any training message but without the model.

        Mods in front of ours find the app's records under its keys; a client may make the base
        by itself from ``config``.
        """
        asked = ConfigRecord(self.order(ASK_HELLO).to_record())
        return RecordDict(
            {self.arrays_key: ArrayRecord(), self.config_key: config, ORDER_KEY: asked}
        )

    def content(self, client: Client, order: Order, config: ConfigRecord) -> RecordDict:
        """The app's own records, the order, and what the downlink says this client needs."""
        have = self.have.get(client.node, client.hello.have)
        broadcast = self.downlink.broadcast(self.model, have)
        self.have[client.node] = broadcast.holds
        asked = ConfigRecord(order.to_record())
        content = RecordDict({self.config_key: config, ORDER_KEY: asked})
        if broadcast.full:
            content[self.arrays_key] = self.arrays
        for name, payload in broadcast.payloads.items():
            # The same bytes for several clients are packed once.
            if self._packed.get(name, (b"", None))[0] is not payload:
                self._packed[name] = (payload, pack(payload))
            content[DOWN_PREFIX + name] = self._packed[name][1]
        return content

    def lost_version(self, node: int, reply: Message, key: str = REPLY_KEY) -> bool:
        """Whether a client cannot make the version from what it was sent, and holds less.

        What it holds is remembered, so that `content` sends what it lacks.
        """
        refusal = read_refusal(reply, key)
        if refusal is None or not refusal.lost or not self.have.get(node):
            return False
        # Named again, it cannot be what the client lacks.
        self.have[node] = "" if refusal.have == self.have[node] else refusal.have
        return True


def _parts(arrays: ArrayRecord) -> list[tuple[str, Array | bytes]]:
    """Names, and what changes when somebody gives an array other data; nothing is read."""
    return [(n, array if is_untouched(array) else array.data) for n, array in arrays.items()]


def _in_dtypes(arrays: ArrayRecord, model: GlobalModel) -> ArrayRecord:
    """The arrays, with floating-point means of integer tensors cut off to integers again."""
    dtypes = model.groups.dtypes
    cut = {
        name: model.groups.from_vector(name, model.groups.into_vector(name, array.numpy()))
        for name, array in arrays.items()
        if name in model.groups.integers and array.numpy().dtype != dtypes[name]
    }
    return lazy_record({**arrays, **to_record(cut)}) if cut else arrays


def _apart_in(
    arrays: ArrayRecord, model: GlobalModel, changed: set[str] | None = None
) -> list[str]:
    """The copies of tied tensors that differ from them here; those of which any was changed."""
    return [
        name
        for names in sets_of(model.groups.copies).values()
        if changed is None or not changed.isdisjoint(names)
        for name in came_apart(names, {n: arrays[n].numpy() for n in names if n in arrays})
    ]
