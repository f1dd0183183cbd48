"""Writing checkpoints: streamed tile by tile, complete or not there at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint.reader import (
    _EXPONENT,
    _SUFFIX,
    INDEX_NAME,
    WEIGHTS_NAME,
    Checkpoint,
    first_nonfinite,
    narrow,
)
from dare_agg.errors import CheckpointError, NonFiniteError
from dare_agg.files.atomic import draft_beside, put_in_place
from dare_agg.files.safetensors_header import DTYPE_BYTES
from dare_agg.vectors.layout import FloatVector

_SPARE_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to be written: its dtype (safetensors word), shape and shard file name."""

    dtype: str
    shape: tuple[int, ...]
    shard: str = WEIGHTS_NAME

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


def head_of(
    plans: Mapping[str, TensorPlan], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """What a safetensors file of these tensors begins with, where each begins, and its size.

    Wide dtypes come first, which keeps every tensor aligned to its element.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    starts: dict[str, int] = {}
    at = 0
    for name in sorted(plans, key=lambda name: (-DTYPE_BYTES[plans[name].dtype], name.encode())):
        plan = plans[name]
        starts[name], at = at, at + plan.size * DTYPE_BYTES[plan.dtype]
        header[name] = {
            "dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [starts[name], at],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    placed = {name: begin + start for name, start in starts.items()}
    return len(text).to_bytes(8, "little") + text, placed, begin + at


@dataclass
class CheckpointWriter:
    """Writes tensors in any order, in parts, into a draft beside ``out``.

    Use as a context: leaving it normally puts everything in place by a rename, leaving it by
    an error removes the draft and leaves ``out`` as it was.
    """

    out: Path
    plans: Mapping[str, TensorPlan]
    metadata: Mapping[str, str]
    overwrite: bool = False
    durable: bool = True
    _starts: dict[str, int] = field(default_factory=dict, init=False)
    _files: dict[str, int] = field(default_factory=dict, init=False)
    _draft: Path = field(default=Path(), init=False)

    @property
    def single(self) -> bool:
        """Whether ``out`` is one ``.safetensors`` file; else it is a folder of shards."""
        return self.out.suffix == _SUFFIX

    def __enter__(self) -> CheckpointWriter:
        check_target(self.out, self.plans, overwrite=self.overwrite)
        try:
            return self._begin()
        except OSError as error:
            self._discard()
            raise unwritable(self.out, error) from error

    def _begin(self) -> CheckpointWriter:
        self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        self._draft = draft_beside(self.out)
        if not self.single:
            self._draft.mkdir()
        try:
            shards = sorted({plan.shard for plan in self.plans.values()})
            for shard in shards:
                self._create(shard)
            if len(shards) > 1 and not self.single:
                self._write_index()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._publish()
        except OSError as failed:
            raise unwritable(self.out, failed) from failed
        finally:
            self._discard()

    @property
    def folder(self) -> Path:
        """The draft: other files of the model go here before the end."""
        return self._draft

    def write(self, name: str, first: int, values: FloatVector) -> None:
        """Round float32 ``values`` to the tensor's dtype; write from element ``first``.

        Raises `NonFiniteError` where a finite value is too large for the dtype.
        """
        dtype = self.plans[name].dtype
        rounded = np.ascontiguousarray(narrow(values, dtype))
        if dtype in ("F16", "BF16"):
            at = first_nonfinite(rounded, _EXPONENT[dtype])
            if at >= 0:
                raise NonFiniteError(
                    f"merged value {values[at]:g} in tensor {name!r} at flat index {first + at} "
                    f"does not fit {dtype}; write with --dtype float32"
                )
        self.write_raw(name, first * DTYPE_BYTES[dtype], rounded)

    def write_raw(self, name: str, offset: int, stored: NDArray[np.generic]) -> None:
        """Write bytes as they are, from byte ``offset`` of the tensor."""
        file = self._files[self.plans[name].shard]
        view = memoryview(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
        at = self._starts[name] + offset
        while view:
            try:
                written = os.pwrite(file, view, at)
            except OSError as error:
                raise unwritable(self.out, error) from error
            view, at = view[written:], at + written

    def _create(self, shard: str) -> None:
        plans = {name: plan for name, plan in self.plans.items() if plan.shard == shard}
        head, starts, size = head_of(plans, self.metadata)
        self._starts.update(starts)
        path = self._draft if self.single else self._draft / shard
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._files[shard] = file
        os.pwrite(file, head, 0)
        os.truncate(file, size)

    def _write_index(self) -> None:
        total = sum(p.size * DTYPE_BYTES[p.dtype] for p in self.plans.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: self.plans[name].shard for name in sorted(self.plans)},
        }
        text = json.dumps(index, indent=2) + "\n"
        (self._draft / INDEX_NAME).write_text(text, encoding="utf-8")

    def _publish(self) -> None:
        for shard in list(self._files):
            os.close(self._files.pop(shard))
        put_in_place(self._draft, self.out, durable=self.durable)

    def _discard(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if self._draft.is_dir() and self._draft != Path():
            shutil.rmtree(self._draft)
        elif self._draft.is_file():  # a read-only place refuses to remove even what is not there
            self._draft.unlink()


@contextmanager
def folder_beside(out: Path, word: str) -> Iterator[Path]:
    """Give a folder on the disk that ``out`` will lie on, which goes at the end with all in it.

    Raises `CheckpointError` where nothing can be written there.
    """
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.{word}.", dir=parent)
    except OSError as error:
        raise unwritable(out, error) from error
    with folder:
        yield Path(folder.name)


def unwritable(out: Path, error: OSError) -> CheckpointError:
    """Say what keeps ``out`` from being written, and what helps."""
    remedies = {
        errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "choose another place",
        errno.EEXIST: "a file stands where a folder is needed",
        errno.ENOTDIR: "a file stands where a folder is needed",
    }  # fmt: skip
    remedy = remedies.get(error.errno or 0, "choose a place that can be written to")
    return CheckpointError(f"{out} cannot be written: {error.strerror or error}; {remedy}")


def check_target(out: Path, plans: Mapping[str, TensorPlan], *, overwrite: bool) -> None:
    """Refuse an existing ``out`` (unless ``overwrite``) and a disk too full for the result.

    Raises `CheckpointError` before anything is written.
    """
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists; choose another name or allow overwriting (--force)")
    if out.exists() and out.is_dir() == (out.suffix == _SUFFIX):
        raise CheckpointError(f"{out} exists and is of the other kind (file, folder); remove it")
    if out.is_dir() and any(out.iterdir()) and not any(out.glob(f"*{_SUFFIX}")):
        raise CheckpointError(f"{out} is a folder without a model; it is not replaced")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed = sum(p.size * DTYPE_BYTES[p.dtype] for p in plans.values()) + _SPARE_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{out} needs {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free; make room"
        )


def plan_like(
    checkpoint: Checkpoint, out: Path, merged: Container[str], dtype: str | None
) -> dict[str, TensorPlan]:
    """Plan an output with the tensors, dtypes and shards of ``checkpoint``.

    ``dtype`` (a safetensors word) replaces the dtype of the ``merged`` tensors. A single-file
    output has one shard.
    """
    single = out.suffix == _SUFFIX
    sharded = len(set(checkpoint.weights)) > 1
    return {
        name: TensorPlan(
            dtype if dtype is not None and name in merged else info.dtype,
            info.shape,
            info.file.name if sharded and not single else WEIGHTS_NAME,
        )
        for name, info in checkpoint.tensors.items()
    }


def write_checkpoint(
    out: str | os.PathLike[str],
    arrays: Mapping[str, NDArray[np.generic]],
    *,
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write named arrays atomically as a ``.safetensors`` file or a model folder.

    ``dtypes`` gives safetensors words for tensors to be rounded from float32 (e.g. "BF16").

    Raises `CheckpointError` for a dtype that safetensors has no word for.
    """
    words = {
        "float32": "F32", "float64": "F64", "float16": "F16", "int64": "I64", "int32": "I32",
        "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16",
        "uint32": "U32", "uint64": "U64",
    }  # fmt: skip
    wanted = dict(dtypes or {})
    plans = {}
    for name, array in arrays.items():
        if array.dtype.name not in words:
            raise CheckpointError(f"tensor {name!r} has dtype {array.dtype}; convert it first")
        plans[name] = TensorPlan(wanted.get(name, words[array.dtype.name]), array.shape)
    with CheckpointWriter(
        Path(out), plans, {"format": "pt", **(metadata or {})}, overwrite
    ) as writer:
        for name, array in arrays.items():
            if name in wanted and array.dtype.kind == "f":
                writer.write(name, 0, np.ascontiguousarray(array, np.float32).reshape(-1))
            else:
                writer.write_raw(name, 0, array)
