"""What training returned, under the names of the model that it started from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from dare_agg.errors import LayoutError
from dare_agg.vectors.forms import is_list
from dare_agg.vectors.model import Arrays
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.wrappers import unwrapped

T = TypeVar("T")


def returned_tensors(
    model: Mapping[str, object], returned: Mapping[str, T], exclude: Iterable[str] = ()
) -> dict[str, T]:
    """Return the tensors that training returned by their names in ``model``, in their order.

    Prefixes of wrappers (``module.``, ``_orig_mod.``) are seen through, on either side. A part of
    the tensors will do: the others count as unchanged. Names that the model does not have stay
    where ``exclude``, patterns of what is local, has them.

    Raises `LayoutError` where nothing of the model is returned, for other names, for two names of
    one tensor, and for a part of a list, whose members have no names that tell them apart.

    >>> returned_tensors({"a.weight": 0, "b.weight": 0}, {"module.b.weight": 5})
    {'b.weight': 5}
    """
    if not returned:
        raise LayoutError(
            "the training code returned an ArrayRecord without arrays; return the trained ones, or "
            "raise an error where this client cannot train"
        )
    patterns = compile_patterns(exclude)
    names = _plain_names(model)
    found: dict[str, str] = {}
    strangers: list[str] = []
    for name in returned:
        plain = unwrapped(name)
        own = name if name in model else names.get(plain)
        if own is None:
            own = name if matches(name, patterns) else plain
            if not matches(own, patterns):
                strangers.append(name)
        if own in found:
            raise LayoutError(
                f"training returned {found[own]!r} and {name!r}, one tensor ({own!r}) with and "
                "without the prefix of a wrapper; return the state_dict of one of the two models"
            )
        found[own] = name
    if strangers:
        raise LayoutError(
            f"training returned {len(strangers)} tensors the global model does not have "
            f"({strangers[0]!r}, …); name them in 'exclude' if they are local"
        )
    shared = [name for name in model if not matches(name, patterns)]
    lacking = [name for name in shared if name not in found]
    if lacking and len(lacking) == len(shared):
        raise LayoutError(
            f"the {len(found)} tensors that training returned are local by 'exclude' "
            f"{list(exclude)}; return some that the federation shares, or narrow 'exclude'"
        )
    if lacking and is_list(model) and is_list(returned):
        raise LayoutError(
            f"training returned {len(found)} arrays of a list of {len(model)}: which ones cannot "
            "be told; return all of them, in the model's order, or send arrays by name"
        )
    return {own: returned[name] for own, name in found.items()}


def in_shape_of(model: Arrays, returned: Arrays) -> Arrays:
    """The returned tensors, those of one number in the model's shape.

    ``np.ascontiguousarray`` makes (1,) of (), and torch loads that as the number it is.
    """
    return {
        name: array.reshape(model[name].shape)
        if name in model and array.size == 1 == model[name].size
        else array
        for name, array in returned.items()
    }


def _plain_names(model: Iterable[str]) -> dict[str, str]:
    """The model's names without wrappers, where that leaves them apart."""
    names: dict[str, str] = {}
    doubled: set[str] = set()
    for name in model:
        if names.setdefault(unwrapped(name), name) != name:
            doubled.add(unwrapped(name))
    return {plain: name for plain, name in names.items() if plain not in doubled}
