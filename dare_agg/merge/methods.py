"""The table of merge methods: names, formulas, options, references."""

from __future__ import annotations

from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.merge.fisher import fisher
from dare_agg.merge.linear import average, linear, task_arithmetic
from dare_agg.merge.linears import AVERAGED, LINEARS
from dare_agg.merge.nuslerp import nuslerp
from dare_agg.merge.regmean import regmean
from dare_agg.merge.row import Method, Option
from dare_agg.merge.selective import breadcrumbs, della, sce
from dare_agg.merge.spectral import iso_c, knots, tsv_m
from dare_agg.merge.spherical import karcher, model_stock, multislerp, slerp
from dare_agg.merge.ties import ties
from dare_agg.merge.wudi import wudi

_DENSITY = Option(
    1.0, "share of each delta that is kept", low=0, high=1, per_model=True, by_tensor=True
)
_RESCALE = Option(
    "none",
    "restore this norm of each delta after trimming (mergekit; true is l1)",
    ("none", "l1", "l2", "linf"),
    also={"true": "l1", "false": "none"},
)
_SIGNS = Option(True, "elect signs and erase those that disagree, as ties does")
_SIGN_TIE = Option(
    "majority",
    "an exact zero sum takes the majority sign (0 where that is 0; negative in "
    "majority-or-negative), or counts as +",
    ("majority", "majority-or-negative", "positive"),
)
# mergekit's true and false.
_AGREEING_OR_NOT = {"true": "agreeing", "false": "none"}
_NORMALIZE = Option(
    "agreeing",
    "divide by the weight of the models that agree; by the weight that models have at an element "
    "on average, once a share of elements is dropped; or not; max takes the largest",
    ("agreeing", "expected", "none", "max"),
    also=_AGREEING_OR_NOT,
)
_OF = Option("deltas", "interpolate the deltas or whole models", ("deltas", "models"))
_LINEARS = {
    "linears": Option(LINEARS, "names of the Linears, of two dimensions", pattern=True),
    "averaged": Option(AVERAGED, "names that are averaged nevertheless", pattern=True),
    "transposed": Option(
        "", "names of Linears that lie (in, out); else found by their biases", pattern=True
    ),
}
_OFTEN_PLUS = Option("positive", _SIGN_TIE.help, _SIGN_TIE.choices)

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(
            "average",
            "base + λ·Σ w·δ, w = 1/n",
            "https://arxiv.org/abs/2203.05482",
            average,
            {},
            mean=True,
            federated={},
        ),
        Method(
            "task-arithmetic",
            "base + λ·Σ w·δ, w = 1",
            "https://arxiv.org/abs/2212.04089",
            task_arithmetic,
            {"normalize": Option(False, "divide by the sum of the weights")},
            federated={},
        ),
        Method(
            "ties",
            "base + λ·mean of the trimmed entries that agree with sign(Σ w·δ)",
            "https://arxiv.org/abs/2306.01708",
            ties,
            {
                "trim": Option(
                    None,
                    "share of each delta removed, smallest first",
                    low=0,
                    high=1,
                    per_model=True,
                    by_tensor=True,
                    usual=0.8,
                ),
                "density": Option(
                    None,
                    "share of each delta kept: mergekit's count for 1 - trim",
                    low=0,
                    high=1,
                    per_model=True,
                    by_tensor=True,
                ),
                "trim-scope": Option(
                    "model", "rank over the whole model or each tensor", ("model", "tensor")
                ),
                "normalize": _NORMALIZE,
                "sign-tie": _SIGN_TIE,
                "rescale": _RESCALE,
                "elect": Option(
                    "sum", "signs by the sum of the entries or by their count", ("sum", "count")
                ),
            },
            # DARE has dropped already; the expected count does not let the result grow with
            # 1/(1-p) from round to round.
            federated={"trim": 0.0, "normalize": "expected"},
        ),
        Method(
            "fisher",
            "base + λ·Σ c·(F+ε)·δ / Σ c·(F+ε), c = 1/n",
            "https://arxiv.org/abs/2111.09832",
            fisher,
            {
                "epsilon": Option(1e-6, "added to the Fisher values", low=1e-30),
                "normalize": Option(False, "divide each model's weight by its Fisher norm"),
            },
            mean=True,
            statistics="fisher",
            shared_mask=True,
            federated={},
        ),
        Method(
            "regmean",
            "each Linear: (Σ G)⁻¹·Σ G·Wᵀ, G = XᵀX/rows; the rest averaged",
            "https://arxiv.org/abs/2212.09849",
            regmean,
            {
                "off-diagonal": Option(0.9, "factor of G's off-diagonal entries", low=0, high=1),
                "ridge": Option(
                    1e-8, "share of G's mean diagonal that pulls towards the mean", low=0
                ),
            },
            mean=True,
            statistics="gram",
            federated={},
        ),
        Method(
            "wudi",
            "each Linear: (Σ w·δ·G)·(Σ w·G)⁻¹, G = δᵀδ/‖δ‖², w = 1/n; the rest averaged",
            "https://arxiv.org/abs/2503.08099",
            wudi,
            {
                "ridge": Option(
                    0.1,
                    "share of the Gram matrices' mean diagonal that pulls towards the mean",
                    low=1e-9,
                ),
                **_LINEARS,
                "gram": Option(
                    "whole",
                    "with a drop rate: Gram matrices of the whole deltas, or of the dropped ones",
                    ("whole", "dropped"),
                ),
            },
            mean=True,
            own_grams=True,
            # Of the directions that clients send.
            federated={},
        ),
        Method(
            "iso-c",
            "each Linear: λ·mean(σ)·U·Vᵀ of Σ w·δ = U·σ·Vᵀ; the rest averaged",
            "https://arxiv.org/abs/2502.04959",
            iso_c,
            _LINEARS,
        ),
        Method(
            "tsv-m",
            "each Linear: λ·U·σ·Vᵀ of each δ's leading triples, U and V made orthogonal; the rest "
            "averaged",
            "https://arxiv.org/abs/2412.00081",
            tsv_m,
            {
                "share": Option(
                    None,
                    "share of each delta's singular triples that is kept",
                    low=1e-6,
                    high=1,
                    usual="1/models",
                ),
                **_LINEARS,
            },
        ),
        Method(
            "knots",
            "each Linear: λ·U·TIES(Uᵀδ) in the left singular vectors U of [δ …]; the rest averaged",
            "https://arxiv.org/abs/2410.19735",
            knots,
            {
                "trim": Option(
                    0.8,
                    "share of each aligned delta removed, smallest first",
                    low=0,
                    high=1,
                    per_model=True,
                ),
                **_LINEARS,
            },
        ),
        Method(
            "linear",
            "Σ w·θ, divided by Σ w",
            "https://arxiv.org/abs/2203.05482",
            linear,
            {"normalize": Option(True, "divide by the sum of the weights")},
            whole=True,
            writes_models=True,
        ),
        Method(
            "slerp",
            "sin((1-t)φ)/sin φ·a + sin(tφ)/sin φ·b for each tensor",
            "https://en.wikipedia.org/wiki/Slerp",
            slerp,
            {
                "t": Option(
                    0.5, "0 is the first model (BASE if one is given), 1 the second", by_tensor=True
                )
            },
            writes_models=True,
        ),
        Method(
            "nuslerp",
            "sin((1-t)φ)/sin φ·a + sin(tφ)/sin φ·b of two deltas, t = w_b/(w_a + w_b)",
            "https://en.wikipedia.org/wiki/Slerp",
            nuslerp,
            {
                "along": Option(
                    "tensors",
                    "one angle for each tensor, each row (of the last dimension) or each column",
                    ("tensors", "rows", "columns"),
                ),
                "of": _OF,
            },
            writes_models=True,
        ),
        Method(
            "multislerp",
            "interpolation of the deltas' directions on the sphere, for each tensor",
            "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
            multislerp,
            {"normalize-weights": Option(True, "divide the weights by their sum"), "of": _OF},
            writes_models=True,
        ),
        Method(
            "karcher",
            "Karcher mean of the models' directions times their mean norm, for each tensor",
            "https://arxiv.org/abs/2603.04972",
            karcher,
            {
                "max-iter": Option(10, "iterations at most", low=1, high=10_000),
                "tol": Option(1e-5, "angle at which to stop", low=0),
            },
            mean=True,
            whole=True,
            writes_models=True,
        ),
        Method(
            "model-stock",
            "base + λ·t·mean δ, t = n·cos φ/(1+(n-1)·cos φ), for each tensor",
            "https://arxiv.org/abs/2403.19522",
            model_stock,
            {"filter-wise": Option(False, "one angle for each row instead of each tensor")},
            mean=True,
        ),
        Method(
            "breadcrumbs",
            "base + λ·Σ w·δ without the top gamma and below the next density of each tensor",
            "https://arxiv.org/abs/2312.06795",
            breadcrumbs,
            {
                "density": _DENSITY,
                "gamma": Option(
                    0.01,
                    "share of the largest entries removed",
                    low=0,
                    high=1,
                    per_model=True,
                    by_tensor=True,
                ),
                "rescale": _RESCALE,
                "sign-consensus": Option(False, _SIGNS.help),
                "normalize": Option(
                    "none", _NORMALIZE.help, _NORMALIZE.choices, also=_AGREEING_OR_NOT
                ),
                "sign-tie": _OFTEN_PLUS,
            },
        ),
        Method(
            "della",
            "base + λ·Σ w·δ, dropped at random, less likely the larger in their row",
            "https://arxiv.org/abs/2406.11617",
            della,
            {
                "density": Option(
                    0.5, _DENSITY.help, low=0, high=1, per_model=True, by_tensor=True
                ),
                "epsilon": Option(
                    0.15,
                    "half the range of keep probabilities",
                    low=0,
                    high=0.5,
                    per_model=True,
                    by_tensor=True,
                ),
                "rescale": Option(
                    "keep",
                    "divide by the keep probability, restore the L1 norm (mergekit), or not",
                    ("keep", "l1", "none"),
                ),
                "sign-consensus": _SIGNS,
                "normalize": Option(
                    "expected", _NORMALIZE.help, _NORMALIZE.choices, also=_AGREEING_OR_NOT
                ),
                "sign-tie": _OFTEN_PLUS,
                "seed": Option(0, "seed of the drops", low=0, high=2**53),
            },
        ),
        Method(
            "sce",
            "base + λ·Σ w·δ where the models vary most, w ~ mean δ² of the tensor, signs elected",
            "https://arxiv.org/abs/2408.07990",
            sce,
            {
                "select-topk": Option(
                    1.0, "share of the elements by variance", low=0, high=1, by_tensor=True
                ),
                "least-energy": Option(
                    0.0,
                    "below this Σ mean δ² of a tensor weights are equal (mergekit: 1e-6)",
                    low=0,
                ),
            },
        ),
    )
}


