"""What a run's log says around its rounds, in the words of Flower's own strategies."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result

from dare_agg.flower.lazy import nbytes_of
from dare_agg.flower.replies import TrainReply
from dare_agg.flower.round_outcome import Asked
from dare_agg.rounds.server import Rejection
from dare_agg.rounds.settings import FederatedSettings

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


def weights_cut(measured: Mapping[str, Any], bound: float) -> None:
    """Warn of those who claimed more than a round's bound, if any did."""
    if measured["weights_cut"]:
        LOG.warning(
            "round %d: %s claimed more than %g times the round's median weight and count for "
            "that; raise weight_bound if they have so many examples",
            measured["round"],
            ", ".join(measured["weights_cut"]),
            bound,
        )


def merged(asked: Asked, taken: Sequence[TrainReply]) -> None:
    """How many updates of a round were merged, and what they and the model took on the wire."""
    LOG.info(
        "round %d: %d of %d updates merged; %s bytes up and %s down per client",
        asked.round,
        len(taken),
        len(asked.download),
        f"{_mean([reply.update_bytes + reply.dense_bytes for reply in taken]):,}",
        f"{_mean(asked.download):,}",
    )


def too_few(
    asked: Asked, taken: int, needed: int, rejections: Sequence[Rejection], why: str = ""
) -> str:
    """Why a round merged nothing; ``why`` in place of how many updates came."""
    counts = Counter(rejection.reason for rejection in rejections)
    reasons = ", ".join(f"{reason} ×{count}" for reason, count in sorted(counts.items()))
    first = f"; first: {rejections[0].detail}" if rejections else ""
    came = (
        f"round {asked.round}: {taken} of {len(asked.download)} clients sent an update that "
        f"counts, {needed} are needed"
    )
    return f"{why or came} ({reasons}){first}"


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


def updates(settings: FederatedSettings, chosen: bool) -> None:
    """Log what clients are to send; ``chosen`` says that each round chooses its terms."""
    terms = settings.terms
    LOG.info(
        "\t├── Updates: %s; keep rates %s, mask %s; dense %s as %s; local %s",
        "as each round's noise allows"
        if chosen
        else f"drop rate {terms.drop_rate.p:.6g}, values {terms.values}",
        terms.keep_rates,
        terms.mask,
        list(terms.dense),
        terms.dense_values,
        list(terms.exclude),
    )
    if (rule := settings.robust) is not None:
        LOG.info(
            "\t├── Robust: %s bears %d Byzantine clients of at least %d a round%s",
            rule,
            rule.byzantine,
            rule.least,
            "; one mask for all clients of a round" if rule.votes else "",
        )


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values)) if values else 0
