"""Text classification: tokens of a pretrained encoder, pooled, under a linear head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from client.config import TaskConfig
from client.data import load_text
from client.head import linear_head, with_adapters
from client.models import (
    IMAGE_ENCODER,
    built_in_kind,
    model_path,
    refuse_pickled_model,
    refuse_quantised_model,
)
from client.rows import Data, Indices, Rows
from client.tasks.task import Batch, Reader, Task, test_share
from client.text_files import is_small
from dare_agg.errors import ConfigError


def load_labelled_text(config: TaskConfig) -> Data:
    """Load the configuration's texts with their labels."""
    return load_text(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        partition_by=config.partition_by,
        label_names=config.labels,
        delimiter=config.delimiter,
        encoding=config.encoding,
        test_share=test_share(config),
        test_source=config.test_data,
        seed=config.seed,
    )


def look_at_text(config: TaskConfig) -> None:
    """Refuse a small file from which nothing can be learned."""
    if is_small(Path(config.data)):
        load_labelled_text(config)


def text_reader(config: TaskConfig, rows: Rows) -> Reader:
    """Tokenise all rows once; a batch is ``input_ids`` and ``attention_mask`` (n, length)."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path(config.model), trust_remote_code=False)
    coded = tokenizer(
        list(rows.inputs) or [""],
        truncation=True,
        max_length=config.length,
        padding="max_length",
        return_tensors="pt",
    )
    ids, attention = coded["input_ids"], coded["attention_mask"]

    def read(at: Indices) -> Batch:
        chosen = torch.from_numpy(at)
        return {"input_ids": ids[chosen], "attention_mask": attention[chosen]}

    return read


def text_model(config: TaskConfig, labels: int) -> Any:
    """Load the encoder and put a seeded linear head on its pooled token states."""
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    if built_in_kind(config.model) == IMAGE_ENCODER:
        raise ConfigError(f"model {config.model!r} sees images; data {config.data!r} is text")
    logging.disable_progress_bar()
    folder = model_path(config.model)
    refuse_quantised_model(folder)
    refuse_pickled_model(folder)
    torch.manual_seed(config.seed)  # for what the checkpoint lacks, such as a pooler
    try:
        encoder = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {folder!r} cannot be loaded: {' '.join(str(error).split())[:200]}; give a "
            "Hugging Face folder, or a name while a hub can be reached"
        ) from error
    encoder = with_adapters(encoder, config)

    class EncoderWithHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder
            self.head = linear_head(encoder.config.hidden_size, labels, config.seed)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask
            ).last_hidden_state
            if config.pooling == "cls":
                return self.head(states[:, 0])
            mask = attention_mask.unsqueeze(-1).to(states.dtype)
            return self.head((states * mask).sum(1) / mask.sum(1).clamp(min=1))

    return EncoderWithHead()


TASK = Task(
    "text-classification",
    recognises=lambda config: True,
    load=load_labelled_text,
    network=text_model,
    reader=text_reader,
    look=look_at_text,
)
