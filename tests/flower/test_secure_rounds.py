"""Rounds of secure sums over Flower's messages: who vanishes, what is refused, what travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from toy import roster_of

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import DareStrategy, dare_mod, reception
from dare_agg.flower.secure import session as secure_session
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.flower.transport import to_numpy
from dare_agg.secure import identity as identities
from dare_agg.secure.identity import new_identity
from dare_agg.secure.roster import make_roster, sign_roster, write_roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.model import global_model


def secure_app(toys: Any) -> ClientApp:
    app = toys.app(mods=[secure_mod, dare_mod])
    secure_queries(app)
    return app


def strategy_for(folder: Path, **words: Any) -> SecureStrategy:
    settings = {
        "method": "mean", "drop_rate": "0.5", "clip": 0.05, "min_parties": 3,
        **words.pop("secure", {}),
    }  # fmt: skip
    return SecureStrategy(
        secure=SecureSettings(**settings),
        roster=roster_of(folder),
        stage_seconds=words.pop("stage_seconds", 20),
        fraction_evaluate=0.0,
        seed=3,
        **words,
    )


def expected(toys: Any, strategy: SecureStrategy, parties: list[int], rule: str) -> np.ndarray:
    """The plain merge on the elements that the round touched."""
    model = global_model(toys.arrays(), dense=[r"^head"])
    deltas = []
    for p in parties:
        tuned = {
            n: a + toys.delta(n, a.shape, p, 1) if a.dtype.kind == "f" else a
            for n, a in toys.arrays().items()
        }
        deltas.append(global_model(tuned, dense=[r"^head"]).delta - model.delta)
    stack = np.array(deltas, np.float64)
    if rule == "mean":
        return stack.mean(0)
    elected = np.sign(stack.sum(0))
    agree = np.sign(stack) == elected
    return (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)


@pytest.mark.parametrize("method", ["mean", "ties"])
def test_a_round_is_the_merge_of_all(
    memory_grid: Any, toys: Any, keys: Any, tmp_path: Path, method: str
) -> None:
    folder = keys(4)
    grid = memory_grid(secure_app(toys), 4, shuffle=1)
    seen = []
    strategy = strategy_for(
        folder, secure={"method": method}, dense=[r"^head"], round_hook=seen.append
    )
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    before = global_model(toys.arrays(), dense=[r"^head"])
    after = global_model(to_numpy(result.arrays), dense=[r"^head"])
    step = after.delta - before.delta
    touched = step != 0
    assert 0.4 < touched.mean() < 0.52
    touched[-1] = False  # a stratum of one element is not rescaled
    plain = 2 * expected(toys, strategy, [0, 1, 2, 3], method)
    assert np.abs(step - plain)[touched].max() < 1e-4
    heads = [toys.delta("head.weight", (25, 3), p, 1).ravel() for p in range(4)]
    dense = (after.dense - before.dense)[:75]
    assert np.abs(dense - np.mean(heads, 0)).max() < 1e-4
    measured = seen[0].measurements
    assert measured["accepted"] == 4 and measured["rejected"] == []
    assert sorted(measured["clients"]) == [f"site {i}" for i in range(4)]
    assert (measured["secure"]["lone_share"] is None) == (method == "mean")
    # Nothing that left a party holds its delta, its examples or its loss.
    for reply in grid.received:
        assert not any(reply.content.metric_records.values())
        assert all("encoder" not in key for r in reply.content.array_records.values() for key in r)


def test_only_small_steps_travel_down_too(
    memory_grid: Any, toys: Any, keys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a version downlink parties get steps on the mask they all know; who has lost its
    copy is sent the base again, and all hold the very same version throughout."""
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    folder = keys(3)
    outcomes: list[Any] = []

    def disturb(outcome: Any) -> None:
        outcomes.append(outcome)
        if outcome.round == 3:
            for kept in (tmp_path / "cache" / "versions" / "bases").iterdir():
                kept.write_bytes(b"nothing")
            next((tmp_path / "cache" / "versions" / "heads").iterdir()).write_bytes(b"nothing")

    grid = memory_grid(secure_app(toys), 3)
    strategy = strategy_for(
        folder,
        secure={"drop_rate": "0.9"},
        dense=[r"^head"],
        downlink=make_downlink("auto"),
        round_hook=disturb,
    )
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=5)
    assert [o.measurements["accepted"] for o in outcomes] == [3] * 5
    assert all(not o.measurements["rejected"] for o in outcomes)
    down = [np.mean(o.measurements["download_bytes"]) for o in outcomes]
    steps = [step.head.form for step in strategy.downlink.steps]
    assert steps == ["union"] * 5
    full = sum(array.nbytes for array in toys.arrays().values())
    assert down[0] > full < down[3]
    assert max(down[1], down[2], down[4]) < down[0] - 0.9 * full  # the rest is the protocol's
    model = global_model(to_numpy(result.arrays), dense=[r"^head"], by_form=True)
    assert model.ref.version == strategy.downlink.version == outcomes[-1].model.ref.version


