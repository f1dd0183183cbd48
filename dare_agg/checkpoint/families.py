"""Families of tensors: buffers that no training changes, and patterns that cover many names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from dare_agg.vectors.patterns import MAX_PATTERN, Pattern, compile_patterns, matches

# Buffers of floating point that files hold or lack, depending on the version that wrote them.
_BUFFERS = re.compile(
    r"(^|\.)("
    # Rotary and sinusoidal positions (Llama, GPT-NeoX, Falcon, ESM, GPT-J, CodeGen, fairseq).
    r"(\w+_)?inv_freq|freqs_cis|(cos|sin)_cached|embed_positions|_float_tensor|pe|"
    # Masks (GPT-2, GPT-Neo, GPT-J, GPT-NeoX, OPT, Swin) and ALiBi's slopes.
    r"masked_bias|(causal|attn|attention|future)_mask|\w*_causal_mask|alibi|slopes|"
    # Tables of positions, counters, states of other libraries.
    r"relative_position_index|relative_coords_table|position_ids|token_type_ids|"
    r"num_batches_tracked|_extra_state|final_logits_bias|"
    # T5's first files: never used.
    r"EncDecAttention\.relative_attention_bias\.weight"
    r")$"
)
# A mask by its shape: a bias has one dimension.
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")
# Parts of one pattern, and letters in it: what needs more has no name in common.
_MOST_PARTS = 8


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is, by name and shape, a buffer that training leaves alone."""
    if _BUFFERS.search(name):
        return True
    square = len(shape) > 1 and shape[-1] == shape[-2] and set(shape[:-2]) <= {1}
    return square and _MASK.search(name) is not None


def pattern_of(names: Iterable[str], others: Collection[str]) -> str:
    """Return a regular expression that finds all of ``names`` and none of ``others``.

    It covers whole modules and all layers where it can; "" where the names have too little in
    common for a short one.
    """
    parts: list[str] = []
    found: tuple[Pattern, ...] = ()
    for name in names:
        if matches(name, found):
            continue
        parts.append(_pattern(name, others))
        if len(parts) > _MOST_PARTS or len("|".join(parts)) > MAX_PATTERN:
            return ""
        found = compile_patterns(parts)
    return "|".join(parts)


def _pattern(name: str, others: Collection[str]) -> str:
    parts = name.split(".")
    for kept in range(1, len(parts) + 1):
        end = "$" if kept == len(parts) else r"\."
        exact = [re.escape(part) for part in parts[:kept]]
        every = [r"\d+" if part.isdecimal() else re.escape(part) for part in parts[:kept]]
        for words in (every, exact):
            pattern = "^" + r"\.".join(words) + end
            if len(pattern) > MAX_PATTERN:
                return pattern
            found = compile_patterns([pattern])
            if not any(matches(other, found) for other in others):
                return pattern
    return pattern
