"""Checkpoints: safetensors files and Hugging Face folders, read mapped, written atomically."""

from dare_agg.checkpoint.carried import Carried, Left, carry_files
from dare_agg.checkpoint.opening import open_checkpoint, open_tensors, refuse_quantised
from dare_agg.checkpoint.reader import (
    Checkpoint,
    CheckpointReader,
    TensorInfo,
    narrow,
    parse_dtype,
    widen,
)
from dare_agg.checkpoint.stated_dtype import state_dtype
from dare_agg.checkpoint.writer import (
    CheckpointWriter,
    TensorPlan,
    plan_like,
    write_checkpoint,
)

__all__ = [
    "Carried",
    "Checkpoint",
    "CheckpointReader",
    "CheckpointWriter",
    "Left",
    "TensorInfo",
    "TensorPlan",
    "carry_files",
    "narrow",
    "open_checkpoint",
    "open_tensors",
    "parse_dtype",
    "plan_like",
    "refuse_quantised",
    "state_dtype",
    "widen",
    "write_checkpoint",
]
