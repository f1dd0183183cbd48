"""A tuned model's delta in few bytes, where DARE alone breaks the model: ways beside each other.

Large deltas, small models, a tenth of a bit a parameter and less. Each way sends a delta in at
most so many bits a parameter, coded for real, and the model that arrives is measured:

- ``uniform``: the library's update in one bit a survivor;
- ``own``: the same with keep rates by tensor;
- ``low-rank``: the leading singular directions of each matrix, in four bits a value and a binary16
  scale each, and nothing else. Which ones, over all matrices, is said by σ² a byte;
- ``low-rank+own``: half the bytes for those directions, half for an update (``own``) of what they
  leave;
- any of these with ``+fit``: what arrives times the factor of `FACTORS` that brings the least loss
  on `FIT_ROWS` of the client's own rows (the client knows what will arrive, and scales its delta
  before it is coded: no byte; as DAREx-q chooses its 1/q, Deng et al. 2024);
- ``bitdelta``: every value's sign and one scale a tensor (Liu et al. 2024), one bit a parameter
  whatever the budget;
- ``low-rank b2``: the same directions in two bits, and tensors that are no matrix in one
  (`simulations.runs.hard_factors`); ``delta-come`` in 8, 3 and 2 bits (Ping et al. 2024);
- ``largest``: signs of the largest elements with Golomb-coded positions, and
  ``largest+uniform``: a quarter of the bytes for the largest in binary16, the others for an update
  of the rest; ``ultradelta`` (Wang et al. 2025; `simulations.runs.hard_positions`).

What these send is less than the delta, so that ``+fit`` chooses among `LONGER` for them. Two more
train anew, knowing what will be sent (`simulations.runs.hard_learning`):

- ``survivors b2`` (b1, b4): only the elements that will survive learn, and travel unscaled in that
  format;
- ``pulled``: each step is followed by a pull of the delta to zero (AdamR-L2), then ``uniform``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.budget import plan_budget
from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.fitted_rates import fitted_rates, levels_of, tensor_squares
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec, decode_update, encode_update
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.vectors.layout import FloatVector, Layout
from simulations.runs.hard_factors import Pair, delta_come, factors
from simulations.runs.hard_learning import State, learned, pulled, resent, survivors_spec
from simulations.runs.hard_positions import largest, ultradelta
from simulations.runs.single import body_layout, tuned_state

FACTORS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15)
LONGER = (1.0, 1.4, 2.0, 3.0, 4.5, 7.0, 10.0)
SHRUNK: Mapping[str, Callable[[FloatVector, Layout, int, int], Pair]] = {
    "low-rank b2": lambda d, layout, nbytes, seed: factors(d, layout, nbytes, seed, 2),
    "delta-come": lambda d, layout, nbytes, seed: delta_come(d, layout, nbytes),
    "largest": lambda d, layout, nbytes, seed: largest(d, layout, nbytes, exact=False),
}
TRAINED = ("survivors b1", "survivors b2", "survivors b4", "pulled")
WAYS = (
    "uniform", "own", "low-rank", "low-rank+own", "bitdelta", "largest+uniform", "ultradelta",
    *SHRUNK,
)  # fmt: skip
FIT_ROWS = 100
_NOBODY = "0" * 64
_FACTORS = "b4"


def sent(
    delta: FloatVector, layout: Layout | None, nbytes: int, seed: int, *, by_tensor: bool
) -> Pair:
    """The library's update of at most so many bytes, in one bit a survivor."""
    budget = plan_budget(delta.size, nbytes=nbytes)
    rates = None
    if by_tensor and layout is not None:
        levels = levels_of(layout.sizes, tensor_squares(layout.sizes, delta))
        rates = fitted_rates(layout.sizes, levels, budget.drop_rate, budget.values)
    return _coded(delta, budget.drop_rate, budget.values, seed, rates)


