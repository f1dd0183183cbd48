"""A federation in this process, over train and test functions of one's own: `simulate`.

No Flower, no Ray, no other process: the client's and the server's half of a round
(`dare_agg.rounds`), one client after another. Clients that compute the same under Flower, numbered
alike and with the same seed, make the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.errors import ConfigError, DareError, RunError
from dare_agg.rounds.chain import StepContext, UpdateStep, chain
from dare_agg.rounds.client import update_of_arrays
from dare_agg.rounds.draws import drawn_places, round_secret, run_secret
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Accepted, Rejection, advance, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import ServerStep, StepState, server_step
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.rounds.weight_bound import bound_step
from dare_agg.vectors.model import GlobalModel, global_model
from dare_agg.vectors.returned import returned_tensors

if TYPE_CHECKING:
    from torch import nn

NamedArrays = Mapping[str, NDArray[Any]]
Client = TypeVar("Client")
# What training returns: arrays with or without the number of examples behind them.
Trained = NamedArrays | tuple[NamedArrays, float]
TrainArrays = Callable[[dict[str, NDArray[Any]], Client, int], Trained]
TrainModule = Callable[["nn.Module", Client, int], float | None]
TestArrays = Callable[[dict[str, NDArray[Any]]], Mapping[str, float]]
TestModule = Callable[["nn.Module"], Mapping[str, float]]


class Words(TypedDict, total=False):
    """What `simulate` may be told besides, as `dare_agg.flower.DareStrategy` is."""

    rounds: int
    fraction_train: float
    drop_rate: DropRate | float | str
    values: str
    mask: str
    keep_rates: str
    dense: Sequence[str]
    dense_values: str
    exclude: Sequence[str]
    method: str
    scaling: float
    weighting: str
    weight_bound: float
    server_step: str | ServerStep
    steps: Sequence[UpdateStep]
    seed: int | None


@dataclass(frozen=True)
class SimulatedRound:
    """What a round did. Bytes are those of the payloads of all its clients together."""

    number: int
    clients: tuple[int, ...]
    accepted: int
    rejected: tuple[Rejection, ...]
    upload_bytes: int
    download_bytes: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Simulation:
    """The final state, by name, and its rounds. A torch model that was given holds it, too."""

    arrays: Mapping[str, NDArray[Any]]
    rounds: tuple[SimulatedRound, ...]

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the test function said of the last round's model."""
        return self.rounds[-1].metrics

    @property
    def upload_bytes(self) -> int:
        """Bytes that all clients sent in all rounds."""
        return sum(one.upload_bytes for one in self.rounds)


@overload
def simulate(
    model: NamedArrays,
    clients: Sequence[Client],
    train: TrainArrays[Client],
    test: TestArrays | None = None,
    **words: Unpack[Words],
) -> Simulation:
    """Of arrays by name."""


@overload
def simulate(
    model: nn.Module,
    clients: Sequence[Client],
    train: TrainModule[Client],
    test: TestModule | None = None,
    **words: Unpack[Words],
) -> Simulation:
    """Of a torch module, trained in place."""


