"""Instruction tuning: conversations in the model's own chat template, loss on the answers alone.

Evaluated by loss, and where asked for by generation: greedy answers beside the data's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from client.config import TaskConfig
from client.instructions.conversations import last_exchange
from client.instructions.generation import exact_match, generate_answers, last_number
from client.instructions.length_check import refuse_cut
from client.instructions.lengths import Example, check_taught, cut, lengths
from client.instructions.packing import batch_arrays, check_apart
from client.instructions.sources import (
    BUILT_IN_CONVERSATIONS,
    holds_conversations,
    load_conversations,
)
from client.instructions.template import coded_all, open_tokenizer, refuse_without_template
from client.models import model_path
from client.rows import Data, Indices, Rows, make_data
from client.tasks import causal_lm
from client.tasks.cross_entropy import IGNORED
from client.tasks.task import Batch, Metrics, Reader, Task, test_share, told_labels
from client.text_files import is_small
from dare_agg.errors import ConfigError

_TOGETHER = 16  # rows that are answered at once


def load_examples(config: TaskConfig) -> Data:
    """Load the configuration's conversations as tokens; lengths and cuts are among the notes."""
    causal_lm.check_model(config)
    tokenizer = open_tokenizer(config.model)
    sets, notes = load_conversations(config)
    data = make_data(
        config.data,
        sets,
        test_share=test_share(config),
        seed=config.seed,
        learned=False,  # labels only serve to divide rows and to tell tasks apart
    )
    _check_context(config)
    train, told = _examples(data.train, tokenizer, config, f"data {config.data!r}, training")
    test, told_test = _examples(data.test, tokenizer, config, f"data {config.data!r}, test")
    told_answers = _check_answers(config, test if len(test) else train)
    said = (*notes, *told, *told_test, *told_answers)
    return replace(data, train=train, test=test, notes=said)


def look_at_conversations(config: TaskConfig) -> None:
    """Refuse small data without an answer to learn, and a model's folder without a template."""
    causal_lm.check_model(config)
    refuse_without_template(config.model)
    if is_small(Path(config.data)):
        load_conversations(config)
    elif config.data not in BUILT_IN_CONVERSATIONS:
        return
    if Path(model_path(config.model)).exists():
        refuse_cut(config)


def _examples(
    rows: Rows, tokenizer: Any, config: TaskConfig, what: str
) -> tuple[Rows, Sequence[str]]:
    """The rows as `Example`s without those that teach nothing, and what is to be said of them."""
    if not len(rows):
        return rows, ()
    coded = coded_all(tokenizer, rows.inputs)
    made = [cut(talk, c, config.length) for talk, c in zip(rows.inputs, coded, strict=True)]
    found = lengths(made, config.length)
    check_taught(what, made, found)
    good = np.flatnonzero([e.teaches for e in made])
    kept = replace(rows, inputs=tuple(made)).take(good)
    return kept, (found.line(what),)


def _check_context(config: TaskConfig) -> None:
    """Refuse a length beyond the model's context, where its configuration tells that."""
    context = _context(config.model)
    if context and config.length > context:
        raise ConfigError(
            f"length = {config.length}, and the context of model {config.model!r} ends after "
            f"{context} tokens; set length = {context} or less"
        )


@lru_cache(maxsize=4)
def _context(model: str) -> int:
    """The tokens of a model's context; 0 where its configuration does not tell."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_path(model), trust_remote_code=False)
        found = config.get_text_config()
    except (OSError, ValueError):  # loading the model says what is wrong
        return 0
    return int(getattr(found, "max_position_embeddings", 0) or 0)


def _check_answers(config: TaskConfig, rows: Rows) -> Sequence[str]:
    """Refuse before training what generation could not answer or compare; say what is left out."""
    if not config.generate_rows:
        return ()
    large = sum(not _fits(config, example) for example in rows.inputs)
    where = f"generate-tokens = {config.generate_tokens} in the context of model {config.model!r}"
    if large and large == len(rows):
        raise ConfigError(
            f"{where}, {_context(config.model)} tokens, leaves no room for a question; lower it"
        )
    if config.answer_form == "number":
        for example in rows.inputs:
            wanted = last_exchange(example.conversation)[1]
            if last_number(wanted) is None:
                raise ConfigError(
                    f"answer-form = number, and the answer {wanted[:60]!r} of data "
                    f"{config.data!r} has no number; set answer-form = text"
                )
    return (f"{where} leaves no room for {large} of {len(rows)} questions",) * bool(large)


def _fits(config: TaskConfig, example: Example) -> bool:
    """Whether the model's context has room for a question and an answer, as far as it is told."""
    context = _context(config.model)
    return not context or example.asked + config.generate_tokens <= context


