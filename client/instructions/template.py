"""The model's own chat template over a conversation, and which of its tokens are answers.

A template with ``{% generation %}`` blocks says itself what an answer is. Of any other it is
told by prefixes: an answer is what the template adds to the turns before it, which end where the
model is asked to speak. That holds only where the text of a prefix is a prefix of the text; where
it is not, the template is refused rather than trained on with a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from client.instructions.conversations import ASSISTANT, SYSTEM, Conversation
from client.models import model_path
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import read_settings

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Files of a model's folder that hold templates, beside tokenizer_config.json.
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_TOGETHER = 256  # conversations that are tokenised at once


class Coded(NamedTuple):
    """Token ids, which of them are answers, and how many stand before the last answer."""

    ids: Ids
    answer_mask: Mask
    asked: int


@lru_cache(maxsize=2)
def open_tokenizer(model: str) -> Any:
    """A model's tokenizer with its chat template; raises `ConfigError` where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer of model {model!r} cannot be loaded: "
            f"{' '.join(str(error).split())[:200]}; give a Hugging Face folder or GGUF file, or a "
            "name while a hub can be reached"
        ) from error
    _template(tokenizer, f"model {model!r}")
    return tokenizer


def _template(tokenizer: Any, what: str = "the model") -> str:
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError) as error:
        raise ConfigError(_no_template(what)) from error


def refuse_without_template(model: str) -> None:
    """Refuse a model's folder whose files hold no chat template, without loading a tokenizer."""
    folder = Path(model_path(model))
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or any((folder / name).exists() for name in _TEMPLATES):
        return
    if not read_settings(settings).get("chat_template"):
        raise ConfigError(_no_template(f"model {model!r}"))


def _no_template(what: str) -> str:
    return (
        f"{what} has no chat template, so it does not say how a conversation becomes text; "
        "take a model tuned for conversations, put chat_template.jinja into its folder, or "
        'name a column of plain text (task="causal-lm", text-column)'
    )


def coded(tokenizer: Any, conversation: Conversation) -> tuple[Ids, Mask]:
    """The token ids of a conversation (int32) and which of them are answers (bool).

    The token that ends an answer belongs to it, white space that the template adds behind it
    does not. Raises `ConfigError` for a template that refuses the turns, or of which answers
    cannot be told.
    """
    whole = next(coded_all(tokenizer, [conversation]))
    return whole.ids, whole.answer_mask


def coded_all(tokenizer: Any, conversations: Sequence[Conversation]) -> Iterator[Coded]:
    """Each conversation as `coded` gives it, tokenised some hundred at a time."""
    blocks = bool(_GENERATION.search(_template(tokenizer)))
    for lo in range(0, len(conversations), _TOGETHER):
        some = conversations[lo : lo + _TOGETHER]
        yield from map(_by_blocks(tokenizer), some) if blocks else _by_prefixes(tokenizer, some)


def prompt_ids(tokenizer: Any, turns: Conversation) -> list[int]:
    """The token ids of turns, up to where the model is asked to speak."""
    return tokens(tokenizer, [text_of_turns(tokenizer, turns, ask=True)])[0]


def tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that a template made: it has written the special tokens already."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def text_of_turns(tokenizer: Any, turns: Conversation, *, ask: bool = False) -> str:
    """What the template makes of turns; with ``ask``, up to where an answer begins."""
    return str(_apply(tokenizer, turns, tokenize=False, add_generation_prompt=ask))


def _apply(tokenizer: Any, turns: Conversation, **words: Any) -> Any:
    from jinja2.exceptions import TemplateError

    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(messages, **words)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(_refusal(tokenizer, turns, str(error))) from error