# What mergekit calls methods of its own are rows with options here.
_MERGEKIT_NAMES = {
    "dare-linear": "task-arithmetic --drop-rate P",
    "dare-ties": "ties --option trim=0 --drop-rate P",
    "della-linear": "della --option sign-consensus=false",
    "breadcrumbs-ties": "breadcrumbs --option sign-consensus=true",
}


# What a mean of deltas is called here: Σ w·δ, with weights that sum to 1.
MEAN = "task-arithmetic"
# Methods whose merged delta is the weighted mean.
MEANS = (MEAN, "average")


def federated_methods() -> list[str]:
    """The methods that federated rounds merge by."""
    return [name for name, row in METHODS.items() if row.federated is not None]


def find_method(name: str) -> Method:
    """Return the row of a merge method; an unknown name raises `ConfigError`.

    Underscores count as dashes, so mergekit's spelling is understood.
    """
    plain = name.replace("_", "-")
    if plain in _MERGEKIT_NAMES:
        raise ConfigError(
            f"merge method {name!r} is mergekit's; here it is --method {_MERGEKIT_NAMES[plain]}"
        )
    if plain not in METHODS:
        raise ConfigError(f"merge method {name!r} is unknown{did_you_mean(plain, METHODS)}")
    return METHODS[plain]
