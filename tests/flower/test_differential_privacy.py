"""Flower's differential privacy around the strategy: each promise of docs/FLOWER_APP.md."""

from __future__ import annotations

import ast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.client.mod import fixedclipping_mod as old_clipping_mod
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideAdaptiveClipping as ClientAdaptive
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping as ClientFixed
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping as ServerAdaptive
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as ServerFixed
from flwr.serverapp.strategy import FedAvg

from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import STATISTICS_KEY, DareStrategy, dare_mod
from dare_agg.flower import dare as carry
from simulations.runs.memory_grid import MemoryGrid

CLIENTS, CLIP = 4, 1.0
SHAPE = (60, 50)
ALL_ONLINE = {"min_train_nodes": CLIENTS, "min_available_nodes": CLIENTS, "fraction_evaluate": 0.0}
KEEPS_NORMS = {"drop_rate": 0, "values": "f32", "dense_values": "f32"}
CLIENT_SIDE = [
    (lambda strategy: ClientFixed(strategy, 0.0, CLIP, CLIENTS), fixedclipping_mod),
    (lambda strategy: ClientAdaptive(strategy, 0.0, CLIENTS, CLIP), adaptiveclipping_mod),
]
SERVER_SIDE = [
    lambda strategy: ServerFixed(strategy, 0.0, CLIP, CLIENTS),
    lambda strategy: ServerAdaptive(strategy, 0.0, CLIENTS, CLIP),
]


def start_arrays() -> ArrayRecord:
    """A model that is all zero: its norm is what was learnt."""
    return ArrayRecord(
        {"w": Array(np.zeros(SHAPE, np.float32)), "head": Array(np.zeros(3, np.float32))}
    )


def app(mods, factors=None, statistics=False) -> ClientApp:
    """Clients that move the model by noise of their own, times ``factors`` where they are given."""
    made = ClientApp(mods=list(mods))
    made.trained = []

    @made.train()
    def train(msg, context):
        client = int(context.node_config["partition-id"])
        made.trained.append(client)
        draw, factor = np.random.default_rng(client), np.float32((factors or {}).get(client, 1.0))
        given = {name: array.numpy() for name, array in msg.content["arrays"].items()}
        steps = {n: factor * draw.normal(size=a.shape).astype("f4") for n, a in given.items()}
        content = {
            "arrays": ArrayRecord({n: Array(np.asarray(a + steps[n])) for n, a in given.items()}),
            "metrics": MetricRecord({"num-examples": 10}),
        }
        if statistics:
            content[STATISTICS_KEY] = ArrayRecord({n: Array(np.abs(s)) for n, s in steps.items()})
        return Message(RecordDict(content), reply_to=msg)

    return made


def dare(**words) -> DareStrategy:
    return DareStrategy(
        **{"seed": 5, "weighting": "equal", "node_timeout": 5, **ALL_ONLINE, **words}
    )


def moved(strategy, client_app, rounds=1, arrays=None) -> np.ndarray:
    grid = MemoryGrid(client_app, CLIENTS)
    return flat(strategy.start(grid, arrays or start_arrays(), num_rounds=rounds).arrays)


def flat(arrays: ArrayRecord) -> np.ndarray:
    return np.concatenate([a.numpy().astype(np.float64).ravel() for a in arrays.values()])


@pytest.mark.parametrize("wrap", SERVER_SIDE, ids=["fixed", "adaptive"])
def test_terms_do_not_follow_norms_that_are_to_be_hidden(wrap, monkeypatch):
    """Changes as large as the weights ask for finer terms; under a wrapper nobody answers."""
    monkeypatch.setattr("dare_agg.rounds.auto.SMALL", 10)
    sent = {}
    for wrapped in (False, True):
        rates = []
        strategy = dare(round_hook=lambda o, r=rates: r.append(o.measurements["drop_rates"][0]))
        moved(wrap(strategy) if wrapped else strategy, app([dare_mod]), rounds=3)
        rates += [float(plan.drop_rate.p) for plan in strategy.outcome.plans[:1]]
        sent[wrapped] = rates
    assert sent[False][-1] < 0.9
    assert set(sent[True]) == {0.9}


# --- clipped on the client -------------------------------------------------------------------


@pytest.mark.parametrize(("wrap", "mod"), CLIENT_SIDE, ids=["fixed", "adaptive"])
@pytest.mark.parametrize(
    ("words", "factor"),
    [
        ({"drop_rate": 0.9}, "3.96"),
        ({}, "about 1 times"),
        ({"drop_rate": 0.99}, "12.5"),
        ({"drop_rate": 0.5, "values": "f32"}, "1.41"),
        *(({"drop_rate": 0, "values": v}, "") for v in VALUE_FORMATS if v != "f32"),
        ({"drop_rate": 0, "values": "f32", "dense": ["head"], "dense_values": "f16"}, "f16"),
    ],
)
def test_a_norm_clipped_on_the_client_that_would_not_hold_is_refused(wrap, mod, words, factor):
    client_app = app([dare_mod, mod])
    with pytest.raises(ConfigError, match="drop_rate=0, values='f32'") as refused:
        moved(wrap(dare(**words)), client_app)
    assert factor in str(refused.value) and "use DifferentialPrivacyServerSide" in str(
        refused.value
    )
    assert client_app.trained == []


