"""Causal language modelling: real text in blocks of tokens, the next token as the target.

Texts of one group (a speaker, an author) are joined, an end-of-text token between them, and cut
into blocks of ``length`` tokens, so no block mixes two groups and none is mostly padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from client.adapters.four_bits import four_bit_words
from client.config import TaskConfig
from client.data import load_text
from client.head import with_adapters
from client.models import (
    LANGUAGE_MODEL,
    built_in,
    built_in_kind,
    model_path,
    refuse_pickled_model,
    refuse_quantised_model,
)
from client.rows import Data, Indices, Rows
from client.tasks.cross_entropy import IGNORED
from client.tasks.task import Batch, Metrics, Reader, Task, test_share
from client.text_files import is_small
from dare_agg.errors import ConfigError


def load_blocks(config: TaskConfig) -> Data:
    """Load the configuration's texts as blocks of token ids (int32, at most ``length`` each)."""
    data = load_plain_text(config)
    tokenizer = load_tokenizer(config.model)
    return Data(
        data.name,
        pack_blocks(data.train, tokenizer, config, 1),
        pack_blocks(data.test, tokenizer, config, 2),
        data.label_names,
        data.notes,
    )


def look_at_text(config: TaskConfig) -> None:
    """Refuse a model of another kind, and a small file from which nothing can be learned."""
    check_model(config)
    if is_small(Path(config.data)):
        load_plain_text(config)


def load_plain_text(config: TaskConfig) -> Data:
    """Load the configuration's texts, which need no labels."""
    check_model(config)
    return load_text(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        partition_by=config.partition_by,
        delimiter=config.delimiter,
        encoding=config.encoding,
        label_optional=True,  # labels only serve to divide rows: clients need not share them
        test_share=test_share(config),
        test_source=config.test_data,
        seed=config.seed,
    )


def check_model(config: TaskConfig) -> None:
    """Refuse a built-in model that is no causal language model."""
    if built_in_kind(config.model) not in ("", LANGUAGE_MODEL):
        known = ", ".join(built_in(LANGUAGE_MODEL))
        raise ConfigError(
            f"model {config.model!r} is no causal language model; built in: {known}; any other by "
            "its Hugging Face name or folder"
        )


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_loaded(model, error) from error


def pack_blocks(rows: Rows, tokenizer: Any, config: TaskConfig, stream: int) -> Rows:
    """Pack texts into blocks, label by label and group by group, then shuffle the blocks."""
    prefix = tokenizer("")["input_ids"]  # what the model expects before a text, such as <bos>
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    coded = tokenizer(list(rows.inputs), add_special_tokens=False)["input_ids"] if len(rows) else []
    by_group: dict[tuple[int, str], list[int]] = {}
    for ids, label, group in zip(coded, rows.labels, rows.groups, strict=True):
        by_group.setdefault((int(label), group), []).extend([*ids, *end])
    room = config.length - len(prefix)
    if room < 2:
        raise ConfigError(f"length {config.length} leaves no room for text; raise it")
    found = [
        (np.array([*prefix, *piece], np.int32), label, group)
        for (label, group), ids in by_group.items()
        for piece in _pieces(ids, room)
    ]
    order = np.random.default_rng(np.random.SeedSequence([config.seed, 30, stream])).permutation(
        len(found)
    )
    return Rows(
        tuple(found[i][0] for i in order),
        np.array([found[i][1] for i in order], np.int64),
        tuple(found[i][2] for i in order),
    )


def _pieces(ids: list[int], room: int) -> Iterator[list[int]]:
    for lo in range(0, len(ids), room):
        piece = ids[lo : lo + room]
        if len(piece) > 1:  # one token predicts nothing
            yield piece


def block_reader(config: TaskConfig, rows: Rows) -> Reader:
    """A batch is ``input_ids`` and ``attention_mask`` (n, length), padded on the right."""
    import torch

    ids = np.zeros((len(rows), config.length), np.int64)
    mask = np.zeros((len(rows), config.length), np.bool_)
    for i, block in enumerate(rows.inputs):
        ids[i, : block.size] = block
        mask[i, : block.size] = True

    def read(at: Indices) -> Batch:
        return {
            "input_ids": torch.from_numpy(ids[at]),
            "attention_mask": torch.from_numpy(mask[at]),
        }

    return read


def token_scores(network: Any, batch: Batch) -> Any:
    """Logits (n, length − 1, vocabulary) of each token's successor."""
    # Padding stands on the right, where causal attention never looks: no mask is needed.
    return network(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]


def next_tokens(batch: Batch, labels: Any) -> Any:
    """The targets: each token's successor, `IGNORED` where that is padding."""
    return batch["input_ids"][:, 1:].masked_fill(~batch["attention_mask"][:, 1:], IGNORED)


def perplexity(metrics: Metrics) -> Metrics:
    """exp of the mean loss a token."""
    return {"perplexity": float(np.exp(metrics["loss"]))}


def language_model(config: TaskConfig, labels: int) -> Any:
    """Load a causal language model; its tensors keep their Hugging Face names."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    check_model(config)
    logging.disable_progress_bar()
    folder = model_path(config.model)
    refuse_quantised_model(folder)
    refuse_pickled_model(folder)
    torch.manual_seed(config.seed)  # for what the checkpoint lacks
    try:
        network = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **four_bit_words(config),
        )
    except (OSError, ValueError) as error:
        raise _not_loaded(config.model, error) from error

    return with_adapters(network, config)


def _not_loaded(model: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model {model!r} cannot be loaded: {' '.join(str(error).split())[:200]}; give a Hugging "
        "Face folder or GGUF file, or a name while a hub can be reached"
    )


TASK = Task(
    "causal-lm",
    recognises=lambda config: built_in_kind(config.model) == LANGUAGE_MODEL,
    load=load_blocks,
    network=language_model,
    reader=block_reader,
    scores=token_scores,
    targets=next_tokens,
    derived=perplexity,
    agreed_labels=False,  # they only serve to divide rows
    refusals={
        "head": "a causal language model has no head of its own to train; leave out head-only, "
        'compare with the untouched base, or set train to "lora"',
        "fisher": "Fisher values of a language model need a pass for every word of the "
        "vocabulary; merge by regmean or by a method that needs no statistics",
    },
    evaluate_rows=8,  # logits over a whole vocabulary are large
    look=look_at_text,
)
