"""Which code runs the codec's inner loops: numpy, or the same loops compiled by numba.

Both give the same bits, so this is a question of time alone. ``DARE_AGG_KERNEL`` (or
`choose_kernel`) says which:

- ``auto`` (default): numpy, until this process has coded as much as loading the compiled loops
  costs; then those, where numba is installed (extra ``fast``). A short process never pays.
- ``numpy``: never anything else.
- ``numba``: the compiled loops from the start; an error without numba.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError, did_you_mean

KERNELS = ("auto", "numpy", "numba")
VARIABLE = "DARE_AGG_KERNEL"
_MODULE = "dare_agg.codec.numba_loops"

# Loading takes half a CPU second and 115 MB from numba's files on disk, eight seconds where
# they have to be compiled first (once a machine): what numpy codes in 2 and in 20 seconds.
_WORTH_LOADING = 200_000_000
_WORTH_COMPILING = 2_000_000_000


class _State:
    """What this process has chosen, loaded and coded."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.choice: str | None = None
        self.loaded: ModuleType | None = None
        self.coded = 0
        self.threshold: int | None = None


_state = _State()


def choose_kernel(name: str) -> None:
    """Choose for this process; see the module's text.

    Raises `ConfigError` for an unknown name, and for ``numba`` where that is missing.
    """
    if name not in KERNELS:
        raise ConfigError(f"kernel {name!r} is unknown{did_you_mean(name, KERNELS)} ({VARIABLE})")
    if name == "numba":
        _load(needed=True)
    _state.choice = name


def kernel_in_use() -> str:
    """The name of what runs now: ``numpy`` or ``numba``."""
    return "numpy" if compiled() is None else "numba"


def compiled(survivors: int = 0) -> ModuleType | None:
    """Return the compiled loops if they are to be used for so many survivors, else None."""
    if _state.choice is None:
        choose_kernel(os.environ.get(VARIABLE, "auto"))
    if _state.choice == "numpy":
        return None
    if _state.loaded is not None or not survivors:
        return _state.loaded
    _state.coded += survivors
    if _state.threshold is None:
        _state.threshold = _WORTH_LOADING if _kept_on_disk() else _WORTH_COMPILING
    if _state.coded >= _state.threshold and _state.choice == "auto":
        return _load(needed=False)
    return None


def plain_float32(array: NDArray[Any]) -> bool:
    """Whether the compiled loops can read this vector where it lies."""
    return (
        type(array) is np.ndarray
        and array.dtype == np.float32
        and array.ndim == 1
        and array.flags.c_contiguous
        and array.flags.aligned
    )


def _kept_on_disk() -> bool:
    """Whether an earlier process has left compiled loops beside their source."""
    source = importlib.util.find_spec(_MODULE)
    if source is None or source.origin is None:
        return False
    path = Path(source.origin)
    folder = Path(importlib.util.cache_from_source(source.origin)).parent
    kept = (file.stat().st_mtime for file in folder.glob(f"{path.stem}.*.nbi"))
    return max(kept, default=0.0) >= path.stat().st_mtime


def _load(*, needed: bool) -> ModuleType | None:
    # Whoever comes while another thread loads goes on with numpy.
    if not _state.lock.acquire(blocking=needed):
        return None
    try:
        if _state.loaded is None:
            if sys.byteorder != "little":
                raise ImportError("the compiled loops need a little-endian machine")
            _state.loaded = importlib.import_module(_MODULE)
    # RuntimeError: numba finds no place to keep what it compiled.
    except (ImportError, OSError, RuntimeError) as error:
        if needed:
            raise ConfigError(
                f"kernel 'numba' cannot be loaded ({error}); install dare-agg[fast], or choose "
                "'auto'"
            ) from error
        _state.choice = "numpy"
    finally:
        _state.lock.release()
    return _state.loaded
