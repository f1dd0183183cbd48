"""Tiny tokenizers of Hugging Face folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

WORDS = ("<unk>", "<s>", "</s>", "a", "b", "c")


def tokenizer(
    folder: Path, *, end: str = "</s>", added: Sequence[str] = (), template: str = ""
) -> Path:
    """Write a word-level tokenizer as transformers does; ``added`` get the next ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {word: number for number, word in enumerate(WORDS)}
    whole = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", bos_token="<s>")
    if added:
        fast.add_special_tokens({"additional_special_tokens": list(added)})
    fast.eos_token = end
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder
