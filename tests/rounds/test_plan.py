"""Round plans: keys, ranks, the record form, and what a client refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, UpdateError
from dare_agg.rounds.plan import make_plans, plan_from_record
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import ModelRef

MODEL = ModelRef("ab" * 32, "cd" * 32, 5000, "ef" * 32, "01" * 32, 70)
SECRET = bytes(range(32))


def plans_for(count: int, p: str = "0.9", shared_mask: bool = False, **words):
    terms = UpdateTerms(parse_drop_rate(p), **words)
    return make_plans(SECRET, 3, [None] * count, terms, MODEL, run="r1", shared_mask=shared_mask)


def test_same_secret_same_plans_other_secret_other_keys():
    assert plans_for(4) == plans_for(4)
    other = make_plans(bytes(32), 3, [None], UpdateTerms(parse_drop_rate("0.9")), MODEL)
    assert other[0].mask_key != plans_for(1)[0].mask_key


def test_masks_of_a_family_are_disjoint_and_the_next_family_has_its_own_key():
    plans = plans_for(12)
    assert [plan.rank for plan in plans] == [*range(10), 0, 1]
    assert len({plan.mask_key for plan in plans}) == 2
    seen = np.zeros(MODEL.size, np.int64)
    for plan in plans[:10]:
        seen[plan.spec().draw_mask().indices(0, MODEL.size)] += 1
    assert seen.max() == 1 and seen.sum() == 10 * 500


def test_every_client_has_its_own_value_key():
    plans = plans_for(12)
    assert len({plan.values_key for plan in plans}) == 12
    assert len({plan.dense_values_key for plan in plans}) == 12
    assert len({plan.digest() for plan in plans}) == 12


def test_shared_mask_gives_every_client_rank_zero():
    plans = plans_for(12, shared_mask=True)
    assert {plan.rank for plan in plans} == {0}
    assert len({plan.mask_key for plan in plans}) == 1


def test_clients_of_another_drop_rate_are_ranked_among_themselves():
    slow = ClientTerms(parse_drop_rate("0.99"), "b1")
    plans = make_plans(
        SECRET, 1, [None, slow, None, slow], UpdateTerms(parse_drop_rate("0.5"), "f16"), MODEL
    )
    assert [plan.rank for plan in plans] == [0, 0, 1, 1]
    assert [plan.terms.values for plan in plans] == ["f16", "b1", "f16", "b1"]
    assert plans[0].mask_key == plans[2].mask_key != plans[1].mask_key == plans[3].mask_key


def test_record_form_round_trips_and_has_no_empty_values():
    (plan,) = plans_for(1, dense=("head",), exclude=("^classifier", "x"))
    record = plan.to_record()
    assert plan_from_record(record) == plan
    assert all(value != "" and value != [] for value in record.values())
    bare = replace(plan, run="", terms=replace(plan.terms, dense=(), exclude=()))
    assert plan_from_record(bare.to_record()) == bare


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mask-key", None),
        ("mask-key", b"short"),
        ("round", "3"),
        ("round", True),
        ("round", -1),
        ("size", 1.5),
        ("stride", 0),
        ("exclude", [1]),
        ("exclude", "head"),
        ("base", "a" * 5000),
        ("rescale", 1),
        ("values", "b3"),
        ("mask", "random"),
        ("max-weight", float("nan")),
    ],
)
def test_a_damaged_record_is_refused_by_field(field, value):
    record = plans_for(1)[0].to_record()
    if value is None:
        del record[field]
    else:
        record[field] = value
    with pytest.raises(UpdateError) as caught:
        plan_from_record(record)
    assert caught.value.reason == "plan"


def test_any_change_of_the_plan_changes_its_digest_and_both_contexts():
    (plan,) = plans_for(1)
    for other in (
        replace(plan, round=4),
        replace(plan, run="r2"),
        replace(plan, terms=replace(plan.terms, max_weight=1.0)),
    ):
        assert other.digest() != plan.digest()
        assert other.spec().context != plan.spec().context
        assert other.dense_spec().context != plan.dense_spec().context
    assert plan.spec().context != plan.dense_spec().context


def test_a_round_without_clients_is_refused():
    with pytest.raises(ConfigError):
        make_plans(SECRET, 1, [], UpdateTerms(parse_drop_rate("0.9")), MODEL)


@pytest.mark.parametrize(
    ("settings", "digests"),
    [
        (
            FederatedSettings(UpdateTerms(max_weight=1e7)),  # its default then
            "666ee1f18f0fcfba89d451e6d0b0bc71d58159d93606476762d71e60441794bd "
            "ffb51eab42d89a7c11a33d412d1e5c992c36578beb96cb6ef4a219ca3b2425ce "
            "02bda82723b00516091a5d86880627d048e237c360b25ce88859d7b7b359f7ce",
        ),
        (
            FederatedSettings(
                UpdateTerms(
                    drop_rate=parse_drop_rate("0.75"),
                    values="i8",
                    mask="bernoulli",
                    dense=("head",),
                    exclude=("^x", "y"),
                    dense_values="f32",
                    max_weight=500,
                    statistics_values="f32",
                ),
                method="fisher",
            ),
            "2eb2b2e7ffd2be69135d9f2455484ef23253a8a49b3116b5a86ea2b95e23c02c "
            "ab8be84ee9030333baefd550e480972e886601b1c51c795f23c70bd93c01b302 "
            "dfb43b4993e27531d4d4bf609b340c8a567f4c46610f9fe4d98b6737a444821e",
        ),
        (
            FederatedSettings(UpdateTerms(max_weight=1e7, rescale=False), method="regmean"),
            "44cf3f2f92a6f61e336e06126d017a536609f0105c0de2114794d3d2efe1e2dd "
            "898794138843ef22c8ff34a7536af9d60411f0d172f6f470f5884da27b23af26 "
            "e6860d59461f156787ad948116892494e8f6f7ab4ae310b7e5d716e9dea10a55",
        ),
    ],
)
def test_digests_are_those_of_version_0_1(settings, digests):
    """Made by commit ef94b1b, before a plan held its round's terms; the package is blanked."""
    own = [None, ClientTerms(parse_drop_rate("0.99"), "b2"), None]
    plans = make_plans(
        SECRET, 3, own, settings.terms, MODEL, run="r1", shared_mask=settings.shared_mask
    )
    found = [replace(plan, package="00" * 32) for plan in plans]
    assert [plan.digest().hex() for plan in found] == digests.split()
    assert [plan_from_record(plan.to_record()) for plan in found] == found
