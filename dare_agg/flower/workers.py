"""A simulated client's worker that dies is replaced; without Ray itself a run ends.

Clients of a simulation run in Ray's workers. Flower puts one that was killed (most often by the
kernel, for want of memory) back among the idle ones. There it fails whatever it is given at once,
so that nearly all messages come to it, and a run goes on with the one or two clients that the
others reach. Here a new one takes its place, and what was asked of the dead one counts as a
failure of that client alone.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

from flwr.serverapp import Grid

from dare_agg.errors import RunError
from dare_agg.flower.internals import guard_workers, is_simulated

LOG = logging.getLogger("flwr")
WORKER_DIED = (
    "the worker process of this simulated client died (killed, most often because memory ran out)"
)
# Ray's own processes that no worker can do without.
_NEEDED = ("raylet", "gcs_server")


def replace_workers(grid: Grid) -> None:
    """Have workers of the simulation that this process runs replaced when they die.

    Does nothing where clients are elsewhere, or where it was done before.
    """
    if is_simulated(grid) and find_spec("ray"):
        guard_workers(check_engine, _died)


def check_engine() -> None:
    """Raise `RunError` where one of Ray's own processes has ended; all messages would wait."""
    node = getattr(sys.modules.get("ray._private.worker"), "_global_node", None)
    ended = dict(getattr(node, "dead_processes", dict)())
    if gone := [name for name in _NEEDED if name in ended]:
        raise RunError(
            f"Ray's {gone[0]}, without which no client can run, ended (killed, most often because "
            "memory ran out): let fewer clients run side by side (--cpus), then go on with "
            "dare-agg run --resume",
            reason="worker",
        )


def _died(error: Exception) -> Exception:
    check_engine()
    LOG.warning("a worker died, another takes its place: %s", " ".join(str(error).split())[:200])
    return RunError(WORKER_DIED, reason="worker")
