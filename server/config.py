"""The run config, checked before any node trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dare_agg.checkpoint.hub_names import hub_name, missing_path
from dare_agg.codec.budget import UploadBudget, parse_bytes
from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import MASK_KINDS, parse_drop_rate
from dare_agg.deploy.devices import PRECISIONS, parse_device
from dare_agg.downlink.ways import DOWNLINKS
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.files.app_config import absent_words, config_defaults
from dare_agg.offline.adapters.folder import is_adapter
from dare_agg.rounds.adapters import MEANS
from dare_agg.rounds.auto import AUTO
from dare_agg.rounds.settings import WEIGHTINGS, check_weight_bound
from dare_agg.rounds.step import ServerStep, server_step
from dare_agg.rounds.terms import KEEP_RATES, UpdateTerms, check_choice
from dare_agg.runs.claim import run_state
from dare_agg.runs.ending import COMPLETED
from dare_agg.secure.aggregates import SECURE_METHODS
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.patterns import compile_patterns
from server.adapter_words import refuse_idle_words
from server.direction_words import check_directions_words
from server.privacy import check_privacy_words
from server.robust import check_robust_words


@dataclass(frozen=True)
class Compared:
    """A method that runs can compare: what differs from the run config.

    ``words`` are the strategy's, ``train`` what is trained ("" as configured).
    """

    words: Mapping[str, Any]
    train: str = ""


_WHOLE = {"drop_rate": "0", "values": "f32", "keep_rates": "uniform"}
METHODS: Mapping[str, Compared] = {
    "fedavg": Compared({"method": "task-arithmetic", **_WHOLE, "dense_values": "f32"}),
    "dare-task-arithmetic": Compared({"method": "task-arithmetic"}),
    "dare-ties": Compared({"method": "ties"}),
    "dare-average": Compared({"method": "average"}),
    "dare-fisher": Compared({"method": "fisher"}),
    "dare-regmean": Compared({"method": "regmean"}),
    "dare-wudi": Compared({"method": "wudi"}),
    "head-only": Compared({"method": "task-arithmetic", **_WHOLE}, train="head"),
}

# Of a state with DoRA adapters.
DORA_LENGTHS = r"\.lora_magnitude_vector\."

# Of a client's model; "nf4" is a base of four bits under adapters.
WEIGHTS = ("float32", "bfloat16", "bfloat16-nearest", "nf4")

# The run config's defaults stand in the app's pyproject.toml alone.
DEFAULTS = config_defaults(Path(__file__))


def _split(value: Any) -> Any:
    # Flower's run config holds scalars only: lists come as comma-separated text.
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_split)]


def _as_typed(value: Any) -> Any:
    # -c drop-rate=0.99 and -c 'drop-rate="0.99"' are the same: a float's repr is what was typed.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return repr(value) if number else value


NumberText = Annotated[str, BeforeValidator(_as_typed)]


@dataclass(frozen=True)
class OneOf:
    """A check for the names of a table."""

    what: str
    known: tuple[str, ...]

    def __call__(self, value: str) -> str:
        check_choice(self.what, value, self.known)
        return value


def one_of(what: str, known: Iterable[str]) -> AfterValidator:
    """A validator for the names of a table."""
    return AfterValidator(OneOf(what, tuple(known)))


def _known_device(word: str) -> str:
    parse_device(word)
    return word


def _kebab(name: str) -> str:
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
        what the model bears (docs/FLOWER_APP.md).
    values: how a survivor is written; auto: chosen with the drop rate, b1 beside a number.
    upload_budget: the most bytes that a client sends in a round, such as 300kB: drop rate and value
        format are the finest that fit, with auto no finer than chosen; none: no bound.
    upload_seconds: the most seconds that a client's update takes over the uplink it tells
        (``uplink-kbit-s`` of its node config); 0: no bound.
    mask: how survivors are drawn: one in each run of neighbours, or each by itself.
    keep_rates: "uniform": of every tensor the same share survives; "own": in proportion to its
        change, as each client finds it; "last": as it was in the round before.
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
        server clips and adds noise to; none: nobody.
    dp_epsilon: the budget ε; the run ends when it is spent.
    dp_delta: its δ, below 1/dp-members; 0: dp-members^−1.1, at most a tenth of 1/dp-members.
    dp_members: how many clients there are; everyone may know it.
    dp_clip: largest norm of what a client adds to the sum, survivors rescaled.
    dp_quantile: share of clients that should lie below the norm, which then follows; 0: it stays.
    dp_noise: noise multiplier; 0: the least with which all rounds keep ε.
    dp_weak: admit an ε above 50, which promises next to nothing.
    secure: what is summed, so that the server sees no single update; none: a plain run.
    secure_merge: one merge of models that parties have, instead of rounds.
    secure_roster: file that lists the parties and who vouches for them (dare-agg keys).
    secure_models: models of the simulated parties of a merge.
    secure_bits: bits of a summed value; 0: 16, 24 for wudi or a weighed mean, or what fits.
    secure_clip: largest magnitude of a value; what is beyond is cut, and the share of it told.
    secure_directions: with secure = wudi, directions of each Linear that a party adds.
    secure_min_parties: fewest parties in a sum.
    secure_threshold: parties who must stay to the end of a sum; 0: two thirds and one more.
    secure_stage_seconds: seconds that a stage of the protocol waits for its parties.
    partition: how rows are divided among simulated clients: at random, by labels in unlike
        shares, or by the values of a column.
    alpha: of the Dirichlet division; the smaller, the less alike the clients.
    lora_ranks: ranks that simulated clients learn, in turn; none: all the run's.
    lora_merge: "factors": adapters are merged as they are; "product": by the mean of their
        products.
    """

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=_kebab, frozen=True)

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

    dp: Literal["", "clients"]
    dp_epsilon: float
    dp_delta: float
    dp_members: int = Field(ge=0)
    dp_clip: float
    dp_quantile: float
    dp_noise: float
    dp_weak: bool

    secure: str
    secure_merge: bool
    secure_roster: str
    secure_models: Words
    secure_bits: int = Field(ge=0)
    secure_clip: float = Field(gt=0)
    secure_directions: int = Field(ge=1)
    secure_min_parties: int
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
    device: Annotated[str, AfterValidator(_known_device)]
    threads: int = Field(ge=1, le=1024)

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
            threshold=self.secure_threshold,
            # Sums count parties; a mean may weigh them, in secret.
            weighting=self.weighting if weighed else "equal",
            scaling=self.scaling,
        )


