"""A site's half of a round: from an order to the model's arrays, from trained arrays to an answer.

Without NVFlare; `dare_agg.nvflare.filter` carries it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.downlink.base import read_base
from dare_agg.downlink.protocol import Receiver
from dare_agg.downlink.ways import WAYS, Place
from dare_agg.errors import BaseMismatchError, LayoutError, UpdateError
from dare_agg.nvflare.answers import DENSE, DIRECTIONS, UPDATE
from dare_agg.rounds.client import model_of_plan, update_of_arrays
from dare_agg.rounds.messages import Order, Receipt
from dare_agg.vectors.model import Arrays, GlobalModel
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.returned import in_shape_of, returned_tensors

LOG = logging.getLogger(__name__)
# Gives the payloads that bring a site from the version it has to that of its order.
Pull = Callable[[str, str], Mapping[str, bytes]]


@dataclass(frozen=True)
class Site:
    """Who a site is, where it keeps versions, and the base of its own, if it has one."""

    name: str
    folder: Path
    base: Path | None = None


@dataclass(frozen=True)
class Turn:
    """An order that is being followed: the version it asks for, checked against its plan."""

    order: Order
    receiver: Receiver
    version: GlobalModel

    def arrays(self, local: Arrays) -> dict[str, np.ndarray]:
        """What training starts from: copies, and of local tensors the site's own (``local``)."""
        own = {name: local.get(name, array) for name, array in self.version.arrays().items()}
        return {name: np.array(array) for name, array in own.items()}

    def answer(
        self, returned: Mapping[str, Any], *, differences: bool
    ) -> tuple[dict[str, bytes], dict[str, Any], dict[str, np.ndarray]]:
        """The payloads of an answer, its receipt, and the tensors that stay with this site.

        ``returned`` are trained weights by name, or what was added to them (``differences``).
        Raises `LayoutError` for other tensors than the model's or what is no array,
        `NonFiniteError` where training gave a NaN.
        """
        plan = self.order.plan
        assert plan is not None
        start = self.version.arrays()
        arrays = {name: _array(name, value) for name, value in returned.items()}
        given = in_shape_of(start, returned_tensors(start, arrays, plan.terms.exclude))
        if differences:
            given = {n: _added(n, start[n], a) if n in start else a for n, a in given.items()}
        update = update_of_arrays(plan, self.version, given)
        payloads = {UPDATE: update.blob}
        if update.dense_blob is not None:
            payloads[DENSE] = update.dense_blob
        if update.statistics is not None:
            payloads[DIRECTIONS] = update.statistics.blob
        receipt = Receipt.of(
            plan,
            have=self.receiver.have(),
            delta_norm=update.delta_norm,
            delta_max=update.delta_max,
            share_above=update.share_above,
        )
        own, patterns = set(self.version.groups.local), compile_patterns(plan.terms.exclude)
        local = {n: np.array(a) for n, a in given.items() if n in own or matches(n, patterns)}
        return payloads, receipt.to_record(), local


def begin(record: Mapping[str, Any], site: Site, arrays: Arrays | None, pull: Pull) -> Turn:
    """Follow an order up to the version it asks for.

    ``arrays`` are the whole model where the task carried it. Nothing of the order is trusted.
    Raises `UpdateError` for one of other code or malformed, `BaseMismatchError` for a version
    that cannot be reached, `StateError` where the folder is another user's.
    """
    order = Order.read(record)
    plan = order.plan
    if plan is None:
        raise UpdateError(f"this site trains, and was asked to {order.ask!r}", reason="plan")
    place = Place(site.folder, site.name, order.dense, order.exclude, order.by_form, order.apart)
    receiver = WAYS[order.downlink].receive(place, order.facts)
    if receiver.wants_base() and site.base is not None and not _adopted(receiver, site.base):
        LOG.warning("the base in %s is not the one that the job starts from", site.base)
    found = _received(receiver, order.version, arrays, pull)
    version = model_of_plan(plan, found, by_form=order.by_form, apart=order.apart)
    return Turn(order, receiver, version)


def _received(receiver: Receiver, version: str, arrays: Arrays | None, pull: Pull) -> Arrays:
    if arrays is not None:
        return receiver.receive(version, {}, arrays)
    have = receiver.have()
    try:
        return receiver.receive(version, pull(version, have), None)
    except BaseMismatchError as error:
        LOG.info("%s", error)
        # What could not be read was forgotten: less is held now, or nothing is said to be.
        left = receiver.have()
        return receiver.receive(version, pull(version, "" if left == have else left), None)


def _adopted(receiver: Receiver, base: Path) -> bool:
    return receiver.adopt(read_base(base))


def _array(name: str, value: object) -> np.ndarray:
    if not isinstance(value, np.ndarray | np.generic):
        raise LayoutError(
            f"tensor {name!r} came back as a {type(value).__name__}; NumPy arrays are needed: "
            "leave server_expected_format at ExchangeFormat.NUMPY"
        )
    return np.asarray(value)


def _added(name: str, start: np.ndarray, difference: np.ndarray) -> np.ndarray:
    if start.shape != difference.shape:
        raise LayoutError(
            f"the difference of {name!r} has shape {difference.shape}, the model's tensor "
            f"{start.shape}"
        )
    return np.asarray(start + difference, start.dtype)
