"""Where a task computes: the device, its threads, and the precision of its matrix products."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

from client.config import TaskConfig
from dare_agg.deploy.devices import find_device
from dare_agg.errors import ConfigError

# Without it cuBLAS has no sums in a fixed order; it is read when a process first uses a GPU.
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Products in bfloat16 on the CPU: oneDNN keeps scratch of a weight's size for each of 1,024 shapes,
# and batches have another length each step. This many hold the layers of one step; it is read when
# a process first multiplies.
_ONEDNN = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@dataclass(frozen=True)
class Compute:
    """A device of torch ("cpu", "cuda:0"), threads of the CPU, and "float32" or what is cast to."""

    device: str
    threads: int = 1
    precision: str = "float32"

    @property
    def kind(self) -> str:
        """The device without its number, as autocast wants it."""
        return self.device.partition(":")[0]

    def begin(self) -> None:
        """Set this process up: threads, and on a GPU sums in a fixed order where torch has them."""
        import torch

        os.environ.setdefault(*_ONEDNN)
        torch.set_num_threads(self.threads)
        _keep_freed_memory()
        if self.kind == "cuda":
            os.environ.setdefault(*_CUBLAS)
            torch.use_deterministic_algorithms(True, warn_only=True)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass: matrix products in this precision."""
        import torch

        cast = self.precision != "float32"
        kind = torch.float16 if self.precision == "float16" else torch.bfloat16
        return torch.autocast(self.kind, kind, enabled=cast)

    def scaler(self) -> Any:
        """What keeps small gradients of float16 from vanishing; idle in other precisions."""
        import torch

        return torch.amp.GradScaler(self.kind, enabled=self.precision == "float16")

    def release(self) -> None:
        """Give back what this process no longer uses of a GPU that other clients share."""
        import torch

        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def check_sums(self) -> None:
        """Raise `ConfigError` on a device that cannot add up a model's statistics."""
        if self.kind == "mps":
            raise ConfigError(
                "Fisher values and Gram matrices are summed in float64, which device 'mps' has "
                'not; set device = "cpu" on this node, or take a method without statistics'
            )

    def move(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """A batch's tensors on this device; on the CPU these very ones."""
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}


def compute_of(config: TaskConfig) -> Compute:
    """Where a configuration computes on this machine; raises `ConfigError` for a missing device."""
    device = find_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = _suited(device)
    if config.weights != "float32":
        precision = "bfloat16"  # there is no more in such weights
    return Compute(device, config.threads, precision)


def _suited(device: str) -> str:
    """The precision in which a device is fast and fine-tuning loses nothing that is known."""
    import torch

    kind = device.partition(":")[0]
    if kind == "cuda":
        with torch.cuda.device(device):
            whole = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if whole else "float16"
    return "bfloat16" if kind == "xpu" else "float32"


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
