"""Which tensors have a row for each token: embeddings and the heads that give logits."""

from __future__ import annotations

import re

# Inputs first: what is tied is one tensor under the name of the input, as transformers saves it.
_INPUTS = re.compile(
    r"(^|\.)(shared|embed_tokens|wte|transformer\.w|tokens_embed|word_embeddings?|embed_in|tok_embeddings|"
    r"token_embedding|embedding|embeddings|emb|d?embed|we)\.weight$"
)
_OUTPUTS = re.compile(
    r"(^|\.)(lm_head|embed_out|proj_out|output_projection|output|lm_loss|pred_layer\.proj|"
    r"generator_lm_head|vocab_projector|(cls\.|mlm\.|generator_)?predictions(\.decoder)?|"
    r"(lm_head|mlm_head|cls\.predictions|predictions|pred_head)\.decoder|lm_head\.out_proj|"
    r"vocab_head|unembed)\.(weight|bias)$|^decoder\.(weight|bias)$|(^|\.)final_logits_bias$"
)


def is_output(name: str) -> bool:
    """Whether a tensor is, by its name, part of the head that gives a logit for each token."""
    return _OUTPUTS.search(name) is not None


def is_token_tensor(name: str) -> bool:
    """Whether a tensor has, by its name, a row (or a bias) for each token."""
    return is_output(name) or _INPUTS.search(name) is not None