def _coded(delta: FloatVector, rate: Any, values: str, seed: int, rates: Any = None) -> Pair:
    key = derive_key(seed_secret(seed), "hard")
    spec = UpdateSpec(
        delta.size, rate, "stratified", key, key, 0, values, _NOBODY, _NOBODY, rates=rates
    )
    blob = encode_update(spec, delta)
    out = np.empty(delta.size, np.float32)
    decode_update(blob, spec).read(0, delta.size, out)
    return out, len(blob)


def low_rank(delta: FloatVector, layout: Layout, nbytes: int, seed: int) -> Pair:
    """The leading singular directions over all matrices that fit, in four bits a value."""
    matrices: dict[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {}
    offered: list[tuple[float, str, int, float]] = []
    for entry in layout.entries:
        if len(entry.shape) < 2 or min(entry.shape[0], entry.size // entry.shape[0]) < 2:
            continue
        matrix = delta[entry.offset : entry.stop].reshape(entry.shape[0], -1).astype(np.float64)
        left, sigma, right = _directions(matrix)
        matrices[entry.name] = left, sigma, right
        cost = sum(matrix.shape) / 2 + 3
        offered += [(s * s / cost, entry.name, k, cost) for k, s in enumerate(sigma.tolist())]
    offered.sort(key=lambda one: (-one[0], one[1], one[2]))
    chosen: dict[str, int] = {}
    room = nbytes - 256.0  # header, and the scales of the blocks are in the cost
    for worth, name, _, cost in offered:
        if worth <= 0 or cost > room:
            break
        chosen[name] = chosen.get(name, 0) + 1
        room -= cost
    out = np.zeros(delta.size, np.float32)
    if not chosen:
        return out, 0
    parts = []
    for name, rank in chosen.items():
        left, _, right = matrices[name]
        # Unit vectors of one size a value: blocks of the code cross them.
        parts += [left[:, :rank].T * np.sqrt(left.shape[0]), right[:rank] * np.sqrt(right.shape[1])]
    flat = np.concatenate([part.ravel() for part in parts]).astype(np.float32)
    coded, size = _coded(flat, parse_drop_rate(0), _FACTORS, seed)
    at = 0
    for name, rank in chosen.items():
        entry = layout[name]
        matrix = delta[entry.offset : entry.stop].reshape(entry.shape[0], -1)
        left = coded[at : at + rank * matrix.shape[0]].reshape(rank, -1)
        at += left.size
        right = coded[at : at + rank * matrix.shape[1]].reshape(rank, -1)
        at += right.size
        lengths = np.square(left).sum(1) * np.square(right).sum(1)
        scale = np.einsum("km,mn,kn->k", left, matrix, right, optimize=True) / lengths
        scale = scale.astype(np.float16).astype(np.float32)
        out[entry.offset : entry.stop] = ((left * scale[:, None]).T @ right).ravel()
        size += 2 * rank
    return out, size


def _directions(matrix: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Singular vectors and values, by the smaller Gram matrix."""
    if matrix.shape[0] < matrix.shape[1]:
        right, sigma, left = _directions(matrix.T)
        return left.T, sigma, right.T
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    order = np.argsort(values)[::-1]
    sigma = np.sqrt(np.maximum(values[order], 0))
    right = vectors[:, order].T
    left = matrix @ right.T / np.maximum(sigma, 1e-30)
    return left, sigma, right


def bitdelta(delta: FloatVector, layout: Layout) -> Pair:
    """Signs and a scale a tensor."""
    out = np.empty_like(delta)
    for entry in layout.entries:
        part = delta[entry.offset : entry.stop]
        out[entry.offset : entry.stop] = np.sign(part) * np.abs(part).mean()
    return out, delta.size // 8 + 2 * len(layout.entries)


def arrived(way: str, delta: FloatVector, layout: Layout, nbytes: int, seed: int) -> Pair:
    """What arrives of a delta by one of `WAYS`, and its bytes."""
    if way in ("uniform", "own"):
        return sent(delta, layout, nbytes, seed, by_tensor=way == "own")
    if way == "bitdelta":
        return bitdelta(delta, layout)
    if way == "low-rank":
        return low_rank(delta, layout, nbytes, seed)
    if way == "low-rank+own":
        first, size = low_rank(delta, layout, nbytes // 2, seed)
        rest, more = sent(delta - first, layout, nbytes - size, seed, by_tensor=True)
        return first + rest, size + more
    if way == "largest+uniform":
        first, size = largest(delta, layout, nbytes // 4, exact=True)
        rest, more = sent(delta - first, layout, nbytes - size, seed, by_tensor=False)
        return first + rest, size + more
    if way == "ultradelta":
        return ultradelta(delta, layout, nbytes, seed)
    if way in SHRUNK:
        return SHRUNK[way](delta, layout, nbytes, seed)
    raise ConfigError(f"way {way!r} is unknown{did_you_mean(way, (*WAYS, *TRAINED))}")


def _trained(
    way: str, task: Any, base: State, layout: Layout, nbytes: int, seed: int
) -> tuple[FloatVector, int, State]:
    """What arrives of a training for the way, its bytes, and the head, which travels whole."""
    if way == "pulled":
        state = pulled(task, base, layout, seed)
        change = layout.flatten(state) - layout.flatten(base)
        pair = sent(change, layout, nbytes, seed, by_tensor=False)
    else:
        spec = survivors_spec(layout.size, nbytes, way.split()[1], seed)
        state = learned(task, base, layout, spec, seed)
        pair = resent(spec, layout.flatten(state) - layout.flatten(base))
    return *pair, {name: array for name, array in state.items() if name not in layout}


def run_row(row: Any) -> dict[str, Any]:
    """Measure a tuned model of one seed as it arrives by each way in each budget."""
    settings: Mapping[str, Any] = row.settings
    task, base, tuned = tuned_state(settings["task"], row.seed)
    layout = body_layout(base)
    start, delta = layout.flatten(base), layout.flatten(tuned)
    delta -= start
    heads = {name: array for name, array in tuned.items() if name not in layout}
    length = float(np.square(delta, dtype=np.float64).sum())

    def score(moved: FloatVector, heads: Any = heads) -> dict[str, float | None]:
        scores = task.evaluate({**layout.unflatten(start + moved), **heads})
        loss = round(scores["loss"], 4) if np.isfinite(scores["loss"]) else None
        return {"accuracy": round(scores["accuracy"], 4), "loss": loss}

    rows = np.arange(min(FIT_ROWS, len(task.train_rows)))

    def fitted(moved: FloatVector, choices: Sequence[float], heads: Any) -> float:
        def loss(factor: float) -> float:
            state = {**layout.unflatten(start + np.float32(factor) * moved), **heads}
            found = float(task.evaluate(state, rows, split="train")["loss"])
            return found if np.isfinite(found) else np.inf

        return min(choices, key=loss)

    points: list[dict[str, Any]] = [
        {"way": "tuned", **score(delta)},
        {"way": "base", **score(np.zeros_like(delta))},
    ]
    for way in settings["ways"]:
        for bits in settings["bits"] if way != "bitdelta" else [1.0]:
            plain, nbytes, own = way.removesuffix("+fit"), int(bits * delta.size / 8), heads
            if plain in TRAINED:
                moved, size, own = _trained(plain, task, base, layout, nbytes, row.seed)
            else:
                moved, size = arrived(plain, delta, layout, nbytes, row.seed)
            choices = LONGER if plain in SHRUNK else FACTORS
            factor = fitted(moved, choices, own) if way != plain else 1.0
            moved *= np.float32(factor)
            error = float(np.square(moved - delta, dtype=np.float64).sum()) / length
            points.append(
                {
                    "way": way,
                    "bits": bits,
                    "bytes": size,
                    "bits_a_parameter": round(8 * size / delta.size, 5),
                    "factor": factor,
                    "nmse": round(error, 4),
                    **score(moved, own),
                }
            )
    tensors = sum(len(e.shape) >= 2 for e in layout.entries)
    return {
        "task": task.data.name,
        "accuracy": points[0]["accuracy"],
        "test_rows": len(task.test_rows),
        "parameters": layout.size,
        "matrices": tensors,
        "points": points,
    }
