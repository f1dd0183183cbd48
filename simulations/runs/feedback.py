"""Error feedback: a client keeps what it did not send and adds it to its next delta.

    y = δ + e,   send the survivors of y as they are,   e ← y − what the receiver decodes

(Seide et al. 2014; Karimireddy et al., arXiv 1901.09847.) Multiplied by 1/(1−p), the memory e
would grow from round to round. Not part of the library: DARE's own rescale does better in every
run measured (docs/RESULTS.md, "Where DARE loses").
"""

from __future__ import annotations

from dare_agg.codec.update import Update
from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import FloatVector


def unsent(update: Update, wanted: FloatVector) -> FloatVector:
    """Return ``wanted`` less what a receiver of ``update`` sees, in place.

    Raises `ConfigError` where the receiver rescales.
    """
    if update.spec.rescale:
        raise ConfigError("feedback with rescaled survivors diverges; set rescale to false")
    update.add(0, wanted.size, wanted, -1.0)
    return wanted