def read_config(raw: Mapping[str, Any]) -> RunConfig:
    """Check a run config; raises `ConfigError` naming the first key that is wrong."""
    try:
        config = RunConfig.model_validate(_with_rate({**DEFAULTS, **raw}))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    for name in config.methods:
        if name not in METHODS:
            raise ConfigError(f"methods: {name!r} is unknown{did_you_mean(name, METHODS)}")
    if not config.methods:
        raise ConfigError("methods is empty; name at least one, for example dare-task-arithmetic")
    if config.downlink not in DOWNLINKS:
        raise ConfigError(
            f"downlink {config.downlink!r} is unknown{did_you_mean(config.downlink, DOWNLINKS)}"
        )
    if config.resume and not (config.output and config.keep_state):
        raise ConfigError("resume needs output, the folder of the run, and keep-state = true")
    _check_secure(config)
    merges = {name: str(METHODS[name].words["method"]) for name in config.methods}
    check_privacy_words(config, merges, DEFAULTS)
    _check_base(config)
    _check_adapters(config)
    if not config.resume:  # a run begun with such words goes on
        refuse_idle_words(raw, DEFAULTS, {config.train_by(name) for name in config.methods})
    check_directions_words(
        raw, DEFAULTS, {METHODS[n].words["method"]: config.train_by(n) for n in config.methods}
    )
    if config.drop_rate != AUTO:
        parse_drop_rate(config.drop_rate)
    config.step()
    config.budget()
    check_weight_bound(config.weight_bound)
    check_robust_words(config, {name: METHODS[name].words["method"] for name in config.methods})
    if config.values != AUTO:
        find_values(config.values)
    find_values(config.dense_values)
    compile_patterns([*config.dense, *config.exclude])
    if config.partition == "column" and not config.partition_by:
        raise ConfigError('partition = "column" needs partition-by, the name of a column')
    return config


