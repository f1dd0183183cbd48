"""mergekit's words: what a method is called, which parameters it reads, and how lines are named."""

from __future__ import annotations

from dataclasses import dataclass

from dare_agg.errors import ConfigError

# All parameters of mergekit's methods; of the second kind each model may have its own.
_SHARED = (
    "normalize", "rescale", "rescale_norm", "int8_mask", "lambda", "t", "select_topk",
    "filter_wise", "normalize_weights", "eps", "max_iter", "tol", "nuslerp_row_wise",
    "nuslerp_flatten",
)  # fmt: skip
_OF_A_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
PARAMETERS = (*_SHARED, *_OF_A_MODEL)


@dataclass(frozen=True)
class Word:
    """What mergekit asks of a method: its parameters, shared ones and those of each model.

    ``base`` is "needed", "may be" or "counts": then it is a model like the others.
    ``models`` are how many besides a base may be merged, at least and at most.
    """

    base: str
    shared: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    models: tuple[int, int] = (1, 1 << 20)


_TASK = ("int8_mask", "normalize", "rescale", "lambda")
_DENSE = ("weight", "density")

WORDS: dict[str, Word] = {
    "linear": Word("counts", ("normalize",), ("weight",)),
    "slerp": Word("needed", ("t",), (), (1, 1)),
    "nuslerp": Word("may be", ("nuslerp_row_wise", "nuslerp_flatten"), ("weight",), (2, 2)),
    "multislerp": Word("may be", ("normalize_weights", "eps"), ("weight",)),
    "karcher": Word("counts", ("max_iter", "tol")),
    "model_stock": Word("needed", ("filter_wise",), (), (2, 1 << 20)),
    "sce": Word("needed", ("int8_mask", "select_topk")),
    "task_arithmetic": Word("needed", _TASK, _DENSE),
    "ties": Word("needed", _TASK, _DENSE),
    "dare_linear": Word("needed", _TASK, _DENSE),
    "dare_ties": Word("needed", _TASK, _DENSE),
    "della": Word("needed", _TASK, (*_DENSE, "epsilon")),
    "della_linear": Word("needed", _TASK, (*_DENSE, "epsilon")),
    "breadcrumbs": Word("needed", _TASK, (*_DENSE, "gamma")),
    "breadcrumbs_ties": Word("needed", _TASK, (*_DENSE, "gamma")),
    "passthrough": Word("counts", (), ("scale",), (1, 1)),
}


def at_line(line: int, text: str) -> ConfigError:
    """The error for what stands on a line."""
    return ConfigError(f"line {line}: {text}")
