"""Words of a base on disk: what a run that starts from one cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_agg.errors import ConfigError, refuse

if TYPE_CHECKING:
    from server.config import RunConfig


def check_base_words(config: RunConfig) -> None:
    """Refuse what a run whose base lies on disk cannot do, and words that are of it alone."""
    if not config.base:
        if config.verify_every:
            raise ConfigError(
                f"verify-every = {config.verify_every} without base: versions are named by their "
                "values then, and compared each time; leave it out"
            )
        return
    refusals = (
        (config.initial, "base and initial both say what the run begins with; give one of them"),
        (config.secure,
         "base with secure: this app's parties train on the arrays they are sent; leave it out, or "
         "write an app with SecureStrategy(base=…)"),
        (any(config.train_by(name) != "full" for name in config.methods),
         "base is a whole model, and train = lora or head (or head-only) trains a part: leave it "
         "out, or set train = full"),
    )  # fmt: skip
    refuse(refusals)
