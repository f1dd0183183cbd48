"""The run config: its keys, with bounds and meanings, and what of it is derived."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dare_agg.codec.budget import UploadBudget, parse_bytes
from dare_agg.codec.mask import MASK_KINDS
from dare_agg.deploy.devices import PRECISIONS
from dare_agg.files.app_config import config_defaults
from dare_agg.privacy.clients import MOST_APART
from dare_agg.rounds.buffer import MOST_STALENESS, MOST_UPDATES
from dare_agg.rounds.settings import WEIGHTINGS
from dare_agg.rounds.step import ServerStep, server_step
from dare_agg.rounds.terms import KEEP_RATES
from dare_agg.secure.aggregates import SECURE_METHODS
from dare_agg.secure.settings import SecureSettings
from server.compared import METHODS
from server.field_types import NumberText, Words, known_device, one_of

# Of a state with DoRA adapters.
DORA_LENGTHS = r"\.lora_magnitude_vector\."

# Of a client's model; "nf4" is a base of four bits under adapters.
WEIGHTS = ("float32", "bfloat16", "bfloat16-nearest", "nf4")

# The run config's defaults stand in the app's pyproject.toml alone.
DEFAULTS = config_defaults(Path(__file__))


def kebab(name: str) -> str:
    """A key as it is typed, from a field's name."""
    return name.replace("_", "-")


