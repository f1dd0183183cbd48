"""A tiny random Llama with a real tokenizer (byte-level BPE), chat templates, conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def make_tokenizer(template: str = CHATML, *, padding: bool = True, end: str = "<|im_end|>") -> Any:
    """A byte-level BPE tokenizer trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    whole.train_from_iterator(["system user assistant how many apples are left " * 9], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole, eos_token=end, bos_token="<|im_start|>",
        pad_token="<|pad|>" if padding else None,
    )  # fmt: skip
    fast.chat_template = template
    return fast


def make_model(
    folder: Path, template: str = CHATML, *, padding: bool = True, config: Any = None, **shape: Any
) -> Path:
    """Write a Llama (or ``config``, a configuration) with that tokenizer into a folder."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = make_tokenizer(template, padding=padding)
    words = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    made = config(**words) if config else LlamaConfig(**{**words, **SHAPE, **shape})
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def talk(number: int) -> tuple[tuple[str, str], ...]:
    """A conversation of one or two answers, of many lengths."""
    question = f"how many {'apples ' * (number % 5)}are {number}?"
    turns = [("user", question), ("assistant", f"{number} left")]
    if number % 3 == 0:
        turns += [("user", "and now?"), ("assistant", "none " * (1 + number % 4) + "left")]
    return tuple(turns)


def as_messages(conversation: Any) -> list[dict[str, str]]:
    """A conversation as a cell of a messages column."""
    return [{"role": role, "content": content} for role, content in conversation]
