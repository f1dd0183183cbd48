"""Heads that are tied to the embeddings: one tensor in the base, one module or two in PEFT.

With ``ensure_weight_tying`` PEFT trains both as one and saves each. Without it a module that is
trained whole (``modules_to_save``) comes apart from the one that it was tied to.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from dare_agg.checkpoint import Checkpoint
from dare_agg.checkpoint.config import config_of
from dare_agg.checkpoint.embeddings import is_output
from dare_agg.checkpoint.tied import equal
from dare_agg.offline.adapters.keys import Names

_LANGUAGE_MODEL = re.compile(
    r"CausalLM|LMHead|ConditionalGeneration|MaskedLM|PreTraining", re.ASCII
)


def has_head(base: Checkpoint) -> bool:
    """Whether the base holds the matrix of a head."""
    return any(is_output(n) and len(info.shape) > 1 for n, info in base.tensors.items())


def ties_head(base: Checkpoint) -> bool:
    """Whether the base's head is its embeddings: a language model that holds no head."""
    config = config_of(base)
    named = " ".join(map(str, config.get("architectures") or ()))
    tied = config.get("tie_word_embeddings") is not False
    return tied and not has_head(base) and _LANGUAGE_MODEL.search(named) is not None


def without_repeated_head(names: Names, tensors: Checkpoint) -> Names:
    """An adapter's names without those of a head that repeats what it does to the embeddings."""
    heads = [name for name in names.whole if is_output(name)]
    whole = {
        name: file
        for name, file in names.whole.items()
        if name not in heads
        or not any(
            equal(tensors, file, other) for n, other in names.whole.items() if n not in heads
        )
    }
    modules = {
        key: parts
        for key, parts in names.modules.items()
        if not is_output(f"{key[0]}.weight")
        or not any(_repeats(tensors, parts, other) for other in names.modules.values())
    }
    return replace(names, whole=whole, modules=modules)


def _repeats(tensors: Checkpoint, head: dict[str, str], embedding: dict[str, str]) -> bool:
    pairs = (("lora_A", "lora_embedding_B"), ("lora_B", "lora_embedding_A"))
    return all(
        one in head
        and other in embedding
        and np.array_equal(tensors.array(head[one]), tensors.array(embedding[other]).T)
        for one, other in pairs
    )