def _with_rate(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with those of ``drop-rate`` and ``values`` settled that no round can choose.

    A secure run's server sees sums alone, whose noise it cannot judge; adapters are small, and all
    of them travels (docs/RESULTS.md, "Text, and LoRA": in one bit a value a drop of factors costs
    more rounds than it saves bytes).
    """
    rate, values = raw["drop-rate"], raw["values"]
    if rate == AUTO and raw["secure"]:
        rate = "0.9"
    elif rate == AUTO and raw["train"] == "lora":
        rate = "0"
    if rate != AUTO and values == AUTO:
        values = UpdateTerms.values
    return {**raw, "drop-rate": rate, "values": values}


# What a resumed run may be told anew: how long, how patiently and on what it goes on, who takes
# part and what is shown. All else decides what it computes.
_MAY_CHANGE = frozenset(
    {
        "num-rounds", "min-clients", "min-replies", "max-empty-rounds", "deadline", "node-timeout",
        "identities", "secure-stage-seconds", "secure-roster", "save-model", "output", "resume",
        "prometheus-port", "prometheus-host", "verify-every", "device", "threads",
    }
)  # fmt: skip
_MOST_SHOWN = 60


def check_resumed(config: RunConfig, folder: Path) -> None:
    """Refuse to resume the run in ``folder``, whose config its run.json has, as another one.

    Raises `ConfigError` with each key that differs. A key that is younger than the run had its
    default.
    """
    state = run_state(folder)
    stored = state.get("config")
    if not isinstance(stored, dict):  # whether there is a run at all, `claim` says
        return
    begun, usual = _begun_with(stored), _plain(read_config({}))
    changed = {
        key: new
        for key, new in _plain(config).items()
        if key not in _MAY_CHANGE and begun[key] != new
    }
    if not changed:
        return
    different = [f"{key} {_shown(begun[key])} → {_shown(new)}" for key, new in changed.items()]
    these = "these" if len(different) > 1 else "this"
    go_on = f"leave {these} out to go on as before, or begin another run"
    if any(new == usual[key] for key, new in changed.items()):
        # What a run was begun with is not always today's default.
        go_on = f"set {these} as before to go on, or begin another run"
    if state.get("status") == COMPLETED:
        go_on = "the run is finished: begin another one"
    raise ConfigError(
        f"{folder} is to be resumed with another config than it was begun with: "
        f"{', '.join(different)}; {go_on}: --output (output in a run config)"
    )


def _begun_with(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config that run.json holds; of a run interrupted early only what was set."""
    known = {_kebab(name) for name in RunConfig.model_fields}
    words = {
        key: ",".join(map(str, value)) if isinstance(value, list) else value
        for key, value in stored.items()
        if key in known
    }
    try:
        return _plain(RunConfig.model_validate(_with_rate({**DEFAULTS, **words})))
    except ValidationError:  # values of another version
        return _plain(RunConfig.model_validate(_with_rate(DEFAULTS))) | dict(stored)


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    shown = repr(text)
    return shown if len(shown) <= _MOST_SHOWN else f"…{shown[1 - _MOST_SHOWN :]}"


def check(raw: Mapping[str, Any]) -> None:
    """Refuse what the server would, before it is started; see ``[tool.dare-agg]``."""
    config = read_config(raw)
    if config.resume:
        check_resumed(config, Path(config.output))


def check_here(raw: Mapping[str, Any]) -> None:
    """Refuse files that the server is to read and that are not on this machine."""
    for key in ("initial", "identities"):
        word = str(raw.get(key, DEFAULTS[key]))
        if word and not Path(word).is_file() and not (key == "initial" and is_adapter(Path(word))):
            raise ConfigError(f"{key}: the file {word!r} does not exist; check the path")
    base = str(raw.get("base", DEFAULTS["base"]))
    if base and hub_name(base) is None and not Path(base).exists():
        raise missing_path(base)


def _check_base(config: RunConfig) -> None:
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
    for bad, why in refusals:
        if bad:
            raise ConfigError(why)


def _check_adapters(config: RunConfig) -> None:
    """Refuse ranks and merges of adapters that the rest of the config cannot keep."""
    odd = [r for r in config.lora_ranks if not (r.isdecimal() and 1 <= int(r) <= config.lora_rank)]
    if odd:
        raise ConfigError(
            f"lora-ranks: {odd[0]!r} is no rank from 1 to {config.lora_rank}, the run's lora-rank, "
            "which all clients' adapters have; raise that, or lower this"
        )
    if config.lora_merge != "product":
        return
    refusals = (
        (config.secure, "lora-merge = product with secure: a server that sees sums alone cannot "
         "multiply single factors; leave it out"),
        (not any(config.train_by(name) == "lora" for name in config.methods),
         f"lora-merge = product, and train = {config.train} trains no adapters; set train = lora"),
        (config.scaling != 1, f"lora-merge = product with scaling {config.scaling:g}, which would "
         "scale factors; leave scaling at 1"),
        (config.step() != server_step(), f"lora-merge = product with server-step "
         f"{config.server_step!r}, which would step along factors; leave it plain, at rate 1"),
    )  # fmt: skip
    for bad, why in refusals:
        if bad:
            raise ConfigError(why)
    for name in config.methods:
        if config.train_by(name) == "lora" and METHODS[name].words["method"] not in MEANS:
            raise ConfigError(
                f"lora-merge = product with {name}: the mean of products is a merge by itself; "
                "use dare-task-arithmetic, dare-average or fedavg, or lora-merge = factors"
            )


def _check_secure(config: RunConfig) -> None:
    """Refuse what a secure run cannot keep; the sums' own settings are checked with them."""
    if not config.secure:
        if config.secure_merge:
            raise ConfigError(
                f"secure-merge without secure; set secure to one of {', '.join(SECURE_METHODS)}"
            )
        return
    refusals = (
        (config.secure not in SECURE_METHODS, f"secure = {config.secure!r} is unknown"
         f"{did_you_mean(config.secure, SECURE_METHODS)}"),
        (config.methods != _split(DEFAULTS["methods"]),
         "methods beside secure; secure names the method"),
        (config.mask != "stratified", f"mask = {config.mask!r} with secure; stratified is summed"),
        (config.keep_rates != "uniform",
         f"keep-rates = {config.keep_rates!r} with secure; its sums keep the same of every tensor: "
         "leave keep-rates out"),
        (config.secure_merge and config.downlink != DEFAULTS["downlink"],
         f"downlink = {config.downlink!r} in a one-shot merge, which sends no model: leave it out"),
        (config.budget() is not None, "an upload budget with secure; all parties share one mask: "
         "set drop-rate"),
        (config.keep_optimizer, "keep-optimizer with secure; moments of a round without a sum "
         "would show single deltas in the next: leave it out"),
        (bool(config.lora_ranks), "lora-ranks with secure; what some parties do not learn is the "
         "others' alone in a sum: leave it out"),
        (config.resume and config.secure_merge, "resume of a one-shot merge; start it anew"),
    )  # fmt: skip
    for bad, why in refusals:
        if bad:
            raise ConfigError(why)
    if not config.secure_roster:
        raise ConfigError("secure needs secure-roster, a file of dare-agg keys roster")
    config.secure_settings()


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    absent = absent_words(Path(__file__).resolve().parents[1])
    if key in absent:
        return f"run config key {key!r}: {absent[key]}"
    if first["type"] == "extra_forbidden":
        known = [_kebab(name) for name in RunConfig.model_fields]
        return f"run config key {key!r} is unknown{did_you_mean(key, known)}"
    return f"run config {key} = {first['input']!r}: {first['msg']}"
