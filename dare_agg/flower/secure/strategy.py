"""`SecureStrategy`: federated fine-tuning in which the server sees only sums.

Each round one mask is shared by all, a secure sum takes the place of the clients' updates,
and everything else (rounds, evaluation, server step, state) is shared with `DareStrategy`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from dare_agg.codec.fitted_rates import tensor_squares
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.downlink.protocol import SharedMask
from dare_agg.errors import ConfigError, PrivacyError, ProtocolError, RunError
from dare_agg.flower.budgets import RELEASES
from dare_agg.flower.clients import Client
from dare_agg.flower.round_outcome import RoundOutcome
from dare_agg.flower.round_strategy import ROUND_WORD, RoundStrategy
from dare_agg.flower.secure.groups import check_groups, merge_all
from dare_agg.flower.secure.privacy import NoisedRounds
from dare_agg.flower.secure.records import SECURE_KEY, Train, names_of
from dare_agg.flower.secure.session import (
    STAGE_SECONDS,
    SessionLog,
    meet_parties,
    run_session,
    warn_of_clipping,
)
from dare_agg.flower.secure.training import training_of
from dare_agg.robust.rule import check_robust
from dare_agg.rounds import arguments
from dare_agg.rounds.levels import levels_told
from dare_agg.rounds.messages import ASK_TRAIN
from dare_agg.rounds.server import MergedRound, advance
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import ServerStep
from dare_agg.rounds.streamed import advance_merged
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.secure.division import divided
from dare_agg.secure.groups import GroupedServer
from dare_agg.secure.packing import SecureMeasurements
from dare_agg.secure.roster import Roster
from dare_agg.secure.server import SecureServer
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.solved import SolvedSource
from dare_agg.secure.terms import SecureTerms

LOG = logging.getLogger("flwr")
EVERY = DropRate(1, 1)


class SecureStrategy(RoundStrategy):
    """Federated fine-tuning whose rounds are secure sums.

    Parameters
    ----------
    secure
        what is summed and how (`SecureSettings`); method, drop rate, scaling and
        weighting come from there.
    roster
        who may take part. Clients need ``secure_mod`` and ``secure_queries``.
    run_config
        the run's settings as the parties see them (``context.run_config``): the terms
        of each sum bind them, and parties who were told others refuse.
    stage_seconds
        time for each stage after training.
    robust, byzantine
        the rule that bears so many dishonest parties, over the means of the ``groups`` that
        ``secure`` names (docs/ROBUST.md): one spoils its whole group.
    dense, exclude, server_step, words
        as for `DareStrategy` (``base`` and ``state`` too: the server then holds no vector of
        the model's size, and reads all values once a round, since the terms bind them); what
        concerns plain updates has no place here.

    Train metrics are not collected, since they would be single parties' data; evaluation
    metrics are, where ``fraction_evaluate`` asks for them.
    """

    def __init__(
        self,
        *,
        secure: SecureSettings,
        roster: Roster,
        run_config: Mapping[str, Any] | None = None,
        stage_seconds: float = STAGE_SECONDS,
        dense: Sequence[str] = (),
        exclude: Sequence[str] = (),
        server_step: str | ServerStep = "plain",
        robust: str = "",
        byzantine: int = 0,
        **words: Any,
    ) -> None:
        for name in (
            "method", "drop_rate", "values", "mask", "keep_rates", "weighting", "client_terms",
        ):  # fmt: skip
            if name in words:
                raise ConfigError(f"{name} has no place in a SecureStrategy; set it in 'secure'")
        if words.get("send_base"):
            raise ConfigError(
                "send_base has no place in a SecureStrategy: parties take no model from a server "
                "but what the terms bind; have each name its own (base in the node config)"
            )
        options = words.pop("options", {})
        if options:
            SecureSettings(options=options)
        if secure.min_parties > len(roster.members):
            raise ConfigError(
                f"secure-min-parties = {secure.min_parties}; roster {roster.name!r} has "
                f"{len(roster.members)} members"
            )
        rule = check_robust(robust, byzantine)
        check_groups(secure, rule, roster)
        if rule is not None and words.get("fraction_train", 1.0) < 1:
            raise ConfigError(
                f"fraction_train = {words['fraction_train']} with secure-groups: sums of a group "
                "whose members come and go show single ones; leave it at 1"
            )
        least = rule.least if rule else 1
        fewest = secure.fewest(roster, least)
        super().__init__(
            FederatedSettings(
                UpdateTerms(
                    drop_rate=parse_drop_rate(secure.drop_rate),
                    dense=tuple(dense),
                    exclude=tuple(exclude),
                    max_weight=secure.max_weight,
                ),
                scaling=secure.scaling,
                weighting=secure.weighting,
                server_step=arguments.as_step(server_step),
                robust=rule,
            ),
            min_available_nodes=max(fewest, words.pop("min_available_nodes", 2)),
            min_train_nodes=max(fewest, words.pop("min_train_nodes", 2)),
            **words,
        )
        self.noised = None
        if secure.privacy is not None:
            self.noised = NoisedRounds(
                secure.privacy,
                len(roster.members),
                {
                    "fraction_evaluate": (
                        self.fraction_evaluate,
                        "what parties evaluate is told of each, without noise; set it to 0 "
                        "(evaluate = false)",
                    ),
                    "base": (self.named_base, "a version on disk is not looked through for what "
                             "noise ruins; leave it out"),
                },
            )  # fmt: skip
        self.secure = secure
        self.roster = roster
        self.groups = divided(roster, secure.groups)
        self._fewest, self._least_groups = fewest, least
        self.run_config = dict(run_config or {})
        self.stage_seconds = stage_seconds
        # A new name for each start: a party never contributes twice under one.
        start = os.urandom(8)
        self.run_name = f"{self.run or 'run'}-{start.hex()}"
        # For the clients' training: after a resume, a round that was cut off is trained anew,
        # since its deltas may have gone into a sum and ledgers refuse them.
        self._start_seed = int.from_bytes(start[:4], "little")
        self._parties: dict[int, int] = {}
        self._strangers: set[int] = set()
        # The sum that each party's local tensors come from.
        self._settled: dict[int, bytes] = {}

    def summary(self) -> None:
        secure = self.secure
        LOG.info(
            "\t├── Secure sums: %s of at least %d of %d members of roster %r, clip %g",
            secure.method,
            self._fewest,
            len(self.roster.members),
            self.roster.name,
            secure.clip,
        )
        if (rule := self.settings.robust) is not None:
            sizes = sorted(map(len, self.groups))
            LOG.info(
                "\t├── Robust: %s bears %d liars over the means of %d groups of %d to %d parties, "
                "of which %d may fall away",
                rule,
                rule.byzantine,
                len(sizes),
                sizes[0],
                sizes[-1],
                len(sizes) - rule.least,
            )
        super().summary()
        LOG.info(
            "\t└── Updates: drop rate %.6g, weights by %s, scaling %g; dense %s; local %s; server "
            "step %s %s; downlink %s",
            self.settings.terms.drop_rate.p,
            secure.weighting,
            secure.scaling,
            list(self.settings.terms.dense),
            list(self.settings.terms.exclude),
            self.settings.server_step.name,
            dict(self.settings.server_step.numbers),
            self.downlink.name,
        )
        if self.fraction_evaluate:
            LOG.warning("evaluation metrics are single parties' data and reach the server in clear")

    def ready_for(self, rounds: int) -> None:
        """Open the privacy budget, if the run has one."""
        if self.noised is not None:
            self.noised.begin(rounds)

    def may_go_on(self, number: int, first: bool) -> bool:
        """Whether the privacy budget bears the round; raises `PrivacyError` for the first."""
        return self.noised is None or self.noised.may_go_on(number, first)

    def kept_facts(self) -> dict[str, Any]:
        """How many sums were charged, where privacy is kept."""
        return {} if self.noised is None else self.noised.facts()

    def take_up(self, facts: Mapping[str, Any]) -> None:
        """Go on from a state; raises `PrivacyError` where it was of another privacy."""
        if self.noised is not None:
            self.noised.take_up(facts)
        elif RELEASES in facts:
            raise PrivacyError(
                "the run was begun with privacy of its clients, and is to go on without; give the "
                "strategy the same privacy, or begin another run"
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Raises `ConfigError`: Flower's own loop sends one message a round."""
        raise ConfigError(
            "a secure sum takes several exchanges a round; call this class's start, without a "
            "wrapper around it"
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Nothing: a secure sum is taken as it comes (`train_round`)."""
        return None, None

    def train_round(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, limit: float
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One secure sum of what the parties learn, or one of each group."""
        self.broadcasting.adopt(arrays)
        model = self.broadcasting.model
        if self.noised is not None:
            self.noised.check_model(model)
        began = time.monotonic()
        config[ROUND_WORD] = number
        config["start-seed"] = self._start_seed
        log = SessionLog()
        chosen = self.choose(grid, ASK_TRAIN, number)
        nodes = self._meet(grid, chosen)
        cohorts = self.secure.cohorts(self.groups, nodes)
        nodes = {party: nodes[party] for cohort in cohorts.values() for party in cohort}
        parties = {node: party for party, node in nodes.items()}
        sessions: dict[int, bytes] = {}
        try:
            after: dict[int, bytes] = {}
            servers: dict[int, SecureServer] = {}
            for group, cohort in cohorts.items():
                begun = self._after(cohort)
                terms = self.terms(number, cohort, self._training(config, begun))
                servers[group] = SecureServer(terms, self.roster)
                after |= dict.fromkeys(cohort, begun)
                sessions |= dict.fromkeys(cohort, terms.session)
            away = {group: "parties" for group in range(len(self.groups)) if group not in cohorts}
            server = GroupedServer(servers, self._least_groups, away)
            clients = {client.node: client for client in chosen}

            def first(node: int) -> Message:
                party = parties[node]
                terms = server.of(party).terms
                return self._first(clients[node], terms, config, after[party], limit)

            def again(party: int, reply: Message) -> Message | None:
                node = nodes[party]
                lost = self.broadcasting.lost_version(node, reply, SECURE_KEY)
                return first(node) if lost else None

            def before(stage: str) -> None:
                if self.noised is not None:
                    self.noised.before(stage, number, server)

            sums = run_session(
                grid,
                server,
                nodes,
                first,
                log,
                first_seconds=limit,
                stage_seconds=self.stage_seconds,
                again=again,
                before=before,
            )
            layout = model.groups.layout
            found, told = merge_all(sums, self.secure, self.settings.robust, layout)
            terms = sums[0].server.terms
        except ProtocolError as error:
            self._no_sum(number, error, log, began)
            return None, None
        finally:
            self._settled |= {party: sessions[party] for party in log.vector_bytes}
            for rejection in log.rejections:
                if rejection.reason == "local":
                    self._settled.pop(rejection.client, None)
            for party in log.upload:
                self.broadcasting.have[nodes[party]] = model.ref.version
        dense, measured, merged = found.dense, found.measured, found.delta
        warn_of_clipping(measured, terms.clip)
        mask = SharedMask(number, terms.drop_rate, server.mask.key, rates=terms.rates)
        # Merged Linears have no mask: all of their elements move.
        plans = [SharedMask(number, EVERY, mask.mask_key) if terms.sketch else mask]
        if self.store is None:
            whole = MergedRound(found.vector(), dense, (), {})
            moved, step_state = advance(
                model, self.step_state, whole, self.settings, self.downlink, plans
            )
        else:
            moved, step_state = advance_merged(
                model, self.step_state, merged, dense, self.settings, self.store, plans
            )
        if self.secure.keep_rates == "last":
            mean = merged.mean if isinstance(merged, SolvedSource) else merged
            levels = levels_told(layout.sizes, tensor_squares(layout.sizes, mean), [mask])
            step_state = replace(step_state, levels=levels)
        facts = self._facts(number, log, began, server.alive, terms, measured)
        facts["merged_norm"] = merged.norm()
        if told:
            facts["robust"] = told
            facts["secure"]["lost_groups"] = server.lost
        LOG.info(
            "round %d: a secure %s of %d of %d parties, %s bytes up each; lone contributors at "
            "%s of the elements, %s clipped",
            number,
            self.secure.method,
            len(server.alive),
            len(nodes),
            f"{max(log.upload.values()):,}",
            "none known" if measured.lone_share is None else f"{measured.lone_share:.1%}",
            "nobody knows what was" if self.noised else f"{measured.clipped_share:.2g}",
        )
        outcome = RoundOutcome(number, moved, step_state, facts, log.rejections, [], MetricRecord())
        return self.move(outcome), None

    def _meet(self, grid: Grid, chosen: Sequence[Client]) -> dict[int, int]:
        """Party → node of the chosen clients; each node proves once who it is."""
        known = set(self._parties.values()) | self._strangers
        new = [client.node for client in chosen if client.node not in known]
        if new:
            found, problems = meet_parties(grid, new, self.roster, self.stage_seconds)
            self._parties.update(found)
            self._strangers.update(problems)
        nodes = {client.node for client in chosen}
        parties = {party: node for party, node in self._parties.items() if node in nodes}
        if len(parties) < self._fewest:
            raise RunError(
                f"{len(parties)} of {len(chosen)} clients have proved to be members of roster "
                f"{self.roster.name!r}; {self._fewest} are needed (more than half of its members, "
                "and at least secure-min-parties; of each group that the rule needs)",
                reason="nodes",
            )
        return parties

    def terms(self, number: int, cohort: Sequence[int], training: bytes) -> SecureTerms:
        """What a round's parties are to agree on; ``training`` is the digest of what they get."""
        # Named by its values, as ledgers must know it: a chain can give them any number of names.
        ref = self.broadcasting.model.fingerprints
        base, layout = names_of(ref)
        return self.secure.terms(
            run=self.run_name,
            round_number=number,
            roster=self.roster,
            cohort=cohort,
            base=base,
            layout=layout,
            size=ref.size,
            dense=ref.dense_size,
            dense_patterns=self.settings.terms.dense,
            exclude=self.settings.terms.exclude,
            training=training,
            model=self.broadcasting.model.groups.layout,
            rho=self.noised.running.rho if self.noised is not None else 0.0,
            levels=self.step_state.levels,
        )

    def _after(self, cohort: Sequence[int]) -> bytes:
        """The sum whose local tensors all of a cohort have; b"" lets all begin anew."""
        if not self.broadcasting.model.groups.local:
            return b""
        found = {self._settled.get(party, b"") for party in cohort}
        if len(found) == 1:
            return found.pop()
        LOG.warning(
            "the parties' local tensors come from different sums (someone missed one): all begin "
            "with those of their own base again; choose the same parties each round to keep them"
        )
        return b""

    def _training(self, config: ConfigRecord, after: bytes) -> bytes:
        """The digest of all that a round's training messages say, the same to every party."""
        return training_of(
            RecordDict({self.broadcasting.config_key: config}),
            {self.broadcasting.arrays_key: self.broadcasting.model.arrays()},
            self.run_config,
            weighted_by_key=self._weight_key,
            after=after,
        )

    @property
    def _weight_key(self) -> str:
        return self.weighted_by_key if self.secure.weighting == "examples" else ""

    def _first(
        self,
        client: Client,
        terms: SecureTerms,
        config: ConfigRecord,
        after: bytes,
        seconds: float,
    ) -> Message:
        """The training message: the model, the app's config and the terms."""
        content = self.broadcasting.content(client, self.broadcasting.order(ASK_TRAIN), config)
        train = Train(terms=terms.encode(), weighted_by_key=self._weight_key, after=after)
        content[SECURE_KEY] = ConfigRecord(train.to_record())
        return Message(content, client.node, MessageType.TRAIN, ttl=seconds + 60)

    def _no_sum(self, number: int, error: ProtocolError, log: SessionLog, began: float) -> None:
        first = f"; first: {log.rejections[0].detail}" if log.rejections else ""
        facts = self._facts(number, log, began, (), None, None)
        model = self.broadcasting.model
        outcome = RoundOutcome(number, model, self.step_state, facts, log.rejections, [])
        self.stay(outcome, f"round {number}: {error}{first}", error.reason)

    def _facts(
        self,
        number: int,
        log: SessionLog,
        began: float,
        alive: Sequence[int],
        terms: SecureTerms | None,
        measured: SecureMeasurements | None,
    ) -> dict[str, Any]:
        """What a round measured, in `DareStrategy`'s words where they fit."""
        facts: dict[str, Any] = {
            "round": number,
            "seconds": time.monotonic() - began,
            "sampled": len(log.download),
            "accepted": len(alive),
            "clients": [self.roster[party].name for party in alive],
            "update_bytes": [log.vector_bytes[party] for party in alive],
            "dense_bytes": [0 for _ in alive],
            "upload_bytes": [log.upload[party] for party in alive],
            "download_bytes": [log.download[party] for party in sorted(log.download)],
            "examples": [],
            "drop_rates": [self.settings.terms.drop_rate.p for _ in alive],
            "delta_norms": [],
            "delta_max": [],
            "share_above": [],
            "duplicates": 0,
            "rejected": [{**asdict(r), "name": self.roster[r.client].name} for r in log.rejections],
            "stage_seconds": dict(log.seconds),
        }
        if terms is not None and measured is not None:
            if self.noised is not None:
                facts["privacy"] = self.noised.running.measured()
            facts["secure"] = {
                "method": self.secure.method,
                "bits": terms.quantiser.bits,
                "word_bits": terms.quantiser.word_bits,
                "clip": terms.clip,
                "threshold": terms.threshold,
                **asdict(measured),
            }
            if self.noised is not None:
                del facts["secure"]["clipped_share"]  # none was told
            kept = terms.drop_rate.keep
            if terms.rates is not None:
                kept = terms.survivors / terms.size
                facts["drop_rates"] = [1 - kept for _ in alive]
            facts["survivors_per_element"] = len(alive) * kept
        return facts