def simulate(
    model: Any,
    clients: Sequence[Any],
    train: Callable[..., Any],
    test: Callable[..., Mapping[str, float]] | None = None,
    *,
    rounds: int = 5,
    fraction_train: float = 1.0,
    drop_rate: DropRate | float | str = UpdateTerms.drop_rate,
    values: str = UpdateTerms.values,
    mask: str = UpdateTerms.mask,
    keep_rates: str = UpdateTerms.keep_rates,
    dense: Sequence[str] = UpdateTerms.dense,
    dense_values: str = UpdateTerms.dense_values,
    exclude: Sequence[str] = UpdateTerms.exclude,
    method: str = FederatedSettings.method,
    scaling: float = FederatedSettings.scaling,
    weighting: str = FederatedSettings.weighting,
    weight_bound: float = FederatedSettings.weight_bound,
    server_step: str | ServerStep = "plain",
    steps: Sequence[UpdateStep] = (),
    seed: int | None = 0,
) -> Simulation:
    """Train ``model`` over ``clients``, whose updates alone travel, for so many rounds.

    ``clients`` are whatever each one trains on, one entry a client. With a mapping of arrays
    ``train(arrays, client, round)`` gets a copy of the global state and returns the trained
    arrays, or (arrays, examples). With a torch module ``train(module, client, round)`` trains it
    in place and returns the examples or None. Without a number a client counts by ``len(client)``,
    else as one. ``test(arrays)`` or ``test(module)`` measures each round's global state. The other
    words are `dare_agg.flower.DareStrategy`'s; statistics (fisher, regmean) need that.

    A client whose training gives a NaN is rejected, as under Flower. Raises `ConfigError` for a
    word out of bounds, `LayoutError` for arrays of another form, `RunError` where a round has no
    update.

    >>> def train(arrays, target, number):
    ...     return {"w": arrays["w"] + 0.5 * (target - arrays["w"])}
    >>> start = {"w": np.zeros(1000, np.float32)}
    >>> found = simulate(start, [1.0, 3.0], train, rounds=8, drop_rate=0.5, values="f32")
    >>> bool(abs(found.arrays["w"].mean() - 2) < 0.05), found.upload_bytes < 8 * 2 * 4000
    (True, True)
    """
    settings = FederatedSettings(
        UpdateTerms(
            drop_rate=parse_drop_rate(drop_rate), values=values, mask=mask, keep_rates=keep_rates,
            dense=tuple(dense), dense_values=dense_values, exclude=tuple(exclude),
        ),
        method=method, scaling=scaling, weighting=weighting, weight_bound=weight_bound,
        server_step=_as_step(server_step),
    )  # fmt: skip
    _check(clients, rounds, fraction_train, settings)
    held = _Held(model)
    state = global_model(
        held.arrays(),
        dense=settings.terms.dense,
        exclude=settings.terms.exclude,
        by_form=True,
    )
    passing, step_state, secret = chain(bound_step, *steps), StepState(), run_secret(seed)
    done = []
    for number in range(1, rounds + 1):
        count = max(int(len(clients) * fraction_train), min(2, len(clients)))
        chosen = drawn_places(len(clients), count, derive_key(secret, "train", length=32), number)
        accepted, rejected, sent = _trained(
            state, settings, step_state, held, clients, chosen, train, secret, number
        )
        context = StepContext(
            state, settings, number, derive_key(round_secret(secret, number), "steps", length=32)
        )
        passed = passing(accepted, context)
        rejected += passed.rejections
        if not passed.accepted:
            why = f": {rejected[0].detail}" if rejected else ""
            raise RunError(f"round {number}: no client's update counts{why}")
        lost = {one.client for one in passed.rejections}
        plans = [one.plan for one in accepted if one.plan.client not in lost]
        down = sum(array.nbytes for array in state.arrays().values()) * len(chosen)
        merged = merge_round(state, passed.accepted, settings)
        state, step_state = advance(state, step_state, merged, settings, None, plans)
        held.hold(state)
        done.append(
            SimulatedRound(
                number, tuple(chosen), len(plans), tuple(rejected), sent, down,
                dict(test(held.given())) if test is not None else {},
            )
        )  # fmt: skip
    return Simulation({name: np.array(a) for name, a in state.arrays().items()}, tuple(done))


