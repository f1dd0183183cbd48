"""Statistics of a model on data: the Fisher diagonal and the Gram matrices of its Linears.

Fisher values (arXiv 2111.09832) weigh models in `fisher`, Gram matrices (arXiv 2212.09849)
make the least-squares problem of `regmean`. Needs torch, which is imported when called.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

Batch = Mapping[str, Any]
Arrays = dict[str, NDArray[np.float32]]
Forward = Callable[["torch.nn.Module", Batch], "torch.Tensor"]

FISHER_RULES = {
    "true": "mean over examples of Σ_c p_c·(∂ log p_c)², each example by itself",
    "reference": "the paper's code: (∂ Σ_batch Σ_c √p_c·log p_c)² summed over batches / examples",
}
KINDS = ("fisher", "gram")
# Where `dare-agg run` puts a head, and how it names the two parts.
_HEAD_FILE, _HEAD, _ENCODER = "head.safetensors", "head.", "encoder."


def model_logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Call a Hugging Face model on a batch without its labels; return the logits."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = model(**inputs)
    return getattr(output, "logits", output)


def collect_fisher(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    rule: str = "true",
    examples: int | None = None,
    forward: Forward = model_logits,
) -> Arrays:
    """Return the Fisher diagonal of every parameter that takes part, by name.

    ``rule`` is one of `FISHER_RULES`. One output column is a regression: the Fisher value is
    the squared derivative of the output; the reference rule takes that of the batch's mean
    squared error where the batch has ``labels``. Collection stops after ``examples`` examples; the
    reference rule counts a last, smaller batch as a whole one, as the paper's code does.
    Parameters the output does not depend on are left out.
    """
    import torch

    if rule not in FISHER_RULES:
        raise ConfigError(f"Fisher rule {rule!r} is unknown{did_you_mean(rule, FISHER_RULES)}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums: dict[str, torch.Tensor] = {}
    # Sums of few terms in float32, of those in float64: nearly as fast as float32 alone.
    recent: dict[str, torch.Tensor] = {}
    terms = 0

    def flush() -> None:
        for name, part in recent.items():
            if name not in sums:
                sums[name] = torch.zeros_like(part, dtype=torch.float64)
            sums[name] += part
            part.zero_()

    def add_square(target: torch.Tensor, weight: float, last: bool = True) -> None:
        nonlocal terms
        found = torch.autograd.grad(
            target, list(parameters.values()), retain_graph=not last, allow_unused=True
        )
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                if name not in recent:
                    recent[name] = torch.zeros_like(gradient, dtype=torch.float32)
                recent[name].addcmul_(gradient.float(), gradient.float(), value=weight)
        terms += 1
        if terms % 64 == 0:
            flush()

    model.eval()
    seen, full = 0, 0
    for batch in batches:
        if examples is not None and seen >= examples:
            break
        size = _batch_size(batch)
        full = max(full, size)
        if rule == "reference":
            logits = forward(model, batch)
            if logits.shape[-1] == 1 and "labels" in batch:
                gap = logits.reshape(-1) - batch["labels"].reshape(-1).to(logits.dtype)
                add_square(gap.square().mean(), 1.0)
            elif logits.shape[-1] == 1:
                add_square(logits.sum(), 1.0)
            else:
                logs = torch.log_softmax(logits, -1)
                add_square((logs.detach().exp().sqrt() * logs).sum(), 1.0)
            seen += full
            continue
        for number in range(size if examples is None else min(size, examples - seen)):
            logits = forward(model, {k: v[number : number + 1] for k, v in batch.items()})
            if logits.shape[-1] == 1:
                add_square(logits.sum(), 1.0)
            else:
                logs = torch.log_softmax(logits.reshape(-1, logits.shape[-1]), -1).sum(0)
                shares = torch.softmax(logits.detach().reshape(-1, logits.shape[-1]), -1).mean(0)
                for column in range(logs.numel()):
                    last = column + 1 == logs.numel()
                    add_square(logs[column], float(shares[column]), last)
            seen += 1
    if not seen:
        raise ConfigError("no example to collect statistics on; the data are empty")
    flush()
    return {name: (sums[name] / seen).float().cpu().numpy() for name in parameters if name in sums}


def collect_grams(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    *,
    examples: int | None = None,
    include_padding: bool = False,
    forward: Forward = model_logits,
) -> Arrays:
    """Return XᵀX / rows of the inputs of every Linear, under ``<module>.weight``.

    Rows are tokens; those the batch's ``attention_mask`` marks as padding are left out unless
    ``include_padding``. Linears that are never called are left out.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}
    mask: list[torch.Tensor | None] = [None]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach()
            kept = mask[0]
            if kept is not None and x.dim() == 3 and x.shape[:2] == kept.shape:
                x = x[kept]
            x = x.reshape(-1, x.shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            rows[name] = rows.get(name, 0) + x.shape[0]

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    seen = 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                if examples is not None and seen >= examples:
                    break
                padding = batch.get("attention_mask")
                mask[0] = None if include_padding or padding is None else padding.bool()
                forward(model, batch)
                seen += _batch_size(batch)
    finally:
        for handle in hooks:
            handle.remove()
    if not sums:
        raise ConfigError("no Linear was called; regmean has nothing to solve for this model")
    return {name: (sums[name] / max(1, rows[name])).float().cpu().numpy() for name in sorted(sums)}


def _batch_size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def write_statistics(
    path: Path, arrays: Mapping[str, NDArray[np.float32]], kind: str, about: Mapping[str, str]
) -> None:
    """Write statistics as a safetensors file, its kind and origin in the metadata."""
    write_checkpoint(path, arrays, metadata={"kind": kind, **about}, overwrite=True)


def statistics_of_folder(
    model: Path,
    data: Path,
    kind: str,
    *,
    text_column: str = "text",
    examples: int = 256,
    batch_size: int = 16,
    length: int = 128,
    rule: str = "true",
    include_padding: bool = False,
) -> Arrays:
    """Collect statistics of a text classifier's folder on a data file's text column."""
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is unknown{did_you_mean(kind, KINDS)}")
    texts = list(_limited(read_texts(data, text_column), examples))
    if not texts:
        raise ConfigError(f"{data} has no row; statistics need data")
    tokenizer, network, forward = _classifier(model)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(texts), batch_size):
            yield dict(
                tokenizer(
                    texts[start : start + batch_size], padding=True, truncation=True,
                    max_length=length, return_tensors="pt",
                )
            )  # fmt: skip

    if kind == "gram":
        arrays = collect_grams(network, batches(), include_padding=include_padding, forward=forward)
    else:
        arrays = collect_fisher(network, batches(), rule=rule, forward=forward)
    # As the folder names them: a head kept in a file of its own is no tensor of the model.
    return {
        name.removeprefix(_ENCODER): array
        for name, array in arrays.items()
        if not name.startswith(_HEAD)
    }


