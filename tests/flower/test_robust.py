"""Byzantine clients in a run of the strategy: real apps, some of which lie."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping

from dare_agg.checkpoint import write_checkpoint
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import DareStrategy, reception
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.rounds.state import StateFolder

CLIENTS, F = 7, 2
DEFAULT = "norm-bound+nnm+trimmed-mean"


def lying(partition, arrays, metrics, before=None):
    """Clients 2 and 5 answer with the model turned inside out, and a claim to all examples."""
    if partition in (2, 5):
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                arrays[name] = np.asarray(array - np.float32(3.0), array.dtype)
        metrics["num-examples"] = 10**12


def run(grid, toys, rounds=3, **words):
    outcomes = []
    words = {"seed": 7, "min_available_nodes": CLIENTS, "min_train_nodes": CLIENTS, **words}
    strategy = DareStrategy(fraction_evaluate=0.0, round_hook=lambda o: outcomes.append(o), **words)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=rounds, timeout=60)
    return outcomes


def moved(outcomes, toys):
    """How far the delta group moved, on average: honest clients add 0.002 a round."""
    start = toys.arrays()
    after = outcomes[-1].model.arrays()
    return np.mean([(after[n] - start[n]).mean() for n in ("encoder.weight", "head.weight")])


@pytest.mark.parametrize("words", [{}, {"drop_rate": 0}, {"values": "f32", "drop_rate": 0.5}])
def test_two_liars_of_seven_turn_the_mean_and_not_the_rule(memory_grid, toys, words):
    app = toys.app(edit=lying)
    plain = run(memory_grid(app, CLIENTS), toys, **words)
    assert moved(plain, toys) < -0.5
    outcomes = run(memory_grid(app, CLIENTS), toys, robust=DEFAULT, byzantine=F, **words)
    assert 0 < moved(outcomes, toys) < 0.02
    for outcome in outcomes:
        told = outcome.measurements["robust"]
        assert told["rule"] == DEFAULT
        assert told["byzantine"] == F
        assert told["shared_mask"]
        assert set(told["unheard"]) == {"2", "5"}
        assert len({plan.mask_key for plan in outcome.plans}) == 1
        assert {plan.rank for plan in outcome.plans} == {0}


def test_the_log_says_the_rule_and_that_masks_are_shared(memory_grid, toys, caplog):
    with caplog.at_level("INFO", "flwr"):
        run(memory_grid(toys.app(), CLIENTS), toys, rounds=1, robust="nnm+median", byzantine=2)
    assert "nnm+median bears 2 Byzantine clients of at least 5 a round; one mask" in caplog.text


def test_clients_that_hold_versions_follow(memory_grid, toys, tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))
    words = {"robust": DEFAULT, "byzantine": F}
    full = run(memory_grid(toys.app(edit=lying), CLIENTS), toys, rounds=4, **words)
    held = run(memory_grid(toys.app(edit=lying), CLIENTS), toys, rounds=4,
               downlink=make_downlink("auto"), **words)  # fmt: skip
    assert 0 < moved(held, toys) < 0.03
    down = [max(outcome.measurements["download_bytes"]) for outcome in held]
    # The step lies on the one mask of all clients.
    assert max(down[1:]) < max(full[-1].measurements["download_bytes"]) / 3


@pytest.mark.parametrize("text", [DEFAULT, "norm-bound+momentum+nnm+trimmed-mean"])
def test_a_resumed_run_ends_with_the_same_bits(memory_grid, toys, tmp_path, text):
    def strategy(folder):
        made = DareStrategy(
            fraction_evaluate=0.0, seed=7, min_available_nodes=CLIENTS, min_train_nodes=CLIENTS,
            robust=text, byzantine=F, round_hook=lambda o: save(made, folder, o),
        )  # fmt: skip
        return made

    def whole(name, stops):
        folder, start, first, state = StateFolder(tmp_path / name), toys.arrays(), 1, None
        arrays = toys.record(start)
        keep_base(folder, arrays)
        for stop in stops:
            one = strategy(folder)
            if first > 1:
                found = resume(one, folder)
                arrays, state = found.arrays, found.step_state
            grid = memory_grid(toys.app(edit=lying), CLIENTS)
            one.start(grid, arrays, num_rounds=stop, start_round=first, step_state=state)
            folder.release()
            first = stop + 1
        return one.outcome.model.ref.version, one.step_state

    straight, state = whole("straight", [4])
    resumed, again = whole("resumed", [2, 4])
    assert resumed == straight
    assert again.momenta.keys() == state.momenta.keys()
    assert bool(state.momenta) == ("momentum" in text)


def test_a_base_on_disk_is_moved_by_the_rule_as_one_in_memory(
    memory_grid, toys, tmp_path, monkeypatch
):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reception, "_OFFERS", [])
    write_checkpoint(tmp_path / "base", toys.arrays())
    words = {
        "robust": DEFAULT, "byzantine": F, "fraction_evaluate": 0.0, "seed": 7,
        "min_available_nodes": CLIENTS, "min_train_nodes": CLIENTS, "drop_rate": 0.5,
        "values": "f32",
    }  # fmt: skip

    def nodes(partition):
        own = {"partition-id": partition, "num-partitions": CLIENTS}
        return {**own, "base": str(tmp_path / "base")}

    lossless = make_downlink("lossless")
    on_disk = DareStrategy(
        base=tmp_path / "base", state=tmp_path / "state", downlink=lossless, **words
    )
    grid = memory_grid(toys.app(edit=lying), CLIENTS, node_config=nodes)
    result = on_disk.start(grid, num_rounds=3)
    in_memory = DareStrategy(**words)
    grid = memory_grid(toys.app(edit=lying), CLIENTS)
    wanted = in_memory.start(grid, toys.record(toys.arrays()), num_rounds=3)
    for name, array in wanted.arrays.items():
        assert np.abs(result.arrays[name].numpy() - array.numpy()).max() < 1e-5, name
    with pytest.raises(ConfigError, match="leave momentum out"):
        DareStrategy(base=tmp_path / "base", state=tmp_path / "other",
                     **{**words, "robust": "momentum+median"})  # fmt: skip


def test_flowers_privacy_around_a_rule_is_refused(memory_grid, toys):
    words = {"min_available_nodes": CLIENTS, "min_train_nodes": CLIENTS, "drop_rate": 0}
    inner = DareStrategy(robust=DEFAULT, byzantine=F, fraction_evaluate=0.0, **words)
    wrapped = DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, CLIENTS)
    with pytest.raises(ConfigError, match="makes something else of it"):
        wrapped.start(memory_grid(toys.app(), CLIENTS), toys.record(toys.arrays()), num_rounds=1)


def test_a_round_of_too_few_leaves_the_model_as_it_is(memory_grid, toys):
    def failing(partition, arrays, metrics):
        if partition > 3:
            raise ValueError("no")

    with pytest.raises(RunError, match=r"4 of 7 clients|0 of 7 clients"):
        run(memory_grid(toys.app(edit=failing), CLIENTS), toys, robust=DEFAULT, byzantine=F)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"min_available_nodes": 4, "min_train_nodes": 4},
            "at least 5 clients a round.*may have 4",
        ),
        ({"robust": "krum", "byzantine": 3}, "at least 9 clients a round, and a round may have 7"),
        ({"fraction_train": 0.5, "min_train_nodes": 2}, "may have 3; raise min_available_nodes"),
        ({"robust": "nmm+median"}, "did you mean 'nnm'"),
        ({"robust": ""}, "byzantine = 2 without robust"),
        ({"byzantine": 0}, "say of how many clients"),
        ({"method": "ties"}, "set the method to"),
        ({"keep_rates": "own"}, "keep_rates='uniform'"),
    ],
)
def test_what_cannot_be_borne_is_refused_before_anything_is_sent(words, said):
    given = {"robust": DEFAULT, "byzantine": F, "min_available_nodes": CLIENTS, **words}
    given.setdefault("min_train_nodes", CLIENTS)
    with pytest.raises(ConfigError, match=said):
        DareStrategy(**given)


def test_clients_of_other_rates_are_refused_before_they_train(memory_grid, toys):
    from dare_agg.codec.budget import ClientTerms
    from dare_agg.codec.mask import parse_drop_rate

    def own(hello):
        return ClientTerms(parse_drop_rate("0.5" if hello.name == "3" else "0.9"), "b1")

    def trained(partition, arrays, metrics):
        raise AssertionError("a client was asked to train")

    grid = memory_grid(toys.app(edit=trained), CLIENTS)
    with pytest.raises(ConfigError, match=r"drop rates 0.9 and 0.5.*one drop rate"):
        run(grid, toys, robust=DEFAULT, byzantine=F, client_terms=own)