def example_reader(config: TaskConfig, rows: Rows) -> Reader:
    """A batch is ``input_ids``, ``attention_mask`` and ``answer_mask``, padded on the right.

    Packed, rows of ``length`` tokens hold several conversations, with ``position_ids``.
    """
    import torch

    examples: Sequence[Example] = rows.inputs
    room = config.length if config.packing else 0

    def read(at: Indices) -> Batch:
        arrays = batch_arrays([examples[i] for i in at], room)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    return read


def answer_scores(network: Any, batch: Batch) -> Any:
    """Logits of the places whose successor is an answer's, (n, places, vocabulary)."""
    import torch

    words = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in batch:  # padding stands on the right, where no token looks
        words["position_ids"] = batch["position_ids"]
    places = _places(batch)
    # Gram matrices are made of every token's state, without gradients and outside inference.
    learned = torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    if learned and _keeps(network):
        return network(**words, logits_to_keep=places).logits
    return network(**words).logits[:, places]


def _keeps(network: Any) -> bool:
    """Whether a model makes logits of some places only: most of a small model's work."""
    inner = getattr(network, "get_base_model", lambda: network)()
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def answer_tokens(batch: Batch, labels: Any) -> Any:
    """The targets: the successor of each of these places, `IGNORED` where it is no answer's."""
    following = batch["input_ids"].masked_fill(~batch["answer_mask"], IGNORED)
    return following[:, _places(batch) + 1]


def _places(batch: Batch) -> Any:
    """The columns behind which some row of the batch has a token of an answer."""
    return batch["answer_mask"][:, 1:].any(dim=0).nonzero().flatten()


def instructed_model(config: TaskConfig, labels: int) -> Any:
    """The causal language model; with packing, one that keeps packed conversations apart."""
    network = causal_lm.language_model(config, labels)
    if config.packing:
        check_apart(network.eval(), f"model {config.model!r}")
    return network


def generated(network: Any, config: TaskConfig, data: Data, rows: Rows, at: Indices) -> Metrics:
    """Exact match of generated answers: the first ``generate_rows`` of each label."""
    if not config.generate_rows:
        return {}
    fitting = at[[_fits(config, rows.inputs[i]) for i in at]]
    tokenizer = open_tokenizer(config.model)
    metrics: Metrics = {}
    right = count = 0.0
    for label, of in (told_labels(data, rows, fitting) or {"": fitting}).items():
        chosen = of[: config.generate_rows]
        pairs = [last_exchange(rows.inputs[i].conversation) for i in chosen]
        asked, wanted = [turns for turns, _ in pairs], [answer for _, answer in pairs]
        answers = generate_answers(
            network, tokenizer, asked, most_tokens=config.generate_tokens, batch=_TOGETHER
        )
        share = exact_match(answers, wanted, config.answer_form)
        if label:
            metrics[f"exact-match:{label}"] = share
        right, count = right + share * len(chosen), count + len(chosen)
    return {"exact-match": right / count, **metrics} if count else {}


TASK = Task(
    "instructions",
    recognises=holds_conversations,
    load=load_examples,
    network=instructed_model,
    reader=example_reader,
    scores=answer_scores,
    targets=answer_tokens,
    derived=causal_lm.perplexity,
    agreed_labels=False,  # they only serve to divide rows and to tell tasks apart
    refusals=causal_lm.TASK.refusals,
    evaluate_rows=8,  # logits over a whole vocabulary are large
    by_label=True,
    answered=generated,
    look=look_at_conversations,
)
