"""What Ctrl-C, SIGTERM and a closed terminal do: the first ends kindly, another one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class _Received:
    """The first signal, what a second one does, whether the first waits, what is said then."""

    number: int = 0
    at_once: Callable[[], None] | None = None
    held: bool = False
    remedy: str = ""


_received = _Received()


def install() -> None:
    """Handle the signals in this process; a hang-up that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        return
    _received.number = 0
    for number in NUMBERS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


def status() -> int:
    """128 + the number of the signal that came, as shells count; 0 where none did."""
    return 128 + _received.number if _received.number else 0


def forget() -> None:
    """Take the signal that came for the usual end of what went on: it is no failure."""
    _received.number = 0


def message() -> str:
    """What is said of an interruption, in one line."""
    return "interrupted" + (f"; {_received.remedy}" if _received.remedy else "")


@contextlib.contextmanager
def ending(at_once: Callable[[], None], remedy: str) -> Iterator[None]:
    """Have ``at_once`` done when a second signal comes; ``remedy`` is said after the first."""
    _received.at_once, _received.remedy = at_once, remedy
    try:
        yield
    finally:
        _received.at_once = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let the first signal wait for the end of what must not be left half done."""
    before, _received.held = _received.number, True
    try:
        yield
    finally:
        _received.held = False
    if _received.number and not before:
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        _fall_silent()
    if not _received.number:
        _received.number = number
        if not _received.held:
            raise KeyboardInterrupt
    elif number != signal.SIGHUP:  # which comes twice, of the terminal and of the shell
        if _received.at_once is not None:
            _received.at_once()
        os._exit(128 + number)


def _fall_silent() -> None:
    """Write into nothing from now on: of a terminal that is gone each write fails."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nothing, descriptor)
    os.close(nothing)
