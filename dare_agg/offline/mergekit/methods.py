"""What each of mergekit's methods is here: a row of ours, its options, each model's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError
from dare_agg.offline.mergekit.settings import Scopes, changed
from dare_agg.offline.mergekit.words import at_line
from dare_agg.offline.parameters import Gradient, Parameter

# multislerp's guard against division by zero.
_EPS = 1e-8


@dataclass(frozen=True)
class Reading:
    """The settings of a file: shared ones and each model's; whether there is a base."""

    shared: Scopes
    own: list[Scopes]
    has_base: bool

    def each(self, key: str, default: float | None = None) -> list[Parameter]:
        """A setting of each model."""
        return [scopes.number(key, default) for scopes in self.own]


@dataclass(frozen=True)
class Said:
    """Values of a recipe, and for each model those of its entry."""

    values: dict[str, Any]
    models: list[dict[str, Any]]


def _weighted(reading: Reading, **values: Any) -> Said:
    return Said(values, [{"weight": weight} for weight in reading.each("weight")])


def _linear(reading: Reading) -> Said:
    normalize = reading.shared.truth("normalize", True)
    return _weighted(reading, method="linear", options={"normalize": normalize})


def _passthrough(reading: Reading) -> Said:
    scales = reading.each("scale", 1.0)
    return Said(
        {"method": "linear", "options": {"normalize": False}}, [{"weight": s} for s in scales]
    )


def _slerp(reading: Reading) -> Said:
    return _bare(reading, method="slerp", options={"t": reading.shared.number("t", None)})


def _nuslerp(reading: Reading) -> Said:
    along = "tensors"
    if not reading.shared.truth("nuslerp_flatten", True):
        along = "columns" if reading.shared.truth("nuslerp_row_wise", False) else "rows"
    return _weighted(reading, method="nuslerp", options={"along": along, "of": _of(reading)})


def _multislerp(reading: Reading) -> Said:
    if reading.shared.plain("eps", _EPS) != _EPS:
        raise at_line(reading.shared.given("eps")[0].line, f"eps is {_EPS:g} here; leave it out")
    normalize = reading.shared.truth("normalize_weights", True)
    options = {"normalize-weights": normalize, "of": _of(reading)}
    return _weighted(reading, method="multislerp", options=options)


def _of(reading: Reading) -> str:
    return "deltas" if reading.has_base else "models"


def _karcher(reading: Reading) -> Said:
    options = {
        "max-iter": int(reading.shared.plain("max_iter", 10)),
        "tol": reading.shared.plain("tol", 1e-5),
    }
    return _bare(reading, method="karcher", options=options)


def _model_stock(reading: Reading) -> Said:
    rows = reading.shared.truth("filter_wise", False)
    return _bare(reading, method="model-stock", options={"filter-wise": rows})


def _sce(reading: Reading) -> Said:
    share = changed(reading.shared.number("select_topk", 1.0), _share)
    return _bare(reading, method="sce", options={"select-topk": share, "least-energy": 1e-6})


def _task(
    reading: Reading, options: dict[str, Any], *, method: str = "task-arithmetic", **values: Any
) -> Said:
    scaling = reading.shared.number("lambda", 1.0)
    return _weighted(reading, method=method, options=options, scaling=scaling, **values)


def _task_arithmetic(reading: Reading) -> Said:
    return _task(reading, {"normalize": reading.shared.truth("normalize", False)})


def _signs(reading: Reading, normalize: bool) -> dict[str, Any]:
    agreeing = reading.shared.truth("normalize", normalize)
    return {"normalize": "agreeing" if agreeing else "none", "sign-tie": "positive"}


def _rescale(reading: Reading, default: bool) -> str:
    return "l1" if reading.shared.truth("rescale", default) else "none"


def _ties(reading: Reading) -> Said:
    options = {
        "trim-scope": "tensor", **_signs(reading, True), "rescale": _rescale(reading, False)
    }  # fmt: skip
    return _with_own(reading, _task(reading, options, method="ties"), density=1.0)


def _dare(reading: Reading, *, signs: bool) -> Said:
    if signs:
        said = _task(reading, {"trim": 0, **_signs(reading, False)}, method="ties")
    else:
        said = _task_arithmetic(reading)
    rates = [_rate(density) for density in reading.each("density", 1.0)]
    rescale = reading.shared.truth("rescale", True)
    sparsifier = "mergekit-dare" if rescale else "drop-only"
    models = [{**model, "drop-rate": rate} for model, rate in zip(said.models, rates, strict=True)]
    return Said({**said.values, "sparsifier": sparsifier, "mask": "bernoulli"}, models)


def without_idle_drops(said: Said) -> Said:
    """A recipe without drop rates where none drops anything."""
    if any(model.get("drop-rate", "0") != "0" for model in said.models):
        return said
    values = {k: v for k, v in said.values.items() if k not in ("sparsifier", "mask")}
    models = [{k: v for k, v in model.items() if k != "drop-rate"} for model in said.models]
    return Said(values, models)


def _della(reading: Reading, *, signs: bool) -> Said:
    options = {
        "sign-consensus": signs, **_signs(reading, signs), "rescale": _rescale(reading, True)
    }  # fmt: skip
    return _with_own(reading, _task(reading, options, method="della"), density=1.0, epsilon=0.15)


def _breadcrumbs(reading: Reading, *, signs: bool) -> Said:
    options = {
        "sign-consensus": signs, **_signs(reading, False), "rescale": _rescale(reading, False)
    }  # fmt: skip
    said = _task(reading, options, method="breadcrumbs")
    return _with_own(reading, said, density=1.0, gamma=0.01)


def _bare(reading: Reading, **values: Any) -> Said:
    return Said(values, [{} for _ in reading.own])


def _with_own(reading: Reading, said: Said, **defaults: float) -> Said:
    """Options of each model; shares above 1 keep all, as 1 does."""
    models = [dict(model) for model in said.models]
    for key, default in defaults.items():
        for model, value in zip(models, reading.each(key, default), strict=True):
            share = changed(value, _share)
            model["options"] = {**model.get("options", {}), key: share}
    return Said(said.values, models)


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def _rate(density: Parameter) -> str | Parameter:
    """The drop rate for a density: decimals where they say it exactly."""
    if not isinstance(density, float):
        return changed(density, _dropped)
    rate = str(1 - Decimal(repr(_share(density)))).removesuffix(".0")
    try:
        parse_drop_rate(rate)
    except ConfigError:
        return Gradient((_dropped(density),))
    return rate


def _dropped(density: float) -> float:
    return float(1 - Decimal(repr(_share(density))))


METHODS: dict[str, Callable[[Reading], Said]] = {
    "linear": _linear,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "sce": _sce,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_linear": partial(_dare, signs=False),
    "dare_ties": partial(_dare, signs=True),
    "della": partial(_della, signs=True),
    "della_linear": partial(_della, signs=False),
    "breadcrumbs": partial(_breadcrumbs, signs=False),
    "breadcrumbs_ties": partial(_breadcrumbs, signs=True),
    "passthrough": _passthrough,
}
