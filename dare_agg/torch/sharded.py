"""The update of a model that lies in pieces over processes (FSDP2), made by all of them.

Each gathers the survivors it answers for. Groups of 65,536 survivors are encoded by the
processes in turn, who are sent what the others hold of them; the leader gets coded bytes. No
process sees a whole tensor, and the update has the bits of the whole model's.
"""

from __future__ import annotations

import numpy as np

from dare_agg.codec.mask import Mask
from dare_agg.codec.payload import encode_values, payload_bytes
from dare_agg.codec.rotation import GROUP
from dare_agg.codec.update import UpdateSpec, seal_update
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.errors import ConfigError, DareError, LayoutError
from dare_agg.torch.delta import Measured, TrainedDelta
from dare_agg.torch.ranks import Ranks
from dare_agg.vectors.layout import FloatVector
from dare_agg.vectors.sources import Positions, take

# A survivor on its way: its place in the group, its value.
_PLACE, _VALUE = np.dtype("<u2"), np.dtype("<f4")


def encode_shared(spec: UpdateSpec, delta: TrainedDelta, ranks: Ranks) -> bytes:
    """Encode a delta of which every process holds a part; the update at the leader, else b"".

    Raises as `dare_agg.codec.update.encode_update`, at every process, and `LayoutError` where an
    element has no process that answers for it, or two.
    """
    if delta.size != spec.size:
        raise ConfigError(f"delta of {delta.size} elements; the update needs {spec.size}")
    mask = spec.draw_mask()
    survivors = mask.survivors
    payload = np.zeros(payload_bytes(spec.values, survivors), np.uint8)
    wrong: DareError | None = None
    for first in range(0, -(-survivors // GROUP), ranks.count):
        parcels = [_parcel(delta, _positions(mask, first + turn)) for turn in range(ranks.count)]
        arrived = ranks.exchange(parcels)
        mine = first + ranks.rank
        size = min(GROUP, survivors - mine * GROUP)
        if size <= 0 or wrong is not None:
            continue
        try:
            values = _unpacked(arrived, size)
            spec.scale(values, mine * GROUP, down=True)
            key, out, most = spec.values_key, payload.data, spec.most_coded
            encode_values(spec.values, iter([values]), survivors, key, out, mine, most)
        except DareError as error:
            wrong = error
    ranks.agree(wrong)
    joined = ranks.joined(payload)
    if not ranks.leads:
        return b""
    begin = HEADER_BYTES + spec.table_bytes
    update = bytearray(begin + joined.size)
    update[begin:] = joined.data
    seal_update(spec, memoryview(update))
    return bytes(update)


def measure_shared(delta: TrainedDelta, ranks: Ranks) -> Measured:
    """What all processes measure together, at each of them; raises as `TrainedDelta.measure`."""
    found, wrong = Measured(0.0, 0.0, 0), None
    try:
        found = delta.measure()
    except DareError as error:
        wrong = error
    ranks.agree(wrong)
    own = np.array([found.squares, found.largest, found.above], np.float64).tobytes()
    all_found = np.array([np.frombuffer(row) for row in ranks.exchange([own] * ranks.count)])
    squares, largest, above = all_found.T
    return Measured(float(squares.sum()), float(largest.max()), int(above.sum()))


def _positions(mask: Mask, group: int) -> Positions:
    found = [np.empty(0, np.int64)]
    found += [block.copy() for block, _ in mask.blocks(group * GROUP, (group + 1) * GROUP)]
    return np.concatenate(found)


def _parcel(delta: TrainedDelta, positions: Positions) -> bytes:
    """The survivors of a group that this process answers for."""
    start = take(delta.start, positions)
    spoken = delta.spoken(positions)
    values = delta.changes(positions[spoken], start[spoken])
    return spoken.astype(_PLACE).tobytes() + values.astype(_VALUE, copy=False).tobytes()


def _unpacked(parcels: list[bytes], size: int) -> FloatVector:
    """Join what the processes hold of a group."""
    values = np.zeros(size, np.float32)
    met = np.zeros(size, np.int64)
    for parcel in parcels:
        count = len(parcel) // (_PLACE.itemsize + _VALUE.itemsize)
        places = np.frombuffer(parcel, _PLACE, count)
        values[places] = np.frombuffer(parcel, _VALUE, count, count * _PLACE.itemsize)
        met[places] += 1
    if not (met == 1).all():
        at = int(np.argmax(met != 1))
        raise LayoutError(
            f"{met[at]} processes answer for survivor {at} of a group, one must; shard all of the "
            "model over all processes of the default group"
        )
    return values
