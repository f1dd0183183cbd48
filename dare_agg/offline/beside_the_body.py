"""What models have beside their body, of which OUT has BASE's: task heads, steps after the body."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dare_agg.checkpoint import Left, open_checkpoint
from dare_agg.checkpoint.carried import HEAD_NAME, steps_of
from dare_agg.checkpoint.reader import WEIGHTS_NAME
from dare_agg.errors import DareError
from dare_agg.files.json_text import read_json


def left_beside(base: Path | None, models: Sequence[Path], out: Path) -> Iterator[Left]:
    """Name the heads of models, and steps of sentence-transformers that are not as BASE's.

    ``1_Pooling`` has no weights, ``2_Dense`` some; both decide what an embedding is.
    """
    for model in models:
        if (model / HEAD_NAME).is_file():
            yield Left(str(model / HEAD_NAME), "heads are not merged: copy the one you need")
        if base is None:
            continue
        for step in steps_of(base):
            config, weights = f"{step}/config.json", f"{step}/{WEIGHTS_NAME}"
            if _values(model / config) not in (None, _values(base / config)):
                yield Left(str(model / config), "it is not as BASE's, which OUT has")
            if not (model / weights).is_file() or _same(base / weights, model / weights):
                continue
            yield Left(
                str(model / weights),
                "its weights are not BASE's, which OUT has; to merge them, too: dare-agg merge "
                f"{base / weights} {model / weights} -o {out / weights} --force",
            )


def _values(file: Path) -> object:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _same(one: Path, other: Path) -> bool:
    try:
        a, b = open_checkpoint(one), open_checkpoint(other)
    except (DareError, OSError):
        return False
    return (a.shapes, a.dtypes) == (b.shapes, b.dtypes) and all(
        np.array_equal(a.raw(name), b.raw(name)) for name in a.names
    )
