"""One fine-tuned model: what is left of it after its delta was dropped from.

The paper's first finding. A seed tunes a model of its own (head, rows drawn, order) and draws
the masks; tuned models are kept under the cache folder (``DARE_AGG_CACHE``, default
``~/.cache/dare-agg``). ``wrong_base`` names a task whose tuned model is taken for the base:
the paper's case of models that do not share one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.files.atomic import replace_file
from dare_agg.files.cache import cache_folder
from dare_agg.files.trust import own_folder
from dare_agg.vectors.layout import FloatVector, Layout, layout_of
from dare_agg.vectors.sources import SAFE_DELTA
from simulations.runs.channels import HEAD
from simulations.runs.federated import build
from simulations.runs.sparsifiers import dare, drop_only, magnitude

State = Mapping[str, NDArray[Any]]
SWEEPS = ("dare", "dare-bernoulli", "drop-only", "magnitude", "magnitude-rescaled", "weights")


def tuned_state(settings: Mapping[str, Any], seed: int = 0) -> tuple[Any, State, State]:
    """Return (task, base state, tuned state); trains once, then reads the cached file."""
    from safetensors.numpy import load_file, save

    task = build(dict(settings), seed)
    base = task.initial_state()
    words = json.dumps([dict(settings), seed], sort_keys=True)
    name = hashlib.sha256(words.encode()).hexdigest()[:12]
    path = cache_folder() / f"{task.data.name}-{name}.safetensors"
    if not path.is_file():
        tuned, _, _ = task.train(base, np.arange(len(task.train_rows)), seed=(seed, 1))
        own_folder(path.parent, remedy="set DARE_AGG_CACHE to a folder of this user's own")
        replace_file(path, (save(dict(tuned)),))
    return task, base, load_file(str(path))


def body_layout(state: State) -> Layout:
    """The layout of everything but the task's head."""
    import re

    return layout_of({n: a.shape for n, a in state.items() if not re.search(HEAD, n)})


def dropped(
    sweep: str, base: FloatVector, delta: FloatVector, drop_rate: str, layout: Layout, seed: int
) -> FloatVector:
    """Return the parameters after a sweep's way of dropping; seed draws the mask."""
    kind = "bernoulli" if sweep == "dare-bernoulli" else "stratified"
    key = derive_key(seed_secret(seed), "mask")
    mask = Mask(kind, delta.size, parse_drop_rate(drop_rate), key)
    if sweep.startswith("dare"):
        return base + dare(delta, mask)
    if sweep == "drop-only":
        return base + drop_only(delta, mask)
    if sweep == "weights":  # the control: the tuned parameters themselves are masked
        return dare(base + delta, mask)
    if sweep in ("magnitude", "magnitude-rescaled"):
        return base + magnitude(delta, drop_rate, layout, rescale=sweep != "magnitude")
    raise ConfigError(f"sweep {sweep!r} is unknown{did_you_mean(sweep, SWEEPS)}")


def run_row(row: Any) -> dict[str, Any]:
    """Measure accuracy by sweep and drop rate on one task, with model and masks of one seed."""
    settings = row.settings
    task, base, tuned = tuned_state(settings["task"], row.seed)
    layout = body_layout(base)
    if settings["wrong_base"]:
        base = tuned_state(settings["wrong_base"], row.seed)[2]
    start, delta = layout.flatten(base), layout.flatten(tuned)
    delta -= start
    heads = {name: array for name, array in tuned.items() if name not in layout}
    del base, tuned  # for a language model half a gigabyte each

    def score(vector: FloatVector) -> dict[str, float | None]:
        scores = task.evaluate({**layout.unflatten(vector), **heads})
        loss = round(scores["loss"], 4) if np.isfinite(scores["loss"]) else None
        return {"accuracy": round(scores["accuracy"], 4), "loss": loss}

    points: list[dict[str, Any]] = [
        {"sweep": "tuned", "drop_rate": "0", **score(start + delta)},
        {"sweep": "base", "drop_rate": "1", **score(start)},
    ]
    for sweep in settings["sweeps"]:
        for rate in settings["drop_rates"]:
            vector = dropped(sweep, start, delta, rate, layout, row.seed)
            points.append({"sweep": sweep, "drop_rate": rate, **score(vector)})
    return {
        "task": task.data.name,
        "accuracy": points[0]["accuracy"],
        "test_rows": len(task.test_rows),
        "parameters": layout.size,
        "points": points,
        "delta": delta_range(delta),
    }


def delta_range(delta: FloatVector) -> dict[str, Any]:
    """How large a delta's elements are: quantiles and histogram of those that moved."""
    sizes = np.abs(delta)
    moved = sizes[sizes > 0]
    edges = np.arange(-9, 0.01, 0.25)  # of log10 |δ|; what is smaller counts with the first
    counts, _ = np.histogram(np.clip(np.log10(moved), -9, -1e-6), edges)
    return {
        "quantiles": {
            str(q): float(np.quantile(moved, q)) for q in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
        },
        "log10_edges": [float(edge) for edge in edges],
        "log10_shares": [round(float(count) / delta.size, 6) for count in counts],
        "share_above_0.005": float(np.mean(sizes > SAFE_DELTA)),
        "exact_zeros": float(np.mean(sizes == 0)),
    }