def test_secrets_are_nowhere_in_the_clear(
    memory_grid: Any, toys: Any, keys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every secret a party ever had, looked for in Flower's state, on disk and on the wire."""
    from dare_agg.secure import party as party_module

    secrets: set[bytes] = set()
    encode = party_module.encode_state

    def spy(state: Any) -> bytes:
        own = [state.sealing_secret, state.mask_seed, state.self_seed]
        secrets.update(s for s in own if s)
        for _, *shares in state.held:
            secrets.update(shares)
        files = b"".join(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())
        assert not any(s in files for s in secrets)
        return encode(state)

    monkeypatch.setattr(party_module, "encode_state", spy)
    # What stays with a party comes from its own code, never from the server.
    monkeypatch.setattr(reception, "_OFFERS", [lambda message, context: toys.arrays()])
    folder = keys(3)
    for number in range(3):
        found = identities.read_identity(folder / f"party-{number}.key", "a passphrase")
        secrets.add(found.secret)
    grid = memory_grid(secure_app(toys), 3)
    strategy = strategy_for(folder, exclude=[r"^head"])
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=2)
    assert len(secrets) > 40
    state = b"".join(deflated(context.state) for context in grid.contexts.values())
    # The revealed half of the shares goes over the wire, by design; nothing else may.
    wire = b"".join(deflated(message.content) for message in [*grid.sent, *grid.received])
    assert not [s for s in secrets if s in state]
    assert len([s for s in secrets if s in wire]) == 2 * 3 * 3
    heads = [
        grid.contexts[node].state["dare.local"]["head.weight"].numpy() for node in grid.contexts
    ]
    assert not np.array_equal(heads[0], heads[1])


