"""How loud a round's drop is beside the weights, and the line that quietens it."""

import math

import numpy as np
import pytest

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.noise import LOUD, QUIET, NoiseWatch, error_of, remedy, round_noise
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import server_step
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model

P9 = parse_drop_rate("0.9")


def played(clients, moved, name="w", zero=False, **settings):
    """One round of clients whose deltas have nothing in common; its noise, and the formula's."""
    random = np.random.default_rng(0)
    start = random.standard_normal((100, 300)).astype(np.float32)
    arrays = {name: start * 0 if zero else start}
    settings = FederatedSettings(UpdateTerms(), **settings)
    model = global_model(arrays)
    plans = make_plans(bytes(32), 1, [None] * clients, settings.terms, model.ref)
    accepted, norms, mean = [], [], np.zeros(model.delta.size)
    for plan in plans:
        delta = random.standard_normal((100, 300)).astype(np.float32) * np.float32(moved)
        update = make_client_update(plan, arrays, {name: arrays[name] + delta})
        accepted.append(check_reply(plan, update.blob, None, 1.0))
        norms.append(update.delta_norm)
        mean += delta.ravel() / clients
    merged = merge_round(model, accepted, settings)
    after = global_model({name: (model.delta + merged.delta).reshape(100, 300)})
    size = float(np.linalg.norm(after.delta if zero else model.delta))
    told = round_noise(plans, norms, merged.weights, settings, model.groups, size)
    return told, float(np.linalg.norm(merged.delta - mean) / size)


@pytest.mark.parametrize("clients", [1, 4, 10])
def test_the_noise_is_what_the_merge_really_adds(clients):
    told, real = played(clients, 0.1)
    assert told == pytest.approx(real, rel=0.1)
    assert told == pytest.approx(0.1 * math.sqrt(14.7 / clients), rel=0.1)


def test_a_model_that_began_at_zero_is_judged_by_what_it_became():
    told, real = played(4, 0.1, zero=True)
    assert told == pytest.approx(real, rel=0.1)
    assert told > LOUD


def test_what_cannot_be_judged_is_not():
    assert played(2, 1.0, name="layer.lora_A.weight")[0] is None
    assert played(2, 1.0, server_step=server_step("adam"))[0] is None
    plans = make_plans(
        bytes(32), 1, [None], UpdateTerms(), global_model({"w": np.ones(3, np.float32)}).ref
    )
    model = global_model({"w": np.ones(3, np.float32)})
    for told in (math.nan, math.inf, -math.inf):
        assert round_noise(plans, [told], [1.0], FederatedSettings(), model.groups, 1.0) is None


@pytest.mark.parametrize("noise", [0.26, 0.5, 1.1, 5.0])
@pytest.mark.parametrize(("rate", "values"), [("0.9", "b1"), ("0.99", "b1"), ("0.9", "f32")])
def test_the_remedy_is_quiet_and_of_fewest_bits(noise, rate, values):
    rate = parse_drop_rate(rate)
    found = remedy(noise, rate, values)
    scale = noise / math.sqrt(error_of(rate, values))
    assert scale * math.sqrt(error_of(found.drop_rate, found.values)) <= QUIET
    bits = {"b1": 1, "b2": 2, "b4": 4, "i8": 8}
    spent = bits[found.values] * found.drop_rate.keep
    for p in ("0.99", "0.9", "0.5", "0"):
        for name, of_value in bits.items():
            other = parse_drop_rate(p)
            if of_value * other.keep < spent:
                assert scale * math.sqrt(error_of(other, name)) > QUIET


def test_nothing_is_left_to_say_of_terms_that_send_all():
    assert remedy(1.0, parse_drop_rate(0), "f32") is None


def test_one_loud_round_is_forgiven_two_are_told_once():
    model = global_model({"w": np.ones(3, np.float32)})
    plans = make_plans(bytes(32), 1, [None, None], UpdateTerms(), model.ref)
    watch = NoiseWatch()
    told = [watch.look(noise, plans) for noise in (0.9, 0.1, 0.9, None, 0.9, 0.4, 0.9, 0.9)]
    assert told == [None] * 5 + [remedy(0.9, P9, "b1")] + [None] * 2
    assert watch.loudest == 0.9
    assert str(told[5]) == 'drop_rate=0, values="b2"'
    assert told[5].nbytes(80_000) == HEADER_BYTES + payload_bytes("b2", 80_000)


@pytest.mark.parametrize(
    ("rounds", "told"),
    [
        ((0.44, 0.26, 0.12), False),  # falls by itself: fl-tabular, which loses nothing
        ((0.05, 0.2, 0.25, 0.2), False),
        ((0.27, 0.83), True),  # rises: quickstart-jax, which loses a quarter
        ((0.36, 0.39), True),  # stays: whisper-federated-finetuning
    ],
)
def test_two_rounds_are_judged_together(rounds, told):
    model = global_model({"w": np.ones(3, np.float32)})
    plans = make_plans(bytes(32), 1, [None, None], UpdateTerms(), model.ref)
    watch = NoiseWatch()
    ways = [watch.look(noise, plans) for noise in rounds]
    assert [way is not None for way in ways] == [False] * (len(rounds) - 1) + [told]