def test_what_is_refused_would_not_hold(monkeypatch):
    """One client at 0.9 in one bit: clipped to 1, 4 is what would be merged."""
    monkeypatch.setattr("dare_agg.flower.strategy.check_privacy", lambda *_: None)
    one = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}
    strategy = ClientFixed(DareStrategy(seed=5, drop_rate=0.9, **one), 0.0, CLIP, 1)
    grid = MemoryGrid(app([dare_mod, fixedclipping_mod]), 1)
    arrays = strategy.start(grid, start_arrays(), num_rounds=1).arrays
    assert 3.5 < np.linalg.norm(flat(arrays)) < 4.5


@pytest.mark.parametrize(("wrap", "mod"), CLIENT_SIDE, ids=["fixed", "adaptive"])
def test_nothing_dropped_and_nothing_rounded_is_as_under_fedavg(wrap, mod):
    for factors in ({}, {0: 1e3}, {0: 1e-3}):
        ours = moved(wrap(dare(**KEEPS_NORMS)), app([dare_mod, mod], factors))
        theirs = moved(wrap(FedAvg(**ALL_ONLINE)), app([mod], factors))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        assert np.linalg.norm(ours) <= CLIP * (1 + 1e-6)


@pytest.mark.parametrize(
    "mod", [fixedclipping_mod, adaptiveclipping_mod, LocalDpMod(CLIP, 0.0, 1.0, 1e-5)]
)
def test_mods_that_clip_stand_behind_dare_mod_or_are_refused(mod):
    client_app = app([mod, dare_mod])
    with pytest.raises(RunError, match=r"list dare_mod first, ClientApp\(mods=\[dare_mod, …\]\)"):
        moved(dare(**KEEPS_NORMS), client_app)
    assert client_app.trained == []


def test_a_norm_in_the_config_alone_is_warned_of(caplog):
    config = ConfigRecord({"clipping_norm": CLIP})
    for words, warned in (({}, True), (KEEPS_NORMS, False)):
        caplog.clear()
        grid = MemoryGrid(app([dare_mod, fixedclipping_mod]), CLIENTS)
        dare(**words).start(grid, start_arrays(), num_rounds=1, train_config=config)
        assert ("a norm clipped on the client does not hold" in caplog.text) == warned


# --- clipped on the server -------------------------------------------------------------------


@pytest.mark.parametrize("wrap", SERVER_SIDE, ids=["fixed", "adaptive"])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"drop_rate": 0.99},
        {"mask": "bernoulli", "values": "b4"},
        {"drop_rate": 0, "values": "f32"},
        {"dense": ["head"]},
        {"method": "average"},
        {"scaling": 0.5},
    ],
)
def test_one_client_moves_the_model_by_its_share_of_the_norm_whatever_it_trained(wrap, words):
    def result(factor):
        return moved(wrap(dare(**words)), app([dare_mod], {2: factor}))

    # Nothing learnt, all that is learnt, the opposite: no two further apart than the norm says.
    nothing, much, opposite = (result(factor) for factor in (1e-9, 1e3, -1e3))
    share = CLIP / CLIENTS * (1 + 1e-5)
    assert np.linalg.norm(much - nothing) <= share
    assert np.linalg.norm(opposite - nothing) <= share
    assert np.linalg.norm(much - nothing) > 0.3 * share


@pytest.mark.parametrize("wrap", SERVER_SIDE, ids=["fixed", "adaptive"])
def test_nothing_dropped_is_clipped_as_under_fedavg(wrap):
    ours = moved(wrap(dare(**KEEPS_NORMS)), app([dare_mod]), rounds=3)
    theirs = moved(wrap(FedAvg(**ALL_ONLINE)), app([]), rounds=3)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_clients_are_sent_the_model_with_its_noise_and_no_other():
    class Remembers(ServerFixed):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            noised.append(flat(arrays))
            return arrays, metrics

    noised: list[np.ndarray] = []
    strategy = Remembers(dare(fraction_evaluate=1.0), 1.0, CLIP, CLIENTS)
    client_app = app([dare_mod])

    @client_app.evaluate()
    def evaluate(msg, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=msg)

    grid = MemoryGrid(client_app, CLIENTS)
    strategy.start(grid, start_arrays(), num_rounds=3)
    assert np.std(noised[0]) > 0.9 * CLIP / CLIENTS
    known = [flat(start_arrays()), *noised]
    sent = [flat(m.content["arrays"]) for m in grid.sent if m.content["arrays"]]
    assert len(sent) == 6 * CLIENTS
    assert all(any(np.array_equal(one, model) for model in known) for one in sent)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"method": "ties"}, "method 'ties'"),
        ({"method": "fisher"}, "method 'fisher'"),
        ({"options": {"normalize": "none"}}, "normalize"),
        ({"scaling": 2.0}, "scaling 2"),
        ({"server_step": "adam"}, "server step adam"),
        ({"server_step": "momentum"}, "server step momentum"),
        ({"server_step": "plain(lr=2.0)"}, "server step plain"),
        ({"downlink": make_downlink("auto")}, "rounds the mean before noise is added"),
    ],
)
@pytest.mark.parametrize("side", ["client", "server"])
def test_noise_for_a_mean_is_refused_for_what_is_none(words, says, side):
    wrap, mod = CLIENT_SIDE[0] if side == "client" else (SERVER_SIDE[0], None)
    client_app = app([dare_mod, mod] if mod else [dare_mod])
    words = words if side == "server" else {**KEEPS_NORMS, **words}
    with pytest.raises(ConfigError, match="DifferentialPrivacy") as refused:
        moved(wrap(dare(**words)), client_app)
    assert says in str(refused.value) and client_app.trained == []


