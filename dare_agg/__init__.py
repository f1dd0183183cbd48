"""dare-agg: federated fine-tuning and private model merging with DARE updates.

The one idea: *a delta is a source of tiles over a layout; an update is such a source whose places
anyone can draw again from a key.* So an update carries no index, and one merge reads deltas in
memory, checkpoints on disk and updates of clients alike, tile by tile, in bounded memory:

>>> import numpy as np
>>> from dare_agg.codec.mask import parse_drop_rate
>>> from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
>>> from dare_agg.merge.engine import merge_deltas
>>> from dare_agg.vectors.layout import fingerprint, layout_of
>>> layout = layout_of({"encoder.weight": (256, 256), "encoder.bias": (256,)})
>>> base, delta = np.zeros(layout.size, "f4"), np.full(layout.size, 0.25, "f4")
>>> def spec(rank):        # what both ends agree on; the rank rotates a client's mask
...     return UpdateSpec(layout.size, parse_drop_rate("0.9"), "stratified",
...                       b"key of the masks", b"key of roundings", rank, "i8",
...                       fingerprint(layout, base), layout.fingerprint)
>>> sent = [encode_update(spec(rank), (base, base + delta)) for rank in (0, 1)]
>>> [len(update) for update in sent], delta.nbytes
([6796, 6796], 263168)
>>> sources = [decode_update(update, spec(rank)) for rank, update in enumerate(sent)]
>>> merged, seen = merge_deltas(layout, sources, "average")
>>> bool(abs(merged.mean() - 0.25) < 0.001), round(seen.touched, 2)
(True, 0.2)

The merged delta is right in expectation though 80 % of its places were dropped by both.

The rooms, from the ground up: `dare_agg.vectors` and `dare_agg.files`; `dare_agg.codec`,
`dare_agg.checkpoint` and `dare_agg.deploy`; `dare_agg.merge`, `dare_agg.downlink`,
`dare_agg.secure` and `dare_agg.privacy`; `dare_agg.rounds` and `dare_agg.offline`;
`dare_agg.flower`, `dare_agg.nvflare` and `dare_agg.runs`; `dare_agg.cli`. No import runs back up.
What is below these needs no Flower, no NVFlare and no torch. `dare_agg.simulate` is a federation in
one process.
"""

import importlib

__version__ = "0.1.0"

# Of what is lent here nothing is imported before it is asked for; types stand in __init__.pyi.
_LENT = {"simulate": "dare_agg.rounds.simulation"}


def __getattr__(name: str) -> object:
    if name not in _LENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LENT[name]), name)