def test_local_tensors_go_on_together_or_begin_anew(
    memory_grid: Any,
    toys: Any,
    keys: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A party that missed a sum has another head than the others: from there all begin anew."""
    made: list[int] = []

    def own_base(message: Any, context: Context) -> Any:
        made[-1] += 1
        return toys.arrays()

    monkeypatch.setattr(reception, "_OFFERS", [own_base])
    folder = keys(4)
    grid = memory_grid(secure_app(toys), 4)

    def hook(outcome: Any) -> None:
        made.append(0)
        grid.offline = set(list(grid.contexts)[:1]) if len(made) == 2 else set()

    strategy = strategy_for(folder, exclude=[r"^head"], round_hook=hook)
    made.append(0)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=4)
    assert made == [4, 0, 4, 0, 0]
    assert sum("begin with those of their own base again" in r.message for r in caplog.records) == 1


def deflated(content: RecordDict) -> bytes:
    parts = []
    for record in content.values():
        if isinstance(record, ConfigRecord):
            parts.append(record.deflate())
        else:
            parts += [item.data for item in record.values() if hasattr(item, "data")]
    return b"".join(parts)


def stage_of(reply: Any) -> str:
    record = reply.content.config_records.get("dare.secure")
    return str(record.get("stage", "")) if record is not None else ""


@pytest.mark.parametrize(
    "stage",
    ["contribute"]
    + [pytest.param(s, marks=pytest.mark.slow) for s in ("train", "share", "sign", "reveal")],
)
def test_a_party_may_vanish_at_any_stage(
    memory_grid: Any, toys: Any, keys: Any, stage: str
) -> None:
    folder = keys(5)

    def vanish(partition: int, reply: Any) -> Any:
        if partition == 2 and not reply.has_error() and stage_of(reply) == stage:
            grid.offline.add(next(n for n, p in grid.partitions.items() if p == 2))
            return None
        return reply

    grid = memory_grid(secure_app(toys), 5, tamper=vanish)
    strategy = strategy_for(folder, stage_seconds=2, deadline=2, dense=[r"^head"])
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    measured = strategy.outcome.measurements
    inside = [0, 1, 2, 3, 4] if stage in ("sign", "reveal") else [0, 1, 3, 4]
    assert sorted(measured["clients"]) == [f"site {i}" for i in inside]
    assert [r["reason"] for r in measured["rejected"]] == ["late"]
    before = global_model(toys.arrays(), dense=[r"^head"])
    after = global_model(to_numpy(result.arrays), dense=[r"^head"])
    step = after.delta - before.delta
    plain = 2 * expected(toys, strategy, inside, "mean")
    assert np.abs(step - plain)[:-1][step[:-1] != 0].max() < 1e-4


@pytest.mark.parametrize("stage", ["train", "contribute"])
def test_a_party_whose_answer_cannot_be_read_is_out(
    memory_grid: Any, toys: Any, keys: Any, stage: str
) -> None:
    folder = keys(5)

    class Raising(memory_grid):  # type: ignore[misc]
        def pull_messages(self, ids: Any) -> Any:
            for reply in (replies := super().pull_messages(ids)):
                if self.partitions[reply.metadata.src_node_id] == 2 and stage_of(reply) == stage:
                    raise ValueError("Unexpected set of children")
            return replies

    strategy = strategy_for(folder, dense=[r"^head"])
    strategy.start(Raising(secure_app(toys), 5), toys.record(toys.arrays()), num_rounds=1)
    measured = strategy.outcome.measurements
    assert sorted(measured["clients"]) == [f"site {i}" for i in (0, 1, 3, 4)]
    (rejected,) = measured["rejected"]
    assert (rejected["name"], rejected["reason"]) == ("site 2", "transport")
    assert "ValueError: Unexpected set of children" in rejected["detail"]


def test_large_vectors_travel_a_few_at_a_time(
    memory_grid: Any, toys: Any, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SuperLink's database chokes on many large uploads at once: the next party is asked when
    the ones before have answered."""
    monkeypatch.setattr(secure_session, "IN_FLIGHT_BYTES", 1)
    folder = keys(4)
    asked: list[int] = []

    def count(partition: int, reply: Any) -> Any:
        if not reply.has_error() and stage_of(reply) == "contribute":
            asked.append(sum(stage_of(message) == "contribute" for message in grid.sent))
        return reply

    grid = memory_grid(secure_app(toys), 4, tamper=count)
    strategy = strategy_for(folder)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    assert asked == [1, 2, 3, 4]
    assert strategy.outcome.measurements["accepted"] == 4
    monkeypatch.undo()
    assert secure_session.waves(range(5), 1 << 25) == [range(2), range(2, 4), range(4, 5)]
    assert secure_session.waves([1, 2], 0) == [[1, 2]] and secure_session.waves([], 9) == []


def test_values_cut_off_are_said(
    memory_grid: Any, toys: Any, keys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = keys(3)
    grid = memory_grid(secure_app(toys), 3)
    strategy = strategy_for(folder, secure={"clip": 1e-3})
    with caplog.at_level("WARNING", "flwr"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    share = strategy.outcome.measurements["secure"]["clipped_share"]
    assert share > 0.1 and "beyond clip 0.001" in caplog.text


def test_too_few_left_end_the_run_and_say_why(memory_grid: Any, toys: Any, keys: Any) -> None:
    folder = keys(4)

    def silent(partition: int, reply: Any) -> Any:
        gone = partition < 2 and not reply.has_error() and stage_of(reply) == "contribute"
        return None if gone else reply

    grid = memory_grid(secure_app(toys), 4, tamper=silent)
    strategy = strategy_for(folder, stage_seconds=1)
    with pytest.raises(RunError, match=r"2 of 4 parties answered stage 'vectors'; 3 are needed"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)


def test_a_round_that_was_cut_off_is_trained_anew_after_a_restart(
    memory_grid: Any, toys: Any, keys: Any
) -> None:
    """The server dies once vectors are in; the same round starts again with other draws, which
    an app's training takes from the run, since ledgers refuse the same delta."""
    folder = keys(3)
    seeds: list[int] = []

    def note(partition: int, reply: Any) -> Any:
        return None if cut and stage_of(reply) == "sign" else reply

    grid = memory_grid(secure_app(toys), 3, tamper=note)
    for cut in (True, False):
        strategy = strategy_for(folder, stage_seconds=1)
        grid.sent.clear()
        with pytest.raises(RunError, match="signatures" if cut else "already gone into"):
            # The toys train alike whatever the seed, and are refused the second time.
            strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
        configs = [m.content.config_records.get("config", {}) for m in grid.sent]
        seeds += {int(c["start-seed"]) for c in configs if "start-seed" in c}
    assert len(seeds) == 2 and seeds[0] != seeds[1]


def test_a_server_that_shows_another_base_is_refused_by_all(
    memory_grid: Any, toys: Any, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keys(3)
    grid = memory_grid(secure_app(toys), 3)
    strategy = strategy_for(folder)
    real = strategy.terms

    def other_base(*given: Any) -> Any:
        from dataclasses import replace

        return replace(real(*given), base="ab" * 32)

    monkeypatch.setattr(strategy, "terms", other_base)
    with pytest.raises(RunError, match="terms refused: base"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)


def test_strangers_and_keyless_nodes_take_no_part(memory_grid: Any, toys: Any, keys: Any) -> None:
    folder = keys(5, members=4)  # the fifth has a key that is not in the roster
    grid = memory_grid(secure_app(toys), 6)  # the sixth has none
    strategy = strategy_for(folder)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    assert len(strategy.outcome.measurements["clients"]) == 4
    (folder / "party-3.key").unlink()
    (folder / "party-2.key").unlink()
    strategy = strategy_for(folder)
    with pytest.raises(RunError, match="2 of 6 clients have proved"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)


def test_a_roster_signed_by_others_is_refused(memory_grid: Any, toys: Any, keys: Any) -> None:
    folder = keys(3)
    stranger = new_identity("stranger")
    roster = roster_of(folder)
    write_roster(
        folder / "roster.json", sign_roster(make_roster("trio", [(m.name, m.public) for m in
        roster.members]), stranger)
    )  # fmt: skip
    strategy = strategy_for(folder)
    with pytest.raises(RunError, match="0 of 3 clients have proved"):
        strategy.start(memory_grid(secure_app(toys), 3), toys.record(toys.arrays()), num_rounds=1)


def test_a_server_cannot_ask_for_the_same_in_the_clear(
    memory_grid: Any, toys: Any, keys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that has an identity for secure sums neither trains plainly nor shows metrics."""
    folder = keys(3)

    def node(partition: int) -> dict:
        return {
            "partition-id": partition,
            "secure-identity": str(folder / f"party-{partition}.key"),
            **more,
        }

    def replies(grid: Any, kind: str) -> list[Any]:
        return [r for r in grid.received if r.metadata.message_type == kind]

    more: dict[str, Any] = {}
    grid = memory_grid(secure_app(toys), 3, node_config=node)
    plain = DareStrategy(drop_rate="0.5", seed=1, fraction_evaluate=1.0, max_empty_rounds=0)
    with pytest.raises(RunError, match="secure sums only"):
        plain.start(grid, toys.record(toys.arrays()), num_rounds=1)
    assert len([r for r in grid.received if r.has_error()]) == 3  # the others say who they are
    assert not any(r.content.array_records for r in grid.received if not r.has_error())
    for shown in (False, True):
        more = {"secure-evaluate": shown}
        for ledger in folder.glob("*.ledger"):
            ledger.unlink()  # the toys' deltas are the same each time
        grid = memory_grid(secure_app(toys), 3, node_config=node)
        strategy = strategy_for(folder)
        strategy.fraction_evaluate = 1.0
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
        assert [r.has_error() for r in replies(grid, "evaluate")] == [not shown] * 3
    more = {"secure-only": False}
    grid = memory_grid(secure_app(toys), 3, node_config=node)
    plain.start(grid, toys.record(toys.arrays()), num_rounds=1)
    assert not any(r.has_error() for r in replies(grid, "train"))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"method": "ties"}, "no place"),
        ({"options": {"trim": 0.2}}, "magnitude trim"),
        ({"secure": {"min_parties": 2}}, "at least 3"),
        ({"secure": {"min_parties": 4}}, "has 3 members"),
    ],
)
def test_unsafe_strategies_are_refused(keys: Any, words: dict, match: str) -> None:
    folder = keys(3)
    with pytest.raises(ConfigError, match=match):
        strategy_for(folder, **words)
