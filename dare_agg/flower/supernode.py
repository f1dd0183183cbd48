"""``python -m dare_agg.flower.supernode``: flower-supernode that loses no time between rounds.

Takes the same options and runs Flower's SuperNode. Its waits are shorter: it asks the SuperLink
for work again after a tenth of the time that it has waited (0.1 to 3 s, always 3 s in Flower); its
SuperExec looks five times a second for a message to hand on; the process that Flower starts for
every message is forked from one that has Flower loaded (`dare_agg.flower.processes.launcher`); and
a reply is sent on when it is there.
What cannot be had, on another system or with another Flower, is left out with a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from dare_agg.errors import DareError
from dare_agg.flower.internals import ask_sooner, run_program, send_sooner
from dare_agg.flower.processes import launcher, start_clientapp

LOG = logging.getLogger("flwr")
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 3.0
_SHARE = 0.1
# Flower's own variable: seconds between two looks of a SuperExec; Flower has 1.
LOOK_VARIABLE = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"
LOOK_SECONDS = 0.2
REPLY_SECONDS = 0.02


def pause_after(waited: float) -> float:
    """Seconds to the next question, of a node that has waited so long for work."""
    return min(LONGEST_PAUSE, max(SHORTEST_PAUSE, _SHARE * waited))


def run_supernode(arguments: Sequence[str]) -> None:
    """Run ``flower-supernode`` with these arguments in this process; see the module."""
    os.environ.setdefault(LOOK_VARIABLE, str(LOOK_SECONDS))
    with _launched() as receiving:
        try:
            ask_sooner(pause_after, receiving)
            send_sooner(REPLY_SECONDS)
        except DareError as error:
            LOG.warning("Flower's own pauses of half a second to three stay: %s", error)
        run_program("flower-supernode", arguments)


class Receiving(contextlib.AbstractContextManager["Receiving"]):
    """A lock that is held while within, for those who wait for the message to be there."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def __enter__(self) -> Receiving:
        fcntl.flock(self.file, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self.file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _launched() -> Iterator[contextlib.AbstractContextManager[object]]:
    """While within, ``flwr-clientapp`` of the PATH is one that is forked; gives the lock that such
    a process waits for."""
    program = shutil.which(launcher.PROGRAM, path=_path(Path(sys.executable).parent))
    if program is None or not sys.platform.startswith("linux"):
        LOG.warning("each message starts a process anew: no %s on Linux", launcher.PROGRAM)
        yield contextlib.nullcontext()
        return
    with tempfile.TemporaryDirectory(prefix="dare-agg-node-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        socket = folder / "launcher.sock"
        command = folder / "bin" / launcher.PROGRAM
        command.parent.mkdir()
        words = [sys.executable, "-I", "-S", start_clientapp.__file__, str(socket), program]
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
        command.write_text(f'#!/bin/sh\nexec {quoted} "$@"\n', encoding="utf-8")
        command.chmod(0o700)
        start = [sys.executable, "-P", launcher.__file__, str(socket), "--remove", str(folder)]
        process = subprocess.Popen(start, stdin=subprocess.PIPE)
        before = os.environ.get("PATH", "")
        os.environ["PATH"] = _path(command.parent)
        try:
            yield Receiving(folder / launcher.RECEIVING)
        finally:
            os.environ["PATH"] = before
            assert process.stdin is not None
            process.stdin.close()
            process.terminate()


def _path(first: Path) -> str:
    return os.pathsep.join(part for part in (str(first), os.environ.get("PATH", "")) if part)


def main() -> None:
    """``python -m dare_agg.flower.supernode``: as the module says."""
    run_supernode(sys.argv[1:])


if __name__ == "__main__":
    main()
