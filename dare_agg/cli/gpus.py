"""GPUs of a simulation: the share that a client gets, checked before Flower and Ray start.

Ray shows a simulated client only the GPUs that it gave it, so that without a share there is none.
"""

from __future__ import annotations

import math
from typing import NoReturn

from dare_agg.deploy.devices import AUTO, check_device, parse_device, seen_by_driver
from dare_agg.errors import ConfigError


def check_gpus(gpus: float, device: str) -> None:
    """Raise `ConfigError` for a share that cannot be had, or one that the device does not fit."""
    if not math.isfinite(gpus) or gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(
            f"--gpus {gpus:g}; a share up to 1 (0.25: four clients on one), or whole GPUs, are "
            "possible"
        )
    if gpus and (count := seen_by_driver("cuda")) is not None and count < gpus:
        _refuse_share(gpus, count)
    try:
        kind, number = parse_device(device)
    except ConfigError:
        return  # another app's word for something, or a wrong one, which its own check names
    if kind == "cuda" and number is not None:
        raise ConfigError(
            f"device {device!r} in a simulation, where Ray chooses among the GPUs: say device = "
            '"cuda", and which ones by CUDA_VISIBLE_DEVICES'
        )
    check_device(device)
    if kind == "cuda" and not gpus:
        raise ConfigError(
            f"device {device!r} without --gpus: a simulated client sees no GPU then; with "
            "--gpus 0.5 two clients share one"
        )
    if gpus and kind not in (AUTO, "cuda", "xpu"):
        raise ConfigError(
            f"--gpus {gpus:g} with device {device!r}, which takes none; leave one of them out"
        )


def _refuse_share(gpus: float, count: int) -> NoReturn:
    if count:
        raise ConfigError(
            f"--gpus {gpus:g}: {count} are here; --gpus {count} or a share of one is possible"
        )
    try:
        check_device("cuda")
    except ConfigError as error:
        raise ConfigError(f"--gpus {gpus:g} without a GPU: {error}") from error
    raise ConfigError(f"--gpus {gpus:g} without a GPU here; leave it out")