class RunConfig(BaseModel):
    """Every key of ``[tool.flwr.app.config]``, in kebab-case there, where the defaults stand.

    Keys from ``task`` on are read by the clients too; they are checked here so that a typo
    fails before anyone trains. Which tasks there are, clients know and say when asked; what their
    keys mean stands at `client.config.TaskConfig`. ``docs/CONFIG.md`` is made of both.

    Attributes
    ----------
    num_rounds: rounds of each method.
    methods: what is run, one method after another on the same data and seeds, to compare.
    drop_rate: share of the changes that are dropped at random, 0 to 1; auto: each round chooses
        what the model bears (docs/FLOWER_APP.md). A list, such as 0.9,0.99: each is a row.
    values: how a survivor is written; auto: chosen with the drop rate, b1 beside a number. A list:
        each is a row.
    upload_budget: the most bytes that a client sends in a round, such as 300kB: drop rate and value
        format are the finest that fit, with auto no finer than chosen; none: no bound.
    upload_seconds: the most seconds that a client's update takes over the uplink it tells
        (``uplink-kbit-s`` of its node config); 0: no bound.
    mask: which elements are sent: "stratified", exactly one of every 1/(1 - p) neighbours, or
        "bernoulli", each by a draw of its own, as in the paper.
    keep_rates: "uniform": of every tensor the same share survives; "own": in proportion to its
        change, as each client finds it; "last": as it was in the round before (secure sums too).
    directions: with dare-wudi, leading directions of each Linear's change beside the survivors;
        0: 8.
    direction_bits: bits of an element of a direction.
    scaling: λ, what the merged change is multiplied by.
    dense: patterns (RE2) of the tensors that travel whole beside the update, such as a head.
    dense_values: how a value of those tensors is written.
    exclude: patterns (RE2) of tensors that stay at each client: neither sent nor merged.
    statistics_examples: rows from which a client makes Fisher values or Gram matrices.
    weighting: what a client counts by.
    weight_bound: how many times the round's median weight a client counts at most; 0: no bound.
    robust: the rule that bears Byzantine clients, such as nnm+trimmed-mean (docs/ROBUST.md); none:
        the merge method's mean.
    byzantine: how many clients of a round may send anything at all, where robust is set.
    server_step: what the server does with the merged change; with numbers: adam(beta1=0.8).
    server_learning_rate: that step's learning rate; 0: its own.
    fraction_train: share of the clients online that train in a round.
    min_clients: clients without which no round begins.
    deadline: seconds after which a round goes on without whoever has not answered; 0: it waits.
    node_timeout: seconds that a client has for one message.
    min_replies: updates without which a round changes nothing.
    max_empty_rounds: rounds in a row that may change nothing before the run fails.
    buffer: accepted updates that make a merge which waits for nobody, each client once in it
        (docs/ASYNC.md); a round is then a merge, deadline a client's. 0: rounds of all asked.
    staleness: with buffer, what an update counts for that was trained τ merges ago: sqrt,
        1/√(1+τ); polynomial(a=0.5); hinge(a=1, b=2); linear(over=32); interval(most=5);
        constant.
    max_staleness: with buffer, the most merges that an update's version may be old.
    arrivals: with buffer, a file arrivals.jsonl, whose order of who is asked and who answers the
        run follows, to the same bits; none: as they come.
    evaluate: whether clients evaluate each round's model.
    seed: of data, batches, the head's start and masks: the same seed, the same bits.
    output: folder of the run; none: one below runs/.
    save_model: whether the final model of each method is written, as a Hugging Face folder.
    downlink: how the model reaches clients.
    keep_state: whether each round is kept, so that the run can be resumed.
    resume: whether to go on with the run in ``output`` (dare-agg run --resume says it).
    identities: file with the clients' public keys; with it every update must be signed.
    initial: file, or folder of an adapter, that the run starts from; none: the first client's.
    base: checkpoint on disk that server and clients start from, a folder or a hub's name: it never
        travels (docs/LARGE.md).
    verify_every: with ``base``: clients compare all values each so many rounds; 0: never.
    prometheus_port: port of the run's measurements for Prometheus; 0: none.
    prometheus_host: address that it listens on.
    dp: whom the run promises differential privacy (docs/PRIVACY.md): "clients", whose updates the
        server clips and adds noise to, with secure = mean they themselves; "records", each
        client's rows, whose gradients it clips and adds noise to by itself; none: nobody.
    dp_epsilon: the budget ε; the run ends when it is spent.
    dp_delta: its δ, below 1/n among n clients (dp-members) or rows; 0: n^−1.1, at most a tenth of
        1/n.
    dp_members: with clients: how many there are; everyone may know it; with secure: the roster's.
    dp_clip: largest norm of what a client adds to the sum, survivors rescaled; of a row's gradient.
    dp_quantile: with clients: share of them that should lie below the norm, which then follows; 0:
        it stays.
    dp_noise: noise multiplier; 0: the least with which all rounds keep ε.
    dp_apart: with clients who cannot be sampled: each takes part at most once in so many rounds,
        which share their noise (DP-FTRL); 0: clients are sampled.
    dp_weak: admit an ε above 50, which promises next to nothing.
    secure: what is summed, so that the server sees no single update; none: a plain run.
    secure_merge: one merge of models that parties have, instead of rounds.
    secure_roster: file that lists the parties and who vouches for them (dare-agg keys).
    secure_models: models of the simulated parties of a merge.
    secure_bits: bits of a summed value; 0: 16, 24 for wudi or a weighed mean, or what fits.
    secure_clip: largest magnitude of a value; what is beyond is cut, and the share of it told.
    secure_directions: with secure = wudi, directions of each Linear that a party adds.
    secure_min_parties: fewest parties in a sum.
    secure_groups: sums of so many groups of the roster, for robust to compare; 1: of all together.
    secure_threshold: parties who must stay to the end of a sum; 0: two thirds and one more.
    secure_stage_seconds: seconds that a stage of the protocol waits for its parties.
    partition: how rows are divided among simulated clients: at random, by labels in unlike
        shares, or by the values of a column.
    alpha: of the Dirichlet division; the smaller, the less alike the clients.
    lora_ranks: ranks that simulated clients learn, in turn; none: all the run's.
    lora_merge: "factors": adapters are merged as they are; "product": by the mean of their
        products.
    """

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=kebab, frozen=True)

    num_rounds: int = Field(ge=1, le=100_000)
    methods: Words
    drop_rate: NumberText
    values: str
    upload_budget: NumberText
    upload_seconds: float = Field(ge=0)
    mask: Annotated[str, one_of("mask", MASK_KINDS)]
    keep_rates: Annotated[str, one_of("keep rates", KEEP_RATES)]
    directions: int = Field(ge=0, le=4096)
    direction_bits: Literal[1, 2, 4, 8, 16, 32]
    scaling: float = Field(gt=0)
    dense: Words
    dense_values: str
    exclude: Words
    statistics_examples: int = Field(ge=1)
    weighting: Annotated[str, one_of("weighting", WEIGHTINGS)]
    weight_bound: float
    robust: str
    byzantine: int = Field(ge=0)
    server_step: str
    server_learning_rate: float = Field(ge=0)
    fraction_train: float = Field(gt=0, le=1)
    min_clients: int = Field(ge=1)
    deadline: float = Field(ge=0)
    node_timeout: float = Field(gt=0)
    min_replies: int = Field(ge=1)
    max_empty_rounds: int = Field(ge=0)
    buffer: int = Field(ge=0, le=MOST_UPDATES)
    staleness: str
    max_staleness: int = Field(ge=0, le=MOST_STALENESS)
    arrivals: str
    evaluate: bool
    seed: int = Field(ge=0, lt=1 << 63)
    output: str
    save_model: bool
    downlink: str
    keep_state: bool
    resume: bool
    identities: str
    initial: str
    base: str
    verify_every: int = Field(ge=0)
    prometheus_port: int = Field(ge=0, lt=1 << 16)
    prometheus_host: str

    dp: Literal["", "clients", "records"]
    dp_epsilon: float
    dp_delta: float
    dp_members: int = Field(ge=0)
    dp_clip: float
    dp_quantile: float
    dp_noise: float
    dp_apart: int = Field(ge=0, le=MOST_APART)
    dp_weak: bool

    secure: str
    secure_merge: bool
    secure_roster: str
    secure_models: Words
    secure_bits: int = Field(ge=0)
    secure_clip: float = Field(gt=0)
    secure_directions: int = Field(ge=1)
    secure_min_parties: int
    secure_groups: int = Field(ge=1)
    secure_threshold: int = Field(ge=0)
    secure_stage_seconds: float = Field(gt=0)

    task: str
    model: str
    data: str
    test_data: str
    text_column: str
    label_column: str
    delimiter: str
    encoding: str
    labels: Words
    partition: Literal["iid", "dirichlet", "column"]
    partition_by: str
    alpha: float = Field(gt=0)
    prompt_column: str
    answer_column: str
    system_prompt: str
    packing: bool
    held_out: float = Field(ge=0)
    generate_rows: int = Field(ge=0)
    generate_tokens: int = Field(ge=1)
    answer_form: Literal["text", "number"]
    train: Literal["full", "lora", "head"]
    lora_rank: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    lora_targets: Words
    lora_bias: Literal["none", "all", "lora_only"]
    lora_whole: Words
    lora_rslora: bool
    lora_dora: bool
    lora_ranks: Words
    lora_merge: Literal["factors", "product"]
    pooling: Literal["mean", "cls"]
    length: int = Field(ge=2, le=8192)
    image_size: int = Field(ge=0, le=4096)
    batch: int = Field(ge=1)
    steps: int = Field(ge=1)
    epochs: int = Field(ge=0)
    learning_rate: float = Field(gt=0, le=1e3)
    head_learning_rate: float = Field(gt=0, le=1e3)
    weight_decay: float = Field(ge=0, le=1e3)
    weight_decay_on: Annotated[str, one_of("weight-decay-on", ("all", "matrices"))]
    warm_up: float = Field(ge=0, le=1 << 20)
    schedule: Annotated[str, one_of("schedule", ("constant", "linear", "cosine"))]
    schedule_over: Annotated[str, one_of("schedule-over", ("round", "run"))]
    clip_norm: float = Field(ge=0, le=1e9)
    accumulate: int = Field(ge=1, le=1 << 14)
    checkpointing: bool
    dropout: float = Field(ge=0, le=0.9)
    proximal_mu: float = Field(ge=0, le=1e6)
    keep_optimizer: bool
    early_stop: int = Field(ge=0, le=1 << 20)
    early_stop_every: int = Field(ge=1, le=1 << 20)
    early_stop_rows: float = Field(ge=0, le=1 << 24)
    train_rows: int = Field(ge=0)
    test_rows: int = Field(ge=0)
    precision: Annotated[str, one_of("precision", PRECISIONS)]
    weights: Annotated[str, one_of("weights", WEIGHTS)]
    device: Annotated[str, AfterValidator(known_device)]
    threads: int = Field(ge=1, le=1024)

    def merges(self) -> dict[str, str]:
        """The merge methods of what the run compares, by name there."""
        return {name: METHODS[name].merge for name in self.methods}

    def train_by(self, method: str) -> str:
        """What a method of `METHODS` trains; a secure run what the config says."""
        return (METHODS[method].train if method in METHODS else "") or self.train

    def dense_by(self, method: str) -> tuple[str, ...]:
        """Patterns of what travels whole, by what a method of `METHODS` trains.

        With the head alone there is no delta group besides it. DoRA's lengths are few, and a drop
        of theirs would stretch whole outputs.
        """
        train = self.train_by(method)
        lengths = (DORA_LENGTHS,) if train == "lora" and self.lora_dora else ()
        return () if train == "head" else (*self.dense, *lengths)

    def step(self) -> ServerStep:
        """The server step with its numbers; a learning rate of 0 is the step's own."""
        rate = self.server_learning_rate
        return server_step(self.server_step, **({"lr": rate} if rate else {}))

    def budget(self) -> UploadBudget | None:
        """The upload budget of a client and round, None where none is set."""
        if not self.upload_budget and not self.upload_seconds:
            return None
        return UploadBudget(
            parse_bytes(self.upload_budget) if self.upload_budget else None,
            self.upload_seconds or None,
        )

    def secure_settings(self) -> SecureSettings:
        """The settings of secure sums; raises `ConfigError` for unsafe ones."""
        weighed = SECURE_METHODS[self.secure].weighed and not self.secure_merge
        return SecureSettings(
            method=self.secure,
            drop_rate=self.drop_rate,
            bits=self.secure_bits,
            clip=self.secure_clip,
            directions=self.secure_directions,
            min_parties=self.secure_min_parties,
            groups=self.secure_groups,
            keep_rates=self.keep_rates,
            threshold=self.secure_threshold,
            # Sums count parties; a mean may weigh them, in secret.
            weighting=self.weighting if weighed else "equal",
            scaling=self.scaling,
        )
