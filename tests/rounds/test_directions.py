"""Directions in a round: what clients send, what merges by it, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dare_agg.codec.directions import (
    CHECKSUM_BYTES,
    _checksum,
    encode_directions,
    plan_directions,
)
from dare_agg.errors import ConfigError
from dare_agg.merge.directions import directions_of
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import model_linears
from dare_agg.rounds import directions as rounds_directions
from dare_agg.rounds.client import ClientUpdate, completed_update, measure, update_of_arrays
from dare_agg.rounds.directions import decode_round_directions, most_bytes
from dare_agg.rounds.plan import RoundPlan, make_plans, plan_from_record
from dare_agg.rounds.server import Accepted, Rejection, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.statistics import StatisticsUpdate
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel, global_model
from dare_agg.vectors.sources import array_source

CLIENTS = 3


def base_model() -> GlobalModel:
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.weight": (40, 12),
        "wide.weight": (30, 90),
        "wide.bias": (30,),
        "small.weight": (5, 12),
        "head.weight": (2, 12),
    }
    arrays = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    return global_model(arrays, dense=[r"^head"])


def settings_of(rate: str = "0", bits: int = 32, **words: Any) -> FederatedSettings:
    terms = UpdateTerms(
        drop_rate=rate, values="f32", dense=(r"^head",), directions=3, direction_bits=bits
    )
    return FederatedSettings(terms, method="wudi", weighting="equal", **words)


def change_of(model: GlobalModel, client: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([7, client])
    found = {}
    for name, array in model.arrays().items():
        change = 0.002 * rng.normal(size=array.shape)
        if array.ndim == 2:
            change += 0.02 * np.outer(*(rng.normal(size=n) for n in array.shape))
        found[name] = (array + change).astype(np.float32)
    return found


def sent(
    model: GlobalModel, settings: FederatedSettings, clients: int = CLIENTS
) -> list[tuple[RoundPlan, ClientUpdate]]:
    plans = make_plans(b"s" * 32, 1, [None] * clients, settings.terms, model.ref)
    return [(p, update_of_arrays(p, model, change_of(model, p.client))) for p in plans]


def taken(model: GlobalModel, plan: RoundPlan, update: ClientUpdate) -> Accepted | Rejection:
    return check_reply(
        plan, update.blob, update.dense_blob, 1.0,
        statistics=update.statistics, layout=model.groups.layout,
    )  # fmt: skip


def test_a_round_is_the_offline_merge_by_directions() -> None:
    model, settings = base_model(), settings_of()
    accepted = [taken(model, *one) for one in sent(model, settings)]
    merged = merge_round(model, accepted, settings)  # type: ignore[arg-type]
    layout = model.groups.layout
    deltas = [layout.flatten(change_of(model, c)) - model.delta[:] for c in range(CLIENTS)]
    statistics = [
        {n: rows for n, rows, _ in directions_of(array_source(d), model_linears(layout), 3)}
        for d in deltas
    ]
    wanted, _ = merge_deltas(
        layout, [array_source(d) for d in deltas], "wudi", statistics=statistics, measure=False
    )
    # Sizes of directions travel in bfloat16.
    assert np.linalg.norm(merged.delta - wanted) < 2e-3 * np.linalg.norm(wanted)
    assert np.abs(wanted - np.mean(deltas, axis=0)).max() > 1e-3
    heads = [change_of(model, c)["head.weight"].ravel() for c in range(CLIENTS)]
    assert merged.dense is not None
    assert np.abs(merged.dense - (np.mean(heads, 0) - model.dense)).max() < 1e-3


def test_few_bits_serve_and_count() -> None:
    model = base_model()
    settings = settings_of("0.9", bits=4)
    for plan, update in sent(model, settings):
        assert update.statistics is not None
        assert len(update.statistics.blob) == most_bytes(plan.terms, model.groups.layout)
        parts = len(update.blob) + len(update.dense_blob or b"") + len(update.statistics.blob)
        assert update.nbytes == parts
        found = decode_round_directions(plan, model.groups.layout, update.statistics.blob)
        assert set(found) == {"wide.weight", "small.weight"}
        assert found["wide.weight"].shape == (3, 90)


def test_order_of_arrival_changes_no_bit() -> None:
    model, settings = base_model(), settings_of("0.5", bits=4)
    accepted = [taken(model, *one) for one in sent(model, settings)]
    merged = [merge_round(model, order, settings).delta for order in (accepted, accepted[::-1])]  # type: ignore[arg-type]
    assert merged[0].tobytes() == merged[1].tobytes()


def test_a_layer_that_did_not_change_has_none() -> None:
    model, settings = base_model(), settings_of()
    (plan,) = make_plans(b"s" * 32, 1, [None], settings.terms, model.ref)
    still = {**change_of(model, 0), "wide.weight": model.arrays()["wide.weight"]}
    update = update_of_arrays(plan, model, still)
    assert update.statistics is not None
    found = decode_round_directions(plan, model.groups.layout, update.statistics.blob)
    assert set(found) == {"small.weight"}
    update = update_of_arrays(plan, model, dict(model.arrays()))
    assert update.statistics is not None and update.statistics.blob == bytes(4)
    accepted = taken(model, plan, update)
    assert isinstance(accepted, Accepted)
    assert not merge_round(model, [accepted], settings).delta.any()


def test_plans_say_how_many_and_old_ones_nothing() -> None:
    model = base_model()
    (plan,) = make_plans(b"s" * 32, 1, [None], settings_of(bits=4).terms, model.ref)
    record = plan.to_record()
    assert (record["directions"], record["direction-bits"]) == (3, 4)
    assert plan_from_record(record) == plan
    none = replace(plan, terms=replace(plan.terms, directions=0))
    assert not {"directions", "direction-bits"} & none.to_record().keys()
    assert none.digest() != plan.digest()


def test_settings_without_use_are_refused() -> None:
    assert FederatedSettings(method="wudi").terms.directions == 8
    for words in ({"directions": -1}, {"directions": 5000}, {"directions": 2, "direction_bits": 3}):
        with pytest.raises(ConfigError):
            FederatedSettings(UpdateTerms(**words), method="wudi")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="does not merge by them"):
        FederatedSettings(UpdateTerms(directions=4), method="ties")
    model = global_model({"body": np.ones((4, 4), np.float32)})
    (plan,) = make_plans(b"s" * 32, 1, [None], settings_of().terms, model.ref)
    with pytest.raises(ConfigError, match="needs Linears"):
        update_of_arrays(plan, model, {"body": np.zeros((4, 4), np.float32)})


def test_a_change_in_several_processes_gives_none() -> None:
    model = base_model()
    ((plan, update),) = sent(model, settings_of(), 1)
    still = measure(model.groups.layout, model.delta, array_source(model.delta[:]))
    with pytest.raises(ConfigError, match="several processes"):
        completed_update(plan, model, update.blob, model.dense, still)


def forged(plan: RoundPlan, model: GlobalModel, rows: np.ndarray) -> bytes:
    """A section with ``rows`` as the directions of the wide Linear, well-formed otherwise."""
    layout = model.groups.layout
    found = {"wide.weight": (rows, 1)}
    section = encode_directions(
        layout, plan_directions(layout, found, "f32"), found, *rounds_directions._bound(plan)
    )
    counts = [len(rows) if name in found else 0 for name in model_linears(layout)]
    return np.array(counts, "<u2").tobytes() + section


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda blob: blob[:-1], "truncated"),
        (lambda blob: blob[:3], "truncated"),
        (lambda blob: blob + b"\0", "oversized"),
        (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "checksum"),
        (lambda blob: b"\xff\xff" + blob[2:], "shape"),
        (lambda blob: bytes(4) + blob[4:], "trailing"),
        (lambda blob: b"", "truncated"),
    ],
)
def test_bytes_that_are_no_directions_are_refused(edit: Any, reason: str) -> None:
    model = base_model()
    ((plan, update),) = sent(model, settings_of(), 1)
    assert update.statistics is not None
    bad = replace(update, statistics=StatisticsUpdate(edit(update.statistics.blob)))
    found = taken(model, plan, bad)
    assert isinstance(found, Rejection) and found.reason == reason, found
    missing = taken(model, plan, replace(update, statistics=None))
    assert isinstance(missing, Rejection) and missing.reason == "directions"


def test_another_clients_directions_are_refused() -> None:
    model = base_model()
    (first, update), (_, other) = sent(model, settings_of(), 2)
    found = taken(model, first, replace(update, statistics=other.statistics))
    assert isinstance(found, Rejection) and found.reason == "checksum"


def test_directions_that_no_change_has_are_refused() -> None:
    """Twice the same, the smaller first: rows that would count one direction for more."""
    model = base_model()
    ((plan, update),) = sent(model, settings_of(), 1)
    rng = np.random.default_rng(0)
    rows, _ = np.linalg.qr(rng.normal(size=(90, 3)))
    good = rows.T * np.array([[3.0], [2.0], [1.0]])
    twice = good[[0, 0, 1]] * np.array([[1.0], [0.9], [0.5]])
    for bad in (twice, good[::-1]):
        found = taken(
            model, plan, replace(update, statistics=StatisticsUpdate(forged(plan, model, bad)))
        )
        assert isinstance(found, Rejection) and found.reason == "directions", found
    sections = StatisticsUpdate(forged(plan, model, good))
    assert isinstance(taken(model, plan, replace(update, statistics=sections)), Accepted)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_numbers_that_are_none_or_huge_are_refused(value: float) -> None:
    model = base_model()
    ((plan, update),) = sent(model, settings_of(), 1)
    rows = np.linalg.qr(np.random.default_rng(0).normal(size=(90, 2)))[0].T.copy()
    blob = bytearray(forged(plan, model, rows))
    # The first size is a bfloat16 behind the counts; the elements of f32 follow.
    body = bytearray(blob[4:])
    body[4:8] = np.array(value, "<f4").tobytes()
    body[:2] = np.array(value, "<f4").tobytes()[2:]
    key, context = rounds_directions._bound(plan)
    body[-CHECKSUM_BYTES:] = _checksum(key, context, bytes(body[:-CHECKSUM_BYTES]))
    bad = StatisticsUpdate(bytes(blob[:4]) + bytes(body))
    found = taken(model, plan, replace(update, statistics=bad))
    assert isinstance(found, Rejection)
    assert found.reason in ("non-finite", "magnitude", "malformed"), found
