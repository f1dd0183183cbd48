"""Checkpoints: safetensors files and Hugging Face folders, read mapped, written atomically."""

from dare_agg.checkpoint.reader import (
    Checkpoint,
    CheckpointReader,
    TensorInfo,
    narrow,
    open_checkpoint,
    parse_dtype,
    widen,
)
from dare_agg.checkpoint.writer import (
    CheckpointWriter,
    TensorPlan,
    carry_files,
    plan_like,
    write_checkpoint,
)

__all__ = [
    "Checkpoint",
    "CheckpointReader",
    "CheckpointWriter",
    "TensorInfo",
    "TensorPlan",
    "carry_files",
    "narrow",
    "open_checkpoint",
    "parse_dtype",
    "plan_like",
    "widen",
    "write_checkpoint",
]
