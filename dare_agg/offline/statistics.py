"""`dare-agg statistics`: a folder's model on a file of texts, its statistics as a file."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import open_checkpoint, refuse_quantised, write_checkpoint
from dare_agg.checkpoint.hub import located
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.files.json_text import parse_json, read_json
from dare_agg.merge.collect import (
    KINDS,
    Arrays,
    Batch,
    Forward,
    collect_fisher,
    collect_grams,
    model_logits,
)

if TYPE_CHECKING:
    import torch

# Where `dare-agg run` puts a head, and how it names the two parts.
_HEAD_FILE, _HEAD, _ENCODER = "head.safetensors", "head.", "encoder."


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
    """Collect statistics of a text classifier's folder on a data file's text column.

    Raises `ConfigError` for an unknown kind and for data without rows.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is unknown{did_you_mean(kind, KINDS)}")
    texts = list(_limited(read_texts(data, text_column), examples))
    if not texts:
        raise ConfigError(f"{data} has no row; statistics need data")
    tokenizer, network, forward = _classifier(located(model))

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
    refuse_quantised(folder)
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
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if (folder / _HEAD_FILE).is_file():
            return tokenizer, _encoder_with_head(folder), model_logits
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
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
        provenance = read_json(folder / "provenance.json")
        pooling = provenance.get("config", {}).get("pooling", pooling)
    loaded = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
    )

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
    """Yield the text column of a CSV, JSON Lines or Parquet file.

    Raises `ConfigError` for a column that is not there.
    """
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
                        row = parse_json(line)
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