def _trained(
    state: GlobalModel,
    settings: FederatedSettings,
    step_state: StepState,
    held: _Held,
    clients: Sequence[Any],
    chosen: Sequence[int],
    train: Callable[..., Any],
    secret: bytes,
    number: int,
) -> tuple[list[Accepted], list[Rejection], int]:
    """What the chosen clients' updates are, which do not count, and all their bytes."""
    plans = make_plans(
        round_secret(secret, number), number, [None] * len(chosen), settings.terms, state.ref,
        shared_mask=settings.shared_mask, layout=state.groups.layout, levels=step_state.levels,
    )  # fmt: skip
    accepted: list[Accepted] = []
    rejected: list[Rejection] = []
    sent = 0
    for plan, place in zip(plans, chosen, strict=True):
        held.hold(state)
        tuned, examples = held.trained(train, clients[place], number)
        try:
            given = returned_tensors(state.arrays(), tuned, settings.terms.exclude)
            update = update_of_arrays(plan, state, given)
        except DareError as error:
            if error.reason != "non-finite":  # a program's mistake, not a client's
                raise
            rejected.append(Rejection(plan.client, error.reason, str(error)))
            continue
        sent += update.nbytes
        reply = check_reply(
            plan,
            update.blob,
            update.dense_blob,
            examples,
            statistics=update.statistics,
            layout=state.groups.layout,
        )
        if isinstance(reply, Rejection):
            rejected.append(reply)
        else:
            accepted.append(reply)
    return accepted, rejected, sent


class _Held:
    """The model as it was given, arrays or a torch module, holding the global state."""

    def __init__(self, model: Any) -> None:
        self.module = model if hasattr(model, "state_dict") else None
        if self.module is None and not isinstance(model, Mapping):
            raise ConfigError(
                f"model is a {type(model).__name__}; arrays by name or a torch module are needed"
            )
        self._arrays: dict[str, NDArray[Any]] = (
            {} if self.module is not None else {n: np.array(a) for n, a in model.items()}
        )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its tensors as arrays of their own."""
        if self.module is None:
            return self._arrays
        return {name: _numpy(tensor).copy() for name, tensor in self.module.state_dict().items()}

    def hold(self, state: GlobalModel) -> None:
        """Make it the global state."""
        arrays = {name: np.array(array) for name, array in state.arrays().items()}
        if self.module is None:
            self._arrays = arrays
            return
        import torch

        own = self.module.state_dict()
        self.module.load_state_dict(
            {n: torch.from_numpy(a).reshape(own[n].shape) for n, a in arrays.items()}
        )

    def given(self) -> Any:
        """What the functions are given."""
        return self._arrays if self.module is None else self.module

    def trained(self, train: Callable[..., Any], client: Any, number: int) -> tuple[Any, float]:
        """Arrays after training, and how many examples they stand for."""
        found = train(self.given(), client, number)
        if self.module is not None:
            return self.arrays(), _examples(found, client)
        arrays, examples = found if isinstance(found, tuple) else (found, None)
        if not isinstance(arrays, Mapping):
            raise ConfigError(
                f"train returned a {type(arrays).__name__}; arrays by name, or (arrays, examples)"
            )
        return {n: np.asarray(a) for n, a in arrays.items()}, _examples(examples, client)


def _numpy(tensor: Any) -> NDArray[Any]:
    import torch

    tensor = tensor.detach().cpu()
    # numpy has no bfloat16.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _examples(told: object, client: object) -> float:
    if told is None:
        return len(client) if isinstance(client, Sized) and not isinstance(client, str) else 1
    if isinstance(told, bool) or not isinstance(told, int | float):
        raise ConfigError(f"train said {told!r}; a number of examples is needed, or None")
    return told


def _as_step(step: str | ServerStep) -> ServerStep:
    return step if isinstance(step, ServerStep) else server_step(step)


def _check(
    clients: Sequence[Any], rounds: int, fraction: float, settings: FederatedSettings
) -> None:
    if not len(clients):
        raise ConfigError("no clients; give what each of them trains on")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"rounds = {rounds!r}; a whole number of at least 1 is needed")
    if not (math.isfinite(fraction) and 0 < fraction <= 1):
        raise ConfigError(f"fraction_train = {fraction!r}; above 0 and at most 1 is possible")
    if settings.terms.statistics:
        raise ConfigError(
            f"method {settings.method!r} needs {settings.terms.statistics} statistics of clients, "
            "which dare_agg.flower.DareStrategy asks for; take another method here"
        )
