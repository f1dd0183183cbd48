"""Answers that a model generates, greedily and many at a time, and how they are compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from client.instructions.conversations import Conversation
from client.instructions.template import prompt_ids
from client.words import ANSWER_FORMS
from dare_agg.errors import ConfigError, did_you_mean

# Digits with thousands commas and a fraction; the sign counts where no digit stands before it.
_NUMBER = re.compile(r"(?<![\d.])-?\d+(?:,\d{3})*(?:\.\d+)?|(?<![\d.])-?\.\d+")


def generate_answers(
    network: Any, tokenizer: Any, prompts: Sequence[Conversation], *, most_tokens: int, batch: int
) -> list[str]:
    """The answers of a causal language model to turns, each the likeliest token after token.

    ``batch`` prompts of like length run at a time, padded on the left and masked, in the
    parameters' own precision; an answer ends with the model's end token or after ``most_tokens``.
    The same prompts give the same answers, whatever else is in their batch, but for ties within
    rounding.
    """
    asked = [prompt_ids(tokenizer, turns) for turns in prompts]
    order = sorted(range(len(asked)), key=lambda place: len(asked[place]))
    answers = [""] * len(asked)
    for lo in range(0, len(order), max(1, batch)):
        places = order[lo : lo + max(1, batch)]
        found = _continued(network, tokenizer, [asked[place] for place in places], most_tokens)
        for place, ids in zip(places, found, strict=True):
            answers[place] = str(tokenizer.decode(ids, skip_special_tokens=True))
    return answers


def _continued(
    network: Any, tokenizer: Any, prompts: Sequence[list[int]], most_tokens: int
) -> list[list[int]]:
    """What follows each of these token ids, up to and without the token that ends it."""
    import torch
    from transformers import GenerationConfig

    # Adapters sit in the model's own layers: what generates is the model inside.
    network = getattr(network, "get_base_model", lambda: network)()
    stops = _stops(network, tokenizer)
    # A tokenizer without padding: any token will do behind the mask, the end token most of all.
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = stops[0] if stops else 0
    width = max(map(len, prompts))
    rows = [[padding] * (width - len(ids)) + ids for ids in prompts]
    seen = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    device = next(network.parameters()).device
    greedy = GenerationConfig(
        max_new_tokens=most_tokens, do_sample=False, num_beams=1, use_cache=True,
        pad_token_id=padding, eos_token_id=stops or None,
    )  # fmt: skip
    # What a model's own file says (sampling, penalties) would stand for what is not said here.
    own, network.generation_config = network.generation_config, GenerationConfig()
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            found = network.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(seen, device=device),
                generation_config=greedy,
            )
    finally:
        network.generation_config = own
    return [_until(ids, stops) for ids in found[:, width:].tolist()]


def _stops(network: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's own file."""
    own = getattr(network.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *several) if i is not None))


def _until(ids: list[int], stops: Sequence[int]) -> list[int]:
    return ids[: next((place for place, one in enumerate(ids) if one in stops), len(ids))]


def exact_match(answers: Sequence[str], wanted: Sequence[str], form: str = "text") -> float:
    """The share of answers that are as wanted: as texts without outer white space, or as numbers.

    As "number" the last number of each counts: "so she has 1,250 in all" is 1250.0. Raises
    `ConfigError` for another form, for no answers, and for a wanted text without a number.
    """
    if form not in ANSWER_FORMS:
        raise ConfigError(f"answer-form {form!r} is unknown{did_you_mean(form, ANSWER_FORMS)}")
    if not wanted or len(answers) != len(wanted):
        raise ConfigError(f"{len(answers)} answers beside {len(wanted)} wanted; one each is needed")
    return sum(map(_same(form), answers, wanted)) / len(wanted)


def _same(form: str) -> Any:
    if form == "text":
        return lambda answer, wanted: answer.strip() == wanted.strip()

    def same(answer: str, wanted: str) -> bool:
        right = last_number(wanted)
        if right is None:
            raise ConfigError(
                f"answer-form = number, and the answer {wanted[:60]!r} of the data has no number; "
                "set answer-form = text"
            )
        return last_number(answer) == right

    return same


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exactly; None where there is none."""
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None
