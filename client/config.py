"""What a node trains: the configuration of a task, read from run config and node config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from client.words import check_words
from dare_agg.errors import ConfigError
from dare_agg.files.app_config import config_defaults

ConfigValue = bool | int | float | str | bytes
DEFAULTS = config_defaults(Path(__file__))


@dataclass(frozen=True)
class TaskConfig:
    """What to train, on what and how: run config keys, in snake_case.

    Attributes
    ----------
    task: what is learned; "auto" tells it from ``data`` and ``model``.
    model: a built-in model, a Hugging Face name, a folder or a GGUF file.
    data: a built-in set, a file, a folder, or the name of a `datasets` data set; several, by
        commas, are taken by simulated clients in turn.
    test_data: a file or data set of test rows, with the columns of ``data``; none: the source's own
        test rows, else a fifth of it.
    text_column: the column of the texts.
    label_column: the column of the labels.
    delimiter: what divides the columns of a CSV file, a character or a word of
        `client.tables.delimited.DELIMITERS`; none: told from the file.
    encoding: of text files; none: told from the file, or refused.
    labels: names of the labels; none: all that the data have.
    partition_by: the column by whose values rows are divided among simulated clients.
    prompt_column, answer_column: of instruction data without a ``messages`` column.
    system_prompt: what stands above each conversation that has no system turn of its own.
    packing: whether several conversations share a row of a batch, none seeing another.
    held_out: what each client keeps of its own rows to be evaluated on, a share below 1 or so
        many rows; 0 for a share of the source's common test rows.
    generate_rows: held-out rows of each task that are answered by generation (0 for none).
    generate_tokens: the most tokens of an answer.
    answer_form: how answers are compared, "text" or "number" (the last one in them).
    train: "full" fine-tuning, "lora" adapters, or "head" only.
    lora_rank: rank r of the run's adapters.
    lora_alpha: α; the product of an adapter's factors counts α/r, or α/√r with ``lora_rslora``.
    lora_rslora: whether adapters count α/√r (rsLoRA, arXiv 2312.03732).
    lora_targets: modules that get adapters: ends of names, regular expressions of whole names,
        "all-linear" (none: PEFT's choice for the model).
    lora_bias: which biases learn too: "none", "all", or "lora_only" (of adapted modules).
    lora_whole: ends of the names of modules that are trained whole beside the adapters.
    lora_dora: DoRA (arXiv 2402.09353): a length for each output beside the factors.
    lora_own_rank: how many of the rank's components this node learns (0: all); the others
        take part as they are.
    pooling: "mean" over tokens, or "cls".
    length: tokens a text is cut to; for language models, tokens of a block of joined texts.
    image_size: pixels an image is scaled to, each way (0: the model's own).
    batch: rows of an optimizer step.
    steps: optimizer steps a round.
    epochs: passes over a client's rows a round; above 0 it wins over ``steps``.
    learning_rate: of AdamW, for what is pretrained and for adapters.
    head_learning_rate: of AdamW, for the head.
    weight_decay: of AdamW, decoupled.
    warm_up: steps in which the learning rate rises to its own; below 1 a share of all.
    schedule: a row of `client.schedule.SCHEDULES`, how the rate goes on from there.
    schedule_over: "round": anew each round; "run": once, over all rounds.
    clip_norm: most that the norm of the gradient may be; 0 for any.
    weight_decay_on: "all" parameters, or "matrices": no biases, norms or embeddings.
    accumulate: pieces that a batch goes through in, one after another, for less memory.
    checkpointing: whether activations are made again in the backward pass, for less memory.
    dropout: share of the activations that each dropout of the model leaves out.
    proximal_mu: μ of FedProx, the pull towards the state received (0: none).
    keep_optimizer: whether the optimizer's moments stay from round to round, in files of the node.
    early_stop: looks in a row without a lower loss on rows kept aside that end a round; 0: none.
    early_stop_every: steps between two looks.
    early_stop_rows: what a client keeps aside for it, a share of its rows below 1 or a number.
    train_rows, test_rows: use at most so many (0 for all).
    precision: "float32", or "bfloat16" or "float16" for the matrix products of the forward and
        backward pass (weights, optimizer and deltas stay float32): twice as fast where the
        processor has such instructions. "auto": what suits the device.
    weights: "float32"; "bfloat16": half the memory, rounded stochastically after each step (what
        adapters or a head alone are trained on has it, they stay float32); "bfloat16-nearest":
        the same rounded to the nearest, which loses most of fine-tuning; "nf4": a language model's
        frozen base in four bits under adapters (QLoRA), on CUDA alone.
    device: what it trains on, a word of `dare_agg.deploy.devices`.
    threads: threads of the CPU that it takes.
    """

    task: str
    model: str
    data: str
    test_data: str
    text_column: str
    label_column: str
    delimiter: str
    encoding: str
    labels: tuple[str, ...]
    partition_by: str
    prompt_column: str
    answer_column: str
    system_prompt: str
    packing: bool
    held_out: float
    generate_rows: int
    generate_tokens: int
    answer_form: str
    train: str
    lora_rank: int
    lora_alpha: int
    lora_targets: tuple[str, ...]
    lora_bias: str
    lora_whole: tuple[str, ...]
    lora_rslora: bool
    lora_dora: bool
    pooling: str
    length: int
    image_size: int
    batch: int
    steps: int
    epochs: int
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    train_rows: int
    test_rows: int
    precision: str
    weights: str
    device: str
    threads: int
    warm_up: float
    schedule: str
    schedule_over: str
    clip_norm: float
    weight_decay_on: str
    accumulate: int
    checkpointing: bool
    dropout: float
    proximal_mu: float
    keep_optimizer: bool
    early_stop: int
    early_stop_every: int
    early_stop_rows: float
    seed: int
    lora_own_rank: int = 0


def configure(**words: Any) -> TaskConfig:
    """Make a configuration: the run config's defaults but for ``words``, named as its fields.

    Raises `ConfigError` for a number beyond its bound and for an unknown name.
    """
    known = {field.name for field in fields(TaskConfig)}
    usual = {key.replace("-", "_"): value for key, value in DEFAULTS.items()}
    settled = {**{name: usual[name] for name in known & usual.keys()}, **words}
    for name in ("labels", "lora_targets", "lora_whole"):
        if isinstance(settled[name], str):
            settled[name] = split_list(settled[name])
    check_words(settled)
    return TaskConfig(**settled)


# What a node's own config may set. Each of these may also be a list in the run config: one
# entry for each of several data sources.
_OWN = (
    "data",
    "test-data",
    "text-column",
    "label-column",
    "prompt-column",
    "answer-column",
    "delimiter",
    "encoding",
    "partition-by",
)
# What it trains on, in how much memory, and what it keeps is a machine's own affair, too.
_MACHINE = (
    "device",
    "threads",
    "precision",
    "weights",
    "accumulate",
    "checkpointing",
    "keep-optimizer",
)
# The run config's keys that a node's own config may say too, and words that it alone has.
NODE_KEYS = (*_OWN, *_MACHINE, "labels")
NODE_WORDS: Mapping[str, tuple[str, str]] = {
    "data-path": ("the run's data", "this node's own data, whole: a file or folder; as `data`"),
    "lora-rank": ("the run's", "how many of the rank's components this node learns"),
    "dp-budget": ("below cache", "file of this party's privacy budget, over all runs"),
    "dp-epsilon": ("the run's", "the most that all runs together may spend of it"),
    "dp-delta": ("the run's", "its δ"),
}


def task_config(
    run: Mapping[str, ConfigValue],
    node: Mapping[str, ConfigValue],
    *,
    labels: Sequence[str] = (),
    train: str = "",
) -> TaskConfig:
    """Build the task's configuration; what a node's own config says of its data wins.

    ``labels`` are the names agreed for the run; ``train`` overrides what is trained. Where
    the run config names several data sources, simulated clients take them in turn.
    """
    known = {field.name.replace("_", "-") for field in fields(TaskConfig)}
    given: dict[str, Any] = {key: run[key] for key in run if key in known}
    sources = data_sources(str(run.get("data", "")))
    if len(sources) > 1:
        place = int(node.get("partition-id", 0)) % len(sources)
        for key in _OWN:
            words = sources if key == "data" else split_list(str(run.get(key, "")))
            if len(words) == len(sources):
                given[key] = words[place]
    given.update({key: node[key] for key in (*_OWN, *_MACHINE) if key in node})
    if node.get("labels"):
        given["labels"] = node["labels"]
    if "data-path" in node:
        given["data"] = node["data-path"]
    if own := _own_rank(run, node):
        given["lora-own-rank"] = own
    if train:
        given["train"] = train
    if labels:
        given["labels"] = tuple(labels)
    return configure(**{key.replace("-", "_"): value for key, value in given.items()})


def _own_rank(run: Mapping[str, ConfigValue], node: Mapping[str, ConfigValue]) -> int:
    """The rank that a node learns: its own word, else its turn in the run's list; 0 for neither.

    Raises `ConfigError` for what is no whole number above 0.
    """
    ranks = split_list(str(run.get("lora-ranks", "")))
    word: Any = node.get("lora-rank", "")
    if word == "" and ranks and "partition-id" in node:
        word = ranks[int(node["partition-id"]) % len(ranks)]
    if word == "":
        return 0
    if isinstance(word, bool) or not str(word).isdecimal() or int(word) < 1:
        raise ConfigError(
            f"lora-rank = {word!r} of a node; a whole number of at least 1 is needed, at most the "
            "run's lora-rank"
        )
    return int(word)


def place(run: Mapping[str, ConfigValue], node: Mapping[str, ConfigValue]) -> tuple[int, int]:
    """Return (number, count): which part of its data source a node trains on.

    (0, 1), the whole, for a node with its own data or outside a simulation.
    """
    if "data-path" in node or "data" in node or "partition-id" not in node:
        return 0, 1
    number, nodes = int(node["partition-id"]), int(node["num-partitions"])
    sources = len(data_sources(str(run.get("data", ""))))
    return number // sources, len(range(number % sources, nodes, sources))


def data_sources(data: str) -> tuple[str, ...]:
    """Split ``data`` where it lists several sources; a path that exists is one."""
    if Path(data).exists():
        return (data,)
    return split_list(data) or (data,)


def split_list(text: str) -> tuple[str, ...]:
    """Split a comma-separated run-config value; run config holds scalars only."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
