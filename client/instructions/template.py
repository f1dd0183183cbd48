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
from client.instructions.rendering import Rendered, render
from client.models import model_path
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import read_settings

Asked = tuple[Conversation, bool]  # turns, and whether the model is asked to speak
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
        yield from _by_blocks(tokenizer, some) if blocks else _by_prefixes(tokenizer, some)


def prompt_ids(tokenizer: Any, turns: Conversation) -> list[int]:
    """The token ids of turns, up to where the model is asked to speak."""
    return tokens(tokenizer, [text_of_turns(tokenizer, turns, ask=True)])[0]


def tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that a template made: it has written the special tokens already."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def text_of_turns(tokenizer: Any, turns: Conversation, *, ask: bool = False) -> str:
    """What the template makes of turns; with ``ask``, up to where an answer begins."""
    return _rendered(tokenizer, [(turns, ask)])[0].text


def _rendered(tokenizer: Any, asked: Sequence[Asked], *, blocks: bool = False) -> list[Rendered]:
    """What the template makes of all these; raises `ConfigError` where it refuses one."""
    template, words = _template(tokenizer), tokenizer.special_tokens_map
    found = render(template, words, asked, blocks=blocks)
    for (turns, _), one in zip(asked, found, strict=True):
        if one.refusal:
            raise ConfigError(_refusal(tokenizer, turns, one.refusal))
    return found


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
    (found,) = render(_template(tokenizer), tokenizer.special_tokens_map, [(turns, False)])
    return not found.refusal


# --- by the template's own blocks ------------------------------------------------------------


def _by_blocks(tokenizer: Any, some: Sequence[Conversation]) -> Iterator[Coded]:
    made = _rendered(tokenizer, [(talk, False) for talk in some], blocks=True)
    found = tokenizer([one.text for one in made], add_special_tokens=False)
    for row, one in enumerate(made):
        ids = np.array(found["input_ids"][row], np.int32)
        mask = np.zeros(ids.size, np.bool_)
        for lo, hi in one.spans:  # of characters, the last of them at hi - 1
            first, last = found.char_to_token(row, lo), found.char_to_token(row, hi - 1)
            if first is None:
                break
            mask[first : last + 1 if last else None] = True
        starts = np.flatnonzero(mask & ~np.concatenate(([False], mask[:-1])))
        yield Coded(ids, mask, int(starts[-1:].sum()))


# --- by prefixes -----------------------------------------------------------------------------


def _by_prefixes(tokenizer: Any, some: Sequence[Conversation]) -> Iterator[Coded]:
    asked = list(dict.fromkeys(one for talk in some for one in _prefixes(talk)))
    made = zip(asked, _rendered(tokenizer, asked), strict=True)
    texts = {one: found.text for one, found in made}
    every = list(dict.fromkeys(texts.values()))
    ids = dict(zip(every, tokens(tokenizer, every), strict=True))
    for talk in some:
        text = texts[talk, False]
        whole = ids[text]
        mask = np.zeros(len(whole), np.bool_)
        begins = 0
        for place in _answers(talk):
            before, through = texts[talk[:place], True], texts[talk[: place + 1], False]
            for prefix in (before, through):
                if not text.startswith(prefix):
                    raise ConfigError(_no_prefix(text, prefix, place))
            begins = _common(ids[before], whole)
            end = _common(ids[through], whole)
            mask[begins : _spoken(tokenizer, whole, begins, end)] = True
        yield Coded(np.array(whole, np.int32), mask, begins)


def _answers(talk: Conversation) -> list[int]:
    return [place for place, (role, _) in enumerate(talk) if role == ASSISTANT]


def _prefixes(talk: Conversation) -> Iterator[Asked]:
    """All texts that are needed: the whole, and those before and through each answer."""
    yield talk, False
    for place in _answers(talk):
        yield talk[:place], True
        yield talk[: place + 1], False


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