def _classifier(folder: Path) -> tuple[Any, torch.nn.Module, Forward]:
    """Load a text classifier with its tokenizer; its head may lie in a file beside the encoder.

    Raises `ConfigError` where the head is missing: one drawn at random would make statistics
    of nothing.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} has no config.json; give the Hugging Face folder of a fine-tuned text "
            "classifier"
        )
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(
            "statistics need torch and transformers; install dare-agg[train]"
        ) from error
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    # Its report of missing tensors is an error here.
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if (folder / _HEAD_FILE).is_file():
            return tokenizer, _encoder_with_head(folder), model_logits
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder} cannot be loaded as a text classifier: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        logging.set_verbosity(level)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ConfigError(
            f"{folder} lacks {missing[0]!r} ({len(missing)} tensors in all), which would be drawn "
            f"at random; give the folder with its trained head, in the model or in {_HEAD_FILE}"
        )
    return tokenizer, network, model_logits


def _encoder_with_head(folder: Path) -> torch.nn.Module:
    """An encoder under the linear head of `head.safetensors`, as `dare-agg run` writes them."""
    import torch
    from transformers import AutoModel

    saved = open_checkpoint(folder / _HEAD_FILE)
    wanted = [f"{_HEAD}weight", f"{_HEAD}bias"]
    if sorted(saved.names) != sorted(wanted):
        raise ConfigError(
            f"{folder / _HEAD_FILE} holds {', '.join(saved.names)}; not a linear head"
        )
    weight, bias = (torch.from_numpy(saved.array(name)) for name in wanted)
    pooling = "mean"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        pooling = provenance.get("config", {}).get("pooling", pooling)
    loaded = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)

    class EncoderWithHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = loaded
            self.head = torch.nn.Linear(weight.shape[1], weight.shape[0])
            self.head.load_state_dict({"weight": weight, "bias": bias})

        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            states = self.encoder(**inputs).last_hidden_state
            if pooling == "cls":
                return self.head(states[:, 0])
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            return self.head((states * mask).sum(1) / mask.sum(1).clamp(min=1))

    return EncoderWithHead()


def read_texts(path: Path, column: str) -> Iterator[str]:
    """Yield the text column of a CSV, JSON Lines or Parquet file."""
    for row in _rows(path):
        if column not in row:
            raise ConfigError(f"{path} has no column {column!r}{did_you_mean(column, row)}")
        yield str(row[column])


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a CSV, JSON Lines or Parquet file")
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with path.open(encoding="utf-8", newline="") as stream:
        if path.suffix in (".jsonl", ".json"):
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ConfigError(f"{path}:{number} is no JSON object") from error
                    if not isinstance(row, dict):
                        raise ConfigError(f"{path}:{number} is no JSON object")
                    yield row
        elif path.suffix in (".csv", ".tsv"):
            yield from csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        else:
            raise ConfigError(
                f"{path}: {path.suffix!r} is no known kind; .csv .tsv .jsonl .parquet"
            )


def _limited(items: Iterator[str], count: int) -> Iterator[str]:
    for number, item in enumerate(items):
        if number >= count:
            return
        yield item
