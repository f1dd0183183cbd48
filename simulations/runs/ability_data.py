"""Three abilities of a decoder, from data that any machine has: their rows, and how they learn.

- *arithmetic*: seeded word problems in the model's chat template, loss on the answer alone;
- *code*: Python's own standard library, each top-level package in one split;
- *dialogue*: the Friends transcripts, by speaker.

Each has rows to train on, rows to choose scalings by ("tuning") and rows to report ("test").
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from client.config import TaskConfig
from client.instructions.arithmetic import problems
from client.instructions.conversations import Conversation
from client.instructions.template import coded_all
from client.rows import Data, Indices, Rows
from client.tasks import causal_lm
from client.tasks.task import Batch, Reader, Task
from dare_agg.errors import ConfigError

SPLITS = ("train", "tuning", "test")
# Of a hundred packages so many are for training and for tuning; the others are for tests.
_TRAIN_SHARE, _TUNING_SHARE = 70, 15
# Read of a split at most: a run needs a hundred kilobytes.
_MOST_CHARACTERS = 1 << 21
_MOST_PROBLEMS = 4096
# Turns for a base model, which has no template of its own; its end token ends an answer.
_PLAIN_TURNS = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role }}:\n{{ turn.content }}"
    "{{ eos_token if turn.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
# Kept out: tests of the library itself, and tables of code points and the like.
_NOT_PROSE = ("test", "tests", "site-packages", "idlelib", "lib2to3", "encodings", "pydoc_data")


@lru_cache(maxsize=2)
def ability_tokenizer(model: str) -> Any:
    """A model's tokenizer; a base model's gets plain turns for a chat template."""
    tokenizer = causal_lm.load_tokenizer(model)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _PLAIN_TURNS
    return tokenizer


@dataclass(frozen=True)
class Exchange:
    """A question with its answer, as turns and as token ids up to the answer's end."""

    turns: Conversation
    ids: tuple[int, ...]
    prompt: int  # tokens before the answer

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.ids)

    @property
    def answer(self) -> str:
        """The text of the answer."""
        return self.turns[-1][1]


def coded_exchanges(tokenizer: Any, conversations: Sequence[Conversation]) -> list[Exchange]:
    """Code conversations of one answer each by the model's chat template."""
    found = []
    for turns, coded in zip(conversations, coded_all(tokenizer, conversations), strict=True):
        end = int(np.flatnonzero(coded.answer_mask)[-1]) + 1
        found.append(Exchange(turns, tuple(coded.ids[:end].tolist()), coded.asked))
    return found


def _read_conversations(config: TaskConfig, rows: Rows) -> Reader:
    import torch

    longest = max(row.size for row in rows.inputs)
    ids = np.zeros((len(rows), longest), np.int64)
    answer = np.zeros((len(rows), longest), np.bool_)
    for i, row in enumerate(rows.inputs):
        ids[i, : row.size] = row.ids
        answer[i, row.prompt : row.size] = True
    lengths = np.array([row.size for row in rows.inputs])

    def read(at: Indices) -> Batch:
        width = int(lengths[at].max())
        return {
            "input_ids": torch.from_numpy(ids[at, :width]),
            "attention_mask": torch.from_numpy(np.arange(width) < lengths[at, None]),
            "answer": torch.from_numpy(answer[at, :width]),
        }

    return read


def _answer_scores(network: Any, batch: Batch) -> Any:
    # A vocabulary's scores are a fifth of the work; only those of answers are asked for.
    hidden = network.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return network.get_output_embeddings()(hidden[:, :-1][batch["answer"][:, 1:]])


def _answer_tokens(batch: Batch, labels: Any) -> Any:
    return batch["input_ids"][:, 1:][batch["answer"][:, 1:]]


ANSWERS = replace(
    causal_lm.TASK,
    name="answers",
    reader=_read_conversations,
    scores=_answer_scores,
    targets=_answer_tokens,
    evaluate_rows=50,
)


def python_library(split: str) -> list[str]:
    """Texts of the standard library's modules of a split, each module or package in one."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    size = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: zlib.crc32(_inside(p, root).encode())):
        parts = path.relative_to(root).parts
        if any(part in _NOT_PROSE or part.startswith("config-") for part in parts):
            continue
        if _package_split(parts[0].removesuffix(".py")) != split or size > _MOST_CHARACTERS:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")[: _MOST_CHARACTERS // 32]
        found.append(text)
        size += len(text)
    return found


def _inside(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _package_split(name: str) -> str:
    place = zlib.crc32(name.encode()) % 100
    if place < _TRAIN_SHARE:
        return "train"
    return "tuning" if place < _TRAIN_SHARE + _TUNING_SHARE else "test"


def _plain(inputs: Sequence[Any], groups: Sequence[str] = ()) -> Rows:
    named = tuple(groups) or ("",) * len(inputs)
    return Rows(tuple(inputs), np.zeros(len(inputs), np.int64), named)


def _arithmetic(config: TaskConfig, tokenizer: Any, split: str) -> Rows:
    count = _MOST_PROBLEMS if split == "train" else max(config.test_rows, 1)
    drawn = problems(count, seed=config.seed, split=split, system="", worked=True)
    return _plain(coded_exchanges(tokenizer, drawn))


def _code(config: TaskConfig, tokenizer: Any, split: str) -> Rows:
    return causal_lm.pack_blocks(
        _plain(python_library(split)), tokenizer, config, SPLITS.index(split)
    )


def _dialogue(config: TaskConfig, tokenizer: Any, split: str) -> Rows:
    data = causal_lm.load_blocks(replace(config, data="friends", task=causal_lm.TASK.name))
    if split == "train":
        return data.train
    half = np.arange(len(data.test)) % 2 == (split == "test")
    return data.test.take(np.flatnonzero(half))


# By ability: the task's row, and its rows of a split.
ABILITIES: Mapping[str, tuple[Task, Callable[[TaskConfig, Any, str], Rows]]] = {
    "arithmetic": (ANSWERS, _arithmetic),
    "code": (causal_lm.TASK, _code),
    "dialogue": (causal_lm.TASK, _dialogue),
}


def find_ability(name: str) -> tuple[Task, Callable[[TaskConfig, Any, str], Rows]]:
    """Return an ability's row; raises `ConfigError` for an unknown name."""
    if name not in ABILITIES:
        raise ConfigError(f"ability {name!r} is unknown; known: {', '.join(ABILITIES)}")
    return ABILITIES[name]


def ability_data(name: str, config: TaskConfig, splits: Sequence[str] = SPLITS) -> dict[str, Rows]:
    """Return an ability's rows by split; those to measure on are at most ``test_rows``."""
    _, load = find_ability(name)
    tokenizer = ability_tokenizer(config.model)
    found = {split: load(config, tokenizer, split) for split in splits}
    return {
        split: rows if split == "train" else rows.take(np.arange(min(len(rows), config.test_rows)))
        for split, rows in found.items()
    }


def training_data(name: str, config: TaskConfig) -> Data:
    """An ability's rows as `client.training.FineTuning` takes them."""
    found = ability_data(name, config, ("train", "tuning"))
    return Data(name, found["train"], found["tuning"], ("",))