def _refusal(tokenizer: Any, turns: Conversation, said: str) -> str:
    """Why a template takes no such turns, found by trying others."""
    said = " ".join(said.split())[:120]
    if turns and turns[0][0] == SYSTEM:
        if _takes(tokenizer, turns[1:]):
            return (
                f"the model's chat template refuses a system prompt ({said}); leave system-prompt "
                "out, and move the data's own system turns into the question"
            )
    elif _takes(tokenizer, ((SYSTEM, "Answer."), *turns)):
        return (
            f"the model's chat template needs a system prompt ({said}); set system-prompt, such "
            'as system-prompt="Answer the question."'
        )
    roles = ", ".join(role for role, _ in turns[:6]) + ", …" * (len(turns) > 6)
    return (
        f"the model's chat template refuses a conversation of {roles}: {said or 'it says no why'}; "
        "mend or leave out such rows"
    )


def _takes(tokenizer: Any, turns: Conversation) -> bool:
    from jinja2.exceptions import TemplateError

    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError):
        return False
    return True


# --- by the template's own blocks ------------------------------------------------------------


def _by_blocks(tokenizer: Any) -> Any:
    def code(conversation: Conversation) -> Coded:
        found = _apply(
            tokenizer,
            conversation,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = np.array(found["assistant_masks"], np.bool_)
        starts = np.flatnonzero(mask & ~np.concatenate(([False], mask[:-1])))
        return Coded(np.array(found["input_ids"], np.int32), mask, int(starts[-1:].sum()))

    return code


# --- by prefixes -----------------------------------------------------------------------------


def _by_prefixes(tokenizer: Any, some: Sequence[Conversation]) -> Iterator[Coded]:
    plans = [_prefixes(tokenizer, conversation) for conversation in some]
    every = list(dict.fromkeys(text for texts, _ in plans for text in texts))
    ids = dict(zip(every, tokens(tokenizer, every), strict=True))
    for texts, spans in plans:
        whole = ids[texts[0]]
        mask = np.zeros(len(whole), np.bool_)
        asked = 0
        for before, through in spans:
            lo = _common(ids[before], whole)
            hi = _common(ids[through], whole)
            asked = lo
            mask[lo : _spoken(tokenizer, whole, lo, hi)] = True
        yield Coded(np.array(whole, np.int32), mask, asked)


def _prefixes(
    tokenizer: Any, conversation: Conversation
) -> tuple[list[str], list[tuple[str, str]]]:
    """All texts that are needed, the whole first; per answer the text before and through it."""
    whole = text_of_turns(tokenizer, conversation)
    texts, spans = [whole], []
    for place, (role, _) in enumerate(conversation):
        if role != ASSISTANT:
            continue
        before = text_of_turns(tokenizer, conversation[:place], ask=True)
        last = place + 1 == len(conversation)
        through = whole if last else text_of_turns(tokenizer, conversation[: place + 1])
        for text in (before, through):
            if not whole.startswith(text):
                raise ConfigError(_no_prefix(whole, text, place))
        spans.append((before, through))
        texts += (before, through)
    return texts, spans


def _no_prefix(whole: str, text: str, place: int) -> str:
    at = next((i for i, (a, b) in enumerate(zip(whole, text, strict=False)) if a != b), len(whole))
    return (
        f"the model's chat template writes turn {place + 1} differently once others follow "
        f"({text[at : at + 20]!r} becomes {whole[at : at + 20]!r}), so answers cannot "
        "be told from questions; take a template with generation blocks, or conversations of one "
        "answer each"
    )


def _common(prefix: list[int], whole: list[int]) -> int:
    """How many tokens two texts begin with alike; a token across their border is the answer's."""
    most = min(len(prefix), len(whole))
    if prefix[:most] == whole[:most]:
        return most
    return next(i for i in range(most) if prefix[i] != whole[i])


def _spoken(tokenizer: Any, whole: list[int], lo: int, hi: int) -> int:
    """The end of an answer: behind its end token where only white space follows that."""
    end = tokenizer.eos_token_id
    for place in range(hi - 1, lo - 1, -1):
        if whole[place] == end:
            return place + 1
        if tokenizer.decode([whole[place]]).strip():
            break
    return hi
