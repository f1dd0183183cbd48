"""What torch can compute on here: the words of ``device``, what they find, what is missing.

`check_device` says what is missing without loading torch, which takes seconds: whether torch's
build has CUDA stands in a file of its own, and how many GPUs there are the driver tells.
`find_device` is asked by whoever is about to train, with torch loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError, did_you_mean

AUTO = "auto"
# In the order in which "auto" takes them; the CPU is always there.
KINDS = ("cuda", "mps", "xpu", "cpu")
PRECISIONS = ("float32", "bfloat16", "float16", "auto")
_NUMBERED = ("cuda", "xpu")
_WORD = re.compile(r"(cuda|xpu):(\d{1,3})")
# Whoever says one of these means NVIDIA's.
_OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda", "cuda0": "cuda:0"}
_BUILDS = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Build:
    """What torch was built for: versions, "" for what it has not."""

    version: str = ""
    cuda: str = ""
    hip: str = ""
    xpu: str = ""


def parse_device(word: str) -> tuple[str, int | None]:
    """The kind and number that a word of ``device`` means; raises `ConfigError` for another.

    >>> parse_device("cuda:1"), parse_device("mps")
    (('cuda', 1), ('mps', None))
    """
    if numbered := _WORD.fullmatch(word):
        return numbered[1], int(numbered[2])
    if word not in (AUTO, *KINDS):
        said = word[:40].lower()
        known = (AUTO, *KINDS, *(f"{kind}:N" for kind in _NUMBERED))
        raise ConfigError(
            f"device {word[:40]!r} is unknown{did_you_mean(_OTHER_NAMES.get(said, said), known)}"
        )
    return word, None


@cache
def torch_build() -> Build | None:
    """What torch was built for, None where it is not installed; torch is not loaded."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    said = importlib.util.spec_from_file_location("_torch_version", file)
    if said is None or said.loader is None or not file.is_file():
        return None
    module = importlib.util.module_from_spec(said)
    said.loader.exec_module(module)
    return Build(
        *(str(getattr(module, n, None) or "") for n in ("__version__", "cuda", "hip", "xpu"))
    )


@cache
def seen_by_driver(kind: str) -> int | None:
    """How many GPUs a kind has here, None where only torch can tell; torch is not loaded."""
    build = torch_build()
    if kind == "cpu" or build is None:
        return None
    if kind == "mps":
        return int((platform.system(), platform.machine()) == ("Darwin", "arm64"))
    if kind == "xpu":
        return None if build.xpu else 0
    if build.hip:
        return None
    return _cuda_gpus() if build.cuda else 0


def _cuda_gpus() -> int:
    """The GPUs that NVIDIA's driver shows to this process: as many as torch would see."""
    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def check_device(word: str) -> None:
    """Raise `ConfigError` where it is known without torch that a device is not here."""
    kind, number = parse_device(word)
    count = seen_by_driver(kind) if kind != AUTO else None
    if count is not None and count <= (number or 0):
        raise _missing(word, kind, count)


def find_device(word: str) -> str:
    """The torch device that a word means here, such as "cuda:0"; loads torch.

    "auto" is the first of `KINDS` that is here. Raises `ConfigError` for one that is missing,
    with those that are here.
    """
    kind, number = parse_device(word)
    if kind == AUTO:
        kind = next(known for known in KINDS if _count(known))
    elif _count(kind) <= (number or 0):
        raise _missing(word, kind, _count(kind))
    return f"{kind}:{number or 0}" if kind in _NUMBERED else kind


def devices_here() -> list[str]:
    """Every device that torch sees here, in words; loads torch."""
    found = []
    for kind in KINDS:
        for number in range(_count(kind)):
            named = f"{kind}:{number}" if kind in _NUMBERED else kind
            found.append(" ".join(filter(None, (named, _described(kind, number)))))
    return found


def _count(kind: str) -> int:
    import torch

    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    part: Any = getattr(torch, kind, None)
    return int(part.device_count()) if part is not None and part.is_available() else 0


def _described(kind: str, number: int) -> str:
    import torch

    if kind == "cpu":
        return f"({torch.get_num_threads()} threads)"
    if kind not in _NUMBERED:
        return ""
    facts = getattr(torch, kind).get_device_properties(number)
    return f"({facts.name}, {facts.total_memory / 1e9:.0f} GB)"


def _missing(word: str, kind: str, count: int) -> ConfigError:
    build = torch_build() or Build()
    here = [f"{kind}:{number}" for number in range(count)] if kind in _NUMBERED else []
    others = [
        known for known in KINDS if known != kind and (known == "cpu" or seen_by_driver(known))
    ]
    if count:
        why, remedy = f"there are {count} of them", f"say {kind}:0 to {kind}:{count - 1}"
    elif kind == "mps":
        why, remedy = "that is the GPU of an Apple processor under macOS", "leave it out"
    elif not (build.cuda or build.hip if kind == "cuda" else build.xpu):
        why = f"torch {build.version} is a build without it"
        remedy = f"install another build ({_BUILDS})"
    else:
        why = "torch is a build with it, but sees no GPU"
        remedy = "look at the driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES"
        if kind == "xpu":
            remedy = "look at the driver and at ONEAPI_DEVICE_SELECTOR"
    return ConfigError(
        f"device {word!r} is not here: {why}; here: {', '.join([*here, *others])}; {remedy}, or "
        f'let the device be found: "auto"'
    )
