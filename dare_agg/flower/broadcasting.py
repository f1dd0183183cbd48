"""The global model at the server, and what is known of the versions its clients hold."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from dare_agg.downlink.protocol import Downlink
from dare_agg.errors import LayoutError
from dare_agg.flower.clients import Client
from dare_agg.flower.records import (
    ASK_HELLO,
    DOWN_PREFIX,
    ORDER_KEY,
    REPLY_KEY,
    Order,
    read_refusal,
)
from dare_agg.flower.transport import pack, to_numpy, to_record
from dare_agg.rounds.plan import RoundPlan
from dare_agg.vectors.model import GlobalModel, Groups, global_model
from dare_agg.vectors.tied import came_apart, sets_of

LOG = logging.getLogger("flwr")


@dataclass
class Broadcasting:
    """Brings the global model to the clients, by ``downlink``.

    ``dense`` and ``exclude`` are the patterns of its groups, ``by_form`` and ``apart`` are as in
    `dare_agg.vectors.model.split_tensors`; ``arrays_key`` and ``config_key`` the app's own
    records. ``have`` maps a node to the version it holds.
    """

    downlink: Downlink
    dense: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    arrays_key: str = "arrays"
    config_key: str = "config"
    by_form: bool = True
    apart: tuple[str, ...] = ()
    have: dict[int, str] = field(default_factory=dict)
    _model: GlobalModel | None = None
    _arrays: ArrayRecord | None = None
    _moved_apart: set[str] = field(default_factory=set)
    _as_made: list[tuple[str, bytes]] = field(default_factory=list)
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
            self._keep(to_record(self.model.arrays()))
            assert self._arrays is not None
        return self._arrays

    def adopt(self, arrays: ArrayRecord) -> None:
        """Take over arrays that are not the ones made here, or no longer as they were made."""
        if self._model is not None and self._is_newest(arrays):
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
        if self._is_newest(arrays):
            return False
        model = self.model
        arrays = _in_dtypes(arrays, model)
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

    def _keep(self, arrays: ArrayRecord | None) -> None:
        self._arrays = arrays
        self._as_made = _parts(arrays) if arrays is not None else []

    def _is_newest(self, arrays: ArrayRecord) -> bool:
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
        self._model = self.downlink.start(self._model_of(to_record(model.arrays())))
        self._keep(None)
        return model.groups

    def move(self, model: GlobalModel) -> None:
        """Go on to the model after a round."""
        self._model = model
        self._keep(None)

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
            facts=self.downlink.facts(),
            plan=plan,
        )

    def hello(self, config: ConfigRecord) -> RecordDict:
        """The question who a client is, made like any training message but without the model.

        Mods in front of ours find the app's records under its keys; a client may make the base
        by itself from ``config``.
        """
        asked = self.order(ASK_HELLO).to_record()
        return RecordDict(
            {self.arrays_key: ArrayRecord(), self.config_key: config, ORDER_KEY: asked}
        )

    def content(self, client: Client, order: Order, config: ConfigRecord) -> RecordDict:
        """The app's own records, the order, and what the downlink says this client needs."""
        have = self.have.get(client.node, client.hello.have)
        broadcast = self.downlink.broadcast(self.model, have)
        self.have[client.node] = broadcast.holds
        content = RecordDict({self.config_key: config, ORDER_KEY: order.to_record()})
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


def _parts(arrays: ArrayRecord) -> list[tuple[str, bytes]]:
    return [(name, array.data) for name, array in arrays.items()]


def _in_dtypes(arrays: ArrayRecord, model: GlobalModel) -> ArrayRecord:
    """The arrays, with floating-point means of integer tensors cut off to integers again."""
    dtypes = model.groups.dtypes
    cut = {
        name: model.groups.from_vector(name, model.groups.into_vector(name, array.numpy()))
        for name, array in arrays.items()
        if name in model.groups.integers and array.numpy().dtype != dtypes[name]
    }
    return ArrayRecord({**arrays, **to_record(cut)}) if cut else arrays


def _apart_in(arrays: ArrayRecord, model: GlobalModel) -> list[str]:
    """The copies of tied tensors that differ from them here."""
    return [
        name
        for names in sets_of(model.groups.copies).values()
        for name in came_apart(names, {n: arrays[n].numpy() for n in names if n in arrays})
    ]
