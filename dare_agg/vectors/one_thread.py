"""One thread for numpy's linear algebra, for as long as bits count.

Products, solutions and decompositions of BLAS and LAPACK have other last bits when they are cut for
other numbers of threads, which follow from the machine and the environment. Merges take their
threads over tensors instead (`dare_agg.merge.by_tensor`), and each tensor's algebra runs in one.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

# (get, set) of numpy's own wheels, of other builds of OpenBLAS, and of MKL.
_CALLS = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("scipy_openblas_get_num_threads", "scipy_openblas_set_num_threads"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)


class _Users:
    """How many are inside, and what the library was set to before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = 1


_USERS = _Users()


@cache
def blas_threads() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """How numpy's BLAS says and is told its number of threads; None where it does neither."""
    try:
        # Looks through what the extension was linked with, too.
        library = ctypes.CDLL(np.linalg._umath_linalg.__file__)  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return None
    for get, put in _CALLS:
        getter, setter = getattr(library, get, None), getattr(library, put, None)
        if getter is not None and setter is not None:
            getter.restype, getter.argtypes = ctypes.c_int, []
            setter.restype, setter.argtypes = None, [ctypes.c_int]
            return getter, setter
    return None


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run the block with one BLAS thread, whatever is set; any number of threads may be inside."""
    calls = blas_threads()
    if calls is None:
        yield
        return
    get, put = calls
    with _USERS.lock:
        if not _USERS.inside:
            _USERS.before = get()
            put(1)
        _USERS.inside += 1
    try:
        yield
    finally:
        with _USERS.lock:
            _USERS.inside -= 1
            if not _USERS.inside:
                put(_USERS.before)
