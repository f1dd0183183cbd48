"""Privacy in the run config: what its words promise, and with what they do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError, refuse
from dare_agg.flower.private_rounds import PrivateRounds
from dare_agg.flower.round_strategy import RoundStrategy
from dare_agg.flower.secure.privacy import NoisedRounds
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.flower.strategy import DareStrategy
from dare_agg.merge.methods import MEANS
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.privacy.sharing import SharedPrivacy
from dare_agg.secure.terms import MIN_PARTIES
from server.record_privacy import RECORDS, check_record_run

CLIENTS = "clients"
WORDS = ("epsilon", "delta", "members", "clip", "quantile", "noise", "apart", "weak")
BUDGET_FILE = "privacy.budget"


def check_privacy_words(
    config: Any, methods: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse what breaks the promise of ``dp``, and words of it where there is none.

    ``methods`` are the merge methods by what the run compares. Raises `ConfigError`.
    """
    if not config.dp:
        for name in WORDS:
            value = getattr(config, f"dp_{name}")
            if value != defaults[f"dp-{name}"]:
                raise ConfigError(
                    f"dp-{name} = {value!r} without dp, which promises nothing; set "
                    f'dp = "{CLIENTS}" or "{RECORDS}", or leave dp-{name} out'
                )
        return
    if config.dp == RECORDS:
        check_record_run(config, methods, defaults)
        return
    if config.secure:
        check_noised_sums(config, defaults)
        return
    refusals: tuple[tuple[object, str], ...] = (
        (not config.dp_members, "needs dp-members, how many clients there are; everyone may know "
         "it"),
        (config.weighting != "equal", f"with weighting = {config.weighting!r}, which gives a "
         'client with more examples more than the norm: set weighting = "equal"'),
        (config.keep_rates != "uniform", f"with keep-rates = {config.keep_rates!r}, which keep "
         "other elements of each client: leave keep-rates out"),
        (config.budget() is not None, "with an upload budget, which gives clients masks of their "
         "own: set drop-rate"),
        (config.drop_rate == "auto", "with drop-rate = auto, whose choice shows norms of single "
         "clients: set drop-rate, to 0.9 for example"),
        (config.robust, f"with robust = {config.robust!r}: one client moves its result by more "
         "than the norm; leave one of them out"),
        (config.base, "with base: a version on disk is merged tile by tile, and a norm is of the "
         "whole; leave base out"),
        (config.lora_merge == "product", "with lora-merge = product, which bounds no norm; leave "
         "it out"),
    )  # fmt: skip
    refuse(refusals, f"dp = {config.dp!r}")
    for name in config.methods:
        if methods[name] not in MEANS:
            raise ConfigError(
                f"dp = {config.dp!r} with {name}: one client moves its result by more than the "
                "norm; use dare-task-arithmetic, dare-average or fedavg"
            )
    privacy = client_privacy(config, None)
    if privacy is not None:
        privacy.check_rate(config.fraction_train)


def check_noised_sums(config: Any, defaults: Mapping[str, Any]) -> None:
    """Refuse what breaks the promise of ``dp = "clients"`` inside secure sums.

    Raises `ConfigError`. The sums' own settings are checked with them (`SecureSettings`).
    """
    for name, why in (
        ("members", "the roster says how many members there are"),
        ("quantile", "the parties' norms stay with them"),
        ("apart", "each party draws noise of its own, which no later round knows"),
    ):
        if getattr(config, f"dp_{name}") != defaults[f"dp-{name}"]:
            raise ConfigError(f"dp-{name} with secure: {why}; leave dp-{name} out")
    refusals: tuple[tuple[object, str], ...] = (
        (config.secure_merge, "with secure-merge, of models that were trained before any promise: "
         "leave one of them out"),
        (config.weighting != "equal", f"with weighting = {config.weighting!r}, which gives a "
         'client with more examples more than the norm: set weighting = "equal"'),
        (config.evaluate, "with evaluate: what parties evaluate is told of each, without noise; "
         "set evaluate = false"),
        (config.robust, f"with robust = {config.robust!r}: one client moves its result by more "
         "than the norm; leave one of them out"),
        (config.base, "with base: a version on disk is not looked through for what noise ruins; "
         "leave base out"),
        (config.early_stop, "with early-stop, which looks at losses: leave it out"),
        (config.lora_merge == "product", "with lora-merge = product, which bounds no norm; leave "
         "it out"),
    )  # fmt: skip
    refuse(refusals, f"dp = {config.dp!r} in secure sums")
    promise = shared_privacy(config, None)
    replace(config.secure_settings(), privacy=promise)
    if promise is not None:
        promise.among(max(MIN_PARTIES, config.min_clients))  # a roster has as many, or more


def shared_privacy(config: Any, state: Path | None) -> SharedPrivacy | None:
    """What a run of noised sums promises its members, None for nothing; as `client_privacy`."""
    if config.dp != CLIENTS or not config.secure:
        return None
    return SharedPrivacy(
        epsilon=config.dp_epsilon,
        delta=config.dp_delta,
        clip=config.dp_clip,
        noise=config.dp_noise,
        weak=config.dp_weak,
        ledger=_ledger(config, state),
    )


def _ledger(config: Any, state: Path | None) -> Path | None:
    return state / BUDGET_FILE if state is not None and config.keep_state else None


def client_privacy(config: Any, state: Path | None) -> ClientPrivacy | None:
    """What the run promises its clients, None for nothing; ``state`` keeps the budget's file.

    Raises `ConfigError` for numbers that promise nothing.
    """
    if config.dp != CLIENTS:
        return None
    return ClientPrivacy(
        members=config.dp_members,
        epsilon=config.dp_epsilon,
        delta=config.dp_delta,
        clip=config.dp_clip,
        quantile=config.dp_quantile,
        noise=config.dp_noise,
        apart=config.dp_apart,
        weak=config.dp_weak,
        ledger=_ledger(config, state),
    )


def promised(strategy: RoundStrategy) -> dict[str, Any]:
    """What a run's model card says of privacy: nothing where none was promised."""
    private: PrivateRounds | NoisedRounds | None = None
    if isinstance(strategy, DareStrategy):
        private = strategy.private
    elif isinstance(strategy, SecureStrategy):
        private = strategy.noised
    if private is None:
        return {}
    if private.run is None:  # the run was finished before it was resumed
        private.begin(1)
    assert private.run is not None
    return {"privacy": dict(private.run.statement())}


def privacy_facts(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a round's row says of privacy."""
    found = measured.get("privacy", {})
    names = ("epsilon", "delta", "noise", "next_norm")
    return {f"privacy_{name}": found[name] for name in names if name in found}
