"""What a run's log says around its rounds, in the words of Flower's own strategies."""

from __future__ import annotations

import io
import logging

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result

LOG = logging.getLogger("flwr")


def starting(
    strategy: object,
    rounds: int,
    arrays: ArrayRecord,
    train_config: ConfigRecord,
    evaluate_config: ConfigRecord,
) -> None:
    """What is about to run."""
    nbytes = sum(len(array.data) for array in arrays.values())
    LOG.info("Starting %s strategy:", type(strategy).__name__)
    LOG.info("\t├── Number of rounds: %d", rounds)
    LOG.info("\t├── ArrayRecord (%.2f MB)", nbytes / 2**20)
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
