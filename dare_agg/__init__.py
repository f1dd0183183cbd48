"""dare-agg: federated fine-tuning and private model merging with DARE updates.

The core (layout, masks, value formats, updates, merge methods, secure sums) needs numpy
and cryptography only; `dare_agg.flower` is the one part that imports Flower.
"""

__version__ = "0.1.0"
