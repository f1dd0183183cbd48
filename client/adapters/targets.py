"""Which modules get adapters: names, patterns or all linear ones, resolved before PEFT sees them.

PEFT matches patterns by an engine that backtracks, and the pattern is a server's; here they are
RE2's, and PEFT is given the names of modules that exist.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.vectors.patterns import compile_patterns

ALL_LINEAR = "all-linear"
_PLAIN = re.compile(r"[\w.\-]+")
_MOST_SHOWN = 8


def target_modules(network: Any, words: Sequence[str], model: str) -> list[str]:
    """The names of the modules that ``words`` mean, in the network's order.

    A word is the end of a name (``q_proj``, ``self_attn.q_proj``), a regular expression that fits
    whole names, or "all-linear": every linear module but the one that makes the output. Raises
    `ConfigError` for a word that fits no module that LoRA can adapt, with those that are near.
    """
    kinds = {name: module for name, module in network.named_modules() if name}
    able = [name for name, module in kinds.items() if _adaptable(module)]
    found: set[str] = set()
    for word in words:
        fits = _matcher(word)
        chosen = _linear(network, able, kinds) if word == ALL_LINEAR else list(filter(fits, able))
        if not chosen:
            raise _no_match(word, model, able, next(filter(fits, kinds), None), kinds)
        found.update(chosen)
    return [name for name in able if name in found]


def named_modules(network: Any, words: Sequence[str], model: str, what: str) -> list[str]:
    """The names of all modules that end in one of ``words``; raises `ConfigError` for none."""
    names = [name for name, _ in network.named_modules() if name]
    found: list[str] = []
    for word in words:
        chosen = [name for name in names if _ends(name, word)]
        if not chosen:
            raise ConfigError(
                f"{what} {word!r} names no module of model {model!r}; {_near(word, names)}"
            )
        found += chosen
    return found


def _matcher(word: str) -> Callable[[str], Any]:
    if _PLAIN.fullmatch(word):
        return lambda name: _ends(name, word)
    # The whole name, as PEFT takes a pattern.
    (pattern,) = compile_patterns([f"^(?:{word})$"])
    return pattern.search


def _ends(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _adaptable(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, (*kinds, Conv1D))


def _linear(network: Any, able: Sequence[str], kinds: dict[str, Any]) -> list[str]:
    import torch
    from transformers.pytorch_utils import Conv1D

    head = getattr(network, "get_output_embeddings", lambda: None)()
    return [
        name
        for name in able
        if isinstance(kinds[name], torch.nn.Linear | Conv1D) and kinds[name] is not head
    ]


def _no_match(
    word: str, model: str, able: Sequence[str], other: str | None, kinds: dict[str, Any]
) -> ConfigError:
    if word == ALL_LINEAR:
        return ConfigError(f'lora-targets "all-linear": model {model!r} has no linear module')
    if other is not None:
        inside = [name for name in able if name.startswith(f"{other}.")]
        return ConfigError(
            f"lora-targets {word!r} fits {other!r} of model {model!r}, a "
            f"{type(kinds[other]).__name__}, which LoRA cannot adapt; {_near(word, inside or able)}"
        )
    return ConfigError(
        f"lora-targets {word!r} fits no module of model {model!r}; {_near(word, able)}"
    )


def _near(word: str, names: Sequence[str]) -> str:
    """The last parts of names, those that are near ``word`` where there are any."""
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    leaves = [leaf for leaf in leaves if not leaf.isdecimal()]
    plain = word.rpartition(".")[2]
    if near := get_close_matches(plain, leaves, n=3, cutoff=0.6):
        return f"did you mean {' or '.join(map(repr, near))}?"
    more = ", …" if len(leaves) > _MOST_SHOWN else ""
    return f"it has {', '.join(leaves[:_MOST_SHOWN])}{more}"
