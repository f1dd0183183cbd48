"""What a round says of adapters that were merged by their products."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from typing import Any

LOG = logging.getLogger("flwr")


def adapter_facts(measured: Mapping[str, Any]) -> dict[str, Any]:
    """A row's words: the error of each module and the largest; none without such a merge."""
    errors = _of_step(measured, "lora_errors")
    if not errors:
        return {}
    rounded = {module: float(f"{error:.4g}") for module, error in errors.items()}
    return {"lora_error": max(rounded.values()), "lora_errors": rounded}


def say_adapters(number: int, measured: Mapping[str, Any]) -> None:
    """Log what the common rank of adapters could not hold, where they were merged by products."""
    errors, ranks = _of_step(measured, "lora_errors"), _of_step(measured, "lora_ranks")
    if errors:
        worst = max(errors, key=lambda module: errors[module])
        LOG.info(
            "round %d: adapters merged by their products, of rank up to %d; relative error at the "
            "run's rank: median %.2g, largest %.2g (%s)",
            number,
            max(ranks.values()),
            statistics.median(errors.values()),
            errors[worst],
            worst,
        )


def _of_step(measured: Mapping[str, Any], key: str) -> dict[str, Any]:
    return next((dict(step[key]) for step in measured.get("steps", ()) if key in step), {})
