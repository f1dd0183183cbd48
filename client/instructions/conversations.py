"""A conversation: turns of a role and what it says; how a table's cell or columns hold one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from client.cells import text_of
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import parse_json

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


# A turn is (role, content); roles are words of the model's chat template.
Turn = tuple[str, str]
Conversation = tuple[Turn, ...]

# Why a row holds no conversation to learn from, as `flaw` says it.
FLAWS = ("without a conversation", "without a question", "without an answer", "an empty answer")


def exchange(question: str, answer: str, system: str = "") -> Conversation:
    """A conversation of one question and its answer, below a system prompt where one is given."""
    return with_system(((USER, question), (ASSISTANT, answer)), system)


def with_system(conversation: Conversation, prompt: str) -> Conversation:
    """The conversation below a system prompt, unless it has one of its own.

    "" adds none; white space alone adds an empty one, which keeps a template from its own.
    """
    if not prompt or _roles(conversation)[:1] == [SYSTEM]:
        return conversation
    return ((SYSTEM, prompt.strip()), *conversation)


def _roles(conversation: Conversation) -> list[str]:
    return [role for role, _ in conversation]


def last_exchange(conversation: Conversation) -> tuple[Conversation, str]:
    """What stands before the last answer, and that answer.

    Raises `ConfigError` for a conversation without one.
    """
    for place in range(len(conversation) - 1, -1, -1):
        role, content = conversation[place]
        if role == ASSISTANT:
            return conversation[:place], content
    raise ConfigError("a conversation without an answer; an assistant's turn is needed")


def flaw(conversation: Conversation) -> str:
    """Why nothing can be learned from a conversation, a word of `FLAWS`; "" where it can."""
    if not conversation:
        return FLAWS[0]
    answers = [content for role, content in conversation if role == ASSISTANT]
    if not answers:
        return FLAWS[2]
    if next(role for role in _roles(conversation) if role != SYSTEM) == ASSISTANT:
        return FLAWS[1]
    return FLAWS[3] if not all(answer.strip() for answer in answers) else ""


def from_columns(question: Any, answer: Any, where: str, encoding: str = "") -> Conversation:
    """The conversation of a row with a question and an answer; an empty cell is an empty text."""
    asked = text_of(question, f"{where}, its question", encoding) or ""
    told = text_of(answer, f"{where}, its answer", encoding) or ""
    return exchange(asked, told) if asked.strip() else ((ASSISTANT, told),)


def from_messages(cell: Any, where: str, encoding: str = "") -> Conversation:
    """The conversation of a ``messages`` cell: a list of {role, content}, also as JSON text.

    Raises `ConfigError`, naming ``where``, for anything else, and for turns that are no text,
    such as calls of tools.
    """
    if isinstance(cell, str | bytes) or cell is None or cell != cell:
        text = text_of(cell, where, encoding)
        if text is None or not text.strip():
            return ()
        try:
            cell = parse_json(text)
        except ValueError as error:
            raise ConfigError(
                f'{where} is no JSON list of messages: {str(error)[:120]}; write [{{"role": '
                '"user", "content": "…"}, …], or name prompt-column and answer-column'
            ) from error
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        raise ConfigError(
            f"{where} holds {_kind(cell)}; a list of messages is needed, each an object of role "
            "and content"
        )
    return tuple(_turn(message, f"{where}, message {n}") for n, message in enumerate(cell, 1))


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where} is {_kind(message)}; an object of role and content is needed")
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        known = ", ".join(map(str, list(message)[:6])) or "nothing"
        raise ConfigError(
            f"{where} has no role (it has {known}); each message needs role, such as user or "
            "assistant, and content"
        )
    if any(message.get(key) for key in ("tool_calls", "function_call")):
        raise ConfigError(
            f"{where} calls a tool, which is not learned here; write the call as content, or leave "
            "such rows out"
        )
    return role.strip(), _content(message.get("content"), f"{where}, content")


def _content(value: Any, where: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = [p.get("text") if _is_text(p) else None for p in value]
        if any(not isinstance(part, str) for part in parts):
            raise ConfigError(
                f"{where} has parts that are no text (images, sounds); only text is learned here: "
                "leave such rows out"
            )
        return "".join(str(part) for part in parts)
    return text_of(value, where) or ""


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type", "text") == "text"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    return {"str": "a text", "list": "a list"}.get(type(value).__name__, type(value).__name__)