def carried(**words):
    """Flower's own strategy for the arithmetic, DARE for transport."""
    return carry(FedAvg(**ALL_ONLINE), seed=5, node_timeout=5, **words)


@pytest.mark.parametrize(("wrap", "mod"), CLIENT_SIDE, ids=["fixed", "adaptive"])
def test_the_same_holds_around_a_strategy_that_is_carried(wrap, mod):
    client_app = app([dare_mod, mod])
    with pytest.raises(ConfigError, match="use DifferentialPrivacyServerSide"):
        moved(wrap(carried()), client_app)
    with pytest.raises(ConfigError, match="rounds the mean before noise is added"):
        moved(wrap(carried(downlink=make_downlink("auto"), **KEEPS_NORMS)), client_app)
    assert client_app.trained == []
    ours = moved(wrap(carried(**KEEPS_NORMS)), app([dare_mod, mod]), rounds=2)
    theirs = moved(wrap(FedAvg(**ALL_ONLINE)), app([mod]), rounds=2)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrap", SERVER_SIDE, ids=["fixed", "adaptive"])
def test_clipping_on_the_server_holds_around_a_strategy_that_is_carried(wrap):
    nothing, much = (moved(wrap(carried()), app([dare_mod], {2: f})) for f in (1e-9, 1e3))
    assert 0.3 < np.linalg.norm(much - nothing) / (CLIP / CLIENTS) <= 1 + 1e-5


def test_counters_whose_noise_would_be_cut_off_are_refused_with_what_leaves_them_out():
    arrays = start_arrays()
    for name in ("norm1.num_batches_tracked", "norm2.num_batches_tracked", "17"):
        arrays[name] = Array(np.asarray(5, np.int64))
    words = {"dense_values": "f32"}
    with pytest.raises(ConfigError, match="3 in all") as refused:
        moved(SERVER_SIDE[0](dare(**words)), app([dare_mod]), arrays=arrays)
    words["exclude"] = ast.literal_eval(str(refused.value).partition("exclude=")[2])
    result = moved(SERVER_SIDE[0](dare(**words)), app([dare_mod]), arrays=arrays)
    assert result[-3:].tolist() == [5, 5, 5] and np.linalg.norm(result[:-3]) > 0.1


def test_weights_by_examples_are_warned_of_once(caplog):
    moved(SERVER_SIDE[0](dare(weighting="examples")), app([dare_mod]), rounds=2)
    assert caplog.text.count("DareStrategy(weighting='equal')") == 1


# --- noise of the client's own, and other mods -----------------------------------------------


def test_a_clients_own_noise_is_sent_as_it_is():
    found = []
    for strategy, mods in ((dare(**KEEPS_NORMS), [dare_mod]), (FedAvg(**ALL_ONLINE), [])):
        for sensitivity in (0.0, 0.1):
            local = LocalDpMod(CLIP, sensitivity, 1.0, 1e-5)
            found.append(moved(strategy, app([*mods, local])))
    ours, ours_noised, theirs, theirs_noised = found
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert np.std(ours_noised) == pytest.approx(np.std(theirs_noised), rel=0.1)


def test_statistics_do_not_go_around_a_clients_own_noise():
    """They are of the data itself: the mod refuses a second record, and nothing is sent."""
    client_app = app([dare_mod, LocalDpMod(CLIP, 0.1, 1.0, 1e-5)], statistics=True)
    grid = MemoryGrid(client_app, CLIENTS)
    with pytest.raises(RunError, match="LocalDpMod expects exactly one ArrayRecord"):
        dare(method="fisher").start(grid, start_arrays(), num_rounds=1)
    assert not any(reply.has_content() and reply.content.array_records for reply in grid.received)
    # The mod addresses its error to the reply it was given; a SuperLink would drop that.
    assert all(reply.metadata.reply_to_message_id for reply in grid.received)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("mod", "way"),
    [
        (secaggplus_mod, "sum in secret with SecureStrategy and secure_mod"),
        (old_clipping_mod, "import them from flwr.clientapp.mod"),
    ],
)
def test_mods_that_have_no_place_are_named_with_the_way_out(mod, way, first):
    mods = [mod, dare_mod] if first else [dare_mod, mod]
    with pytest.raises(RunError, match=way):
        moved(dare(), app(mods))
