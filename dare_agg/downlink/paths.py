"""What brings a client that holds one version to the newest: the fewest bytes of those kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import DropRate
from dare_agg.downlink.base import BASE, DENSE_STEPS, STEPS
from dare_agg.downlink.forms import Form
from dare_agg.downlink.protocol import Broadcast
from dare_agg.downlink.step_form import Families, StepHead
from dare_agg.downlink.steps import Step
from dare_agg.errors import StateError
from dare_agg.vectors.model import GlobalModel


def head_after(
    row: Form, dense_values: str, number: int, version: str, families: Families, rate: DropRate
) -> StepHead:
    """The head of a step from ``version``, whose child and survivors are not known yet."""
    key = derive_key(
        bytes.fromhex(version), "downlink", number, *(family.key for family in families)
    )
    masks = row.step.masks(families, rate, key)
    return StepHead(row.step.name, row.values, dense_values, number, version, NO_NAME, key, masks)


NO_NAME = "00" * 32


def check_newest(model: GlobalModel, version: str) -> None:
    """Raise `StateError` for a model that is not at a store's newest ``version``."""
    if model.ref.version != version:
        raise StateError(
            f"the model is at version {model.ref.version[:12]}, the version store at "
            f"{version[:12]}; resume both from the same round"
        )


def parents_of(steps: Sequence[Step]) -> list[str]:
    """The versions a chain of kept steps leads from, oldest first."""
    return [step.head.parent for step in steps]


def cheapest_path(
    steps: Sequence[Step],
    start: str,
    version: str,
    moved: Callable[[], int],
    summed: Callable[[str], Step],
) -> list[Step]:
    """Return the cheapest steps from ``start`` (a parent of kept ones, or the base).

    ``moved`` says how many parameters are elsewhere than in the base, ``summed`` makes one step
    of all from a version on.
    """
    if start == version:
        return []
    parents = parents_of(steps)
    chain = list(steps[parents.index(start) :]) if start in parents else None
    # A sum takes at least a byte or so for each element that moved.
    if chain is not None and (len(chain) == 1 or nbytes_of(chain) <= moved()):
        return chain
    total = summed(start)
    if chain is not None and nbytes_of(chain) <= total.nbytes:
        return chain
    return [total]


def nbytes_of(path: Sequence[Step]) -> int:
    """Bytes of a path."""
    return sum(step.nbytes for step in path)


def cheapest_broadcast(
    asked: str,
    version: str,
    base_version: str,
    have: str,
    parents: Sequence[str],
    path: Callable[[str], list[Step]],
    moved: Callable[[], int],
    base: Callable[[], bytes] | None,
) -> Broadcast:
    """What a client that holds ``have`` ("" for nothing) is sent to reach ``version``.

    ``base`` gives the base's bytes for one that lacks it; None where the base does not travel.
    Raises `StateError` where ``asked``, the version to be sent, is not the newest.
    """
    if asked != version:
        raise StateError(
            f"version {asked[:12]} is asked for, the store holds {version[:12]}; broadcast only "
            "the newest"
        )
    if have == version:
        return Broadcast(full=False, holds=have)
    # Who names any version holds this run's base too: a client looks for nothing else.
    starts = [have] if have in parents and have != base_version else []
    best = path(starts[0]) if starts else path(base_version)
    # The sum from the base, which costs time, is worth a look where it may be less.
    if starts and nbytes_of(best) > moved():
        best = min(best, path(base_version), key=nbytes_of)
    payloads = {STEPS: _joined([step.body for step in best])} if best else {}
    if dense := _joined([step.dense for step in best]):
        payloads[DENSE_STEPS] = dense
    if not have and base is not None:
        payloads[BASE] = base()
    return Broadcast(full=False, payloads=payloads, holds=have or base_version)


def _joined(parts: Sequence[bytes]) -> bytes:
    # One step is sent from where it lies.
    return parts[0] if len(parts) == 1 else b"".join(parts)
