"""What a run's log says around its rounds, in the words of Flower's own strategies."""

from __future__ import annotations

import io
import logging
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result

from dare_agg.flower.lazy import nbytes_of

LOG = logging.getLogger("flwr")


class RunResult(Result):
    """Flower's result, shown without reading arrays that lie on disk."""

    def __repr__(self) -> str:
        none = "ArrayRecord (0.000 MB)"
        size = f"ArrayRecord ({nbytes_of(self.arrays) / 2**20:.3f} MB)"
        return (
            super(RunResult, replace(self, arrays=ArrayRecord())).__repr__().replace(none, size, 1)
        )


def starting(
    strategy: object,
    rounds: int,
    arrays: ArrayRecord | None,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord,
) -> None:
    """What is about to run."""
    LOG.info("Starting %s strategy:", type(strategy).__name__)
    LOG.info("\t├── Number of rounds: %d", rounds)
    if arrays is not None:
        LOG.info("\t├── ArrayRecord (%.2f MB)", nbytes_of(arrays) / 2**20)
    LOG.info("\t├── ConfigRecord (train): %s", _shown(train_config))
    LOG.info("\t├── ConfigRecord (evaluate): %s", _shown(evaluate_config))


def aggregated(metrics: MetricRecord) -> None:
    """The clients' metrics of a round, as one."""
    LOG.info("\t└──> Aggregated MetricRecord: %s", metrics)


def finished(seconds: float, result: Result) -> None:
    """How long it took, and everything that was measured."""
    LOG.info("")
    LOG.info("Strategy execution finished in %.2fs", seconds)
    LOG.info("")
    LOG.info("Final results:")
    LOG.info("")
    for line in io.StringIO(str(result)):
        LOG.info("\t%s", line.strip("\n"))
    LOG.info("")


def _shown(config: ConfigRecord) -> str:
    words = (f"{k!r}: {'<bytes>' if isinstance(v, bytes) else v}" for k, v in config.items())
    return f"{{{', '.join(words)}}}" if config else "(empty!)"
