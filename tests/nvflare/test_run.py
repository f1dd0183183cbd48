"""A job's rounds without NVFlare: the same bits as other engines, versions, refusals, resume."""

import numpy as np
import pytest
from made_sites import answer, made, rounds, toy_arrays, trained, turn_of

from dare_agg import simulate
from dare_agg.errors import ConfigError, DareError, RunError, StateError, UpdateError
from dare_agg.nvflare.payloads import PIECE_BYTES, Pieces, pull
from dare_agg.nvflare.words import read_words

WORDS = [
    {"drop_rate": 0.9},
    {},
    {"drop_rate": 0.5, "values": "i8", "dense": ["^head"], "server_step": "adam(tau=1e-3)"},
    {"drop_rate": 0.9, "method": "ties", "exclude": ["^head"], "weighting": "equal"},
]


def same(one, other):
    assert list(one) == list(other)
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("words", [one for one in WORDS if "drop_rate" in one])
def test_a_job_has_the_bits_of_the_federation_in_one_process(words, tmp_path):
    found = rounds(made(downlink="full", **words), tmp_path)
    local = {}

    def train(arrays, number, server_round):
        # `simulate` keeps no local tensors: a site's own are put where it trains.
        own = local.setdefault(number, {})
        tuned = trained({**arrays, **own}, number, server_round)
        own.update({n: a for n, a in tuned.items() if n.startswith("head") and "exclude" in words})
        return tuned, 10 * number

    model = toy_arrays()
    expected = simulate(model, [1, 2, 3], train, rounds=2, seed=7, **words)
    same(found[-1].arrays, expected.arrays)
    sent = sum(sum(one.measurements["update_bytes"]) for one in found)
    assert sent + sum(sum(one.measurements["dense_bytes"]) for one in found) == (
        expected.upload_bytes
    )


def test_versions_reach_sites_as_steps_after_the_base(tmp_path):
    found = rounds(made(drop_rate=0.9), tmp_path, last=3)
    model = sum(array.nbytes for array in toy_arrays().values())
    first, *later = (one.measurements["download_bytes"] for one in found)
    assert all(nbytes > model for nbytes in first)
    assert all(0 < nbytes < model / 4 for one in later for nbytes in one)


def test_a_site_that_lost_its_version_is_brought_the_whole_way_again(tmp_path):
    run = made(drop_rate=0.9)
    rounds(run, tmp_path, last=2)
    for path in (tmp_path / "site-2").rglob("*.safetensors"):
        path.unlink()
    opened = run.open(3, ["site-1", "site-2"])
    assert answer(run, "site-1", tmp_path, trained, 3)
    assert answer(run, "site-2", tmp_path, trained, 3)
    assert opened.download["site-2"] > 4000 > opened.download["site-1"]


def test_a_damaged_head_is_forgotten_and_asked_for_again(tmp_path):
    run = made(drop_rate=0.9)
    rounds(run, tmp_path, last=2)
    (head,) = (tmp_path / "site-1").rglob("*.state")
    head.write_bytes(head.read_bytes()[:-1] + b"?")
    run.open(3, ["site-1"])
    assert answer(run, "site-1", tmp_path, trained, 3)


def test_who_joins_late_gets_base_and_steps(tmp_path):
    run = made(drop_rate=0.9)
    rounds(run, tmp_path, sites=2, last=3)
    run.open(4, ["site-1", "site-9"])
    assert answer(run, "site-1", tmp_path, trained, 4)
    assert answer(run, "site-9", tmp_path, trained, 4)
    assert run.close().measurements["clients"] == ["site-1", "site-9"]


def test_a_site_with_a_base_of_its_own_is_not_sent_it(tmp_path):
    from dare_agg.downlink.base import write_base
    from dare_agg.nvflare.turn import Site, begin

    run = made(drop_rate=0.9)
    run.begin(toy_arrays())
    own = tmp_path / "base.safetensors"
    own.write_bytes(write_base(toy_arrays()))
    opened = run.open(1, ["site-1"])
    site = Site("site-1", tmp_path / "site-1", own)

    def pulled(version, have):
        return pull(lambda at: run.piece("site-1", version, have, at))

    turn = begin(run.order("site-1"), site, None, pulled)
    same(turn.arrays({}), toy_arrays())
    assert opened.download == {"site-1": 0}


def test_local_tensors_stay_with_their_site(tmp_path):
    local = {}
    found = rounds(made(drop_rate=0.9, exclude=["^head"]), tmp_path, local=local)
    same({"h": found[-1].arrays["head.weight"]}, {"h": toy_arrays()["head.weight"]})
    assert not np.array_equal(local["site-1"]["head.weight"], local["site-2"]["head.weight"])


def test_a_site_has_terms_of_its_own(tmp_path):
    own = {"site-2": {"drop_rate": 0.99, "values": "i8"}}
    (found,) = rounds(made(drop_rate=0.9, client_terms=own), tmp_path, last=1)
    assert found.measurements["values"] == ["b1", "i8", "b1"]
    assert found.measurements["drop_rates"] == pytest.approx([0.9, 0.99, 0.9])


def test_differences_are_what_weights_less_the_version_are(tmp_path):
    run = made(drop_rate=0, values="f32", downlink="full")
    run.begin(toy_arrays())
    run.open(1, ["site-1"])
    turn = turn_of(run, "site-1", tmp_path)
    start = turn.arrays({})
    tuned = trained(start, 1, 1)
    differences = {name: tuned[name] - array for name, array in start.items()}
    payloads, reply, _ = turn.answer(differences, differences=True)
    assert run.take("site-1", reply, payloads, 1, {})
    moved = run.close().arrays
    for name in ("encoder.weight", "head.weight"):
        assert np.abs(moved[name] - tuned[name]).max() < 2e-6


def test_resumed_jobs_end_with_the_same_bits(tmp_path):
    words = {"drop_rate": 0.9, "server_step": "adam(tau=1e-3)"}
    whole = rounds(made(**words), tmp_path / "a", last=4)
    state = str(tmp_path / "state")
    first = made(state=state, **words)
    rounds(first, tmp_path / "b", last=2)
    first._kept._folder.release()
    with pytest.raises(StateError, match="earlier run"):
        made(state=state, **words).begin(toy_arrays())
    again = made(state=state, resume=True, seed=None, **words)
    found = rounds(again, tmp_path / "b", last=4)
    assert len(found) == 2
    same(found[-1].arrays, whole[-1].arrays)


def test_rounds_that_get_nothing_leave_the_model_and_fail_at_the_end(tmp_path):
    run = made(drop_rate=0.9)
    run.begin(toy_arrays())
    for number in (1, 2):
        run.open(number, ["site-1", "site-2"])
        run.reject("site-1", "client-error", "on fire")
        finished = run.close()
        assert not finished.moved
        same(finished.arrays, toy_arrays())
    assert [one["reason"] for one in finished.measurements["rejected"]] == ["client-error", "late"]
    with pytest.raises(RunError, match="none of 2 rounds"):
        run.finish()
    run.open(3, ["site-1"])
    run.reject("site-1", "mod", "no filter")
    with pytest.raises(RunError, match="no filter"):
        run.close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda reply, payloads: (None, {"numpy_key": np.zeros(3)}), "mod"),
        (lambda reply, payloads: ({**reply, "package": "0" * 16}, payloads), "package"),
        (lambda reply, payloads: ({**reply, "codec": 99}, payloads), "version"),
        (lambda reply, payloads: ({**reply, "round": 2}, payloads), "round"),
        (lambda reply, payloads: ({**reply, "plan": bytes(16)}, payloads), "plan"),
        (lambda reply, payloads: (reply, {}), "truncated"),
        (lambda reply, payloads: (reply, {"update": np.zeros(9, np.uint8)}), "transport"),
        (lambda reply, payloads: (reply, {"update": bytes(100_000)}), "oversized"),
        (lambda reply, payloads: (reply, {"update": payloads["update"][:-1]}), "truncated"),
        (lambda reply, payloads: (reply, {**payloads, "dense": bytes(5000)}), "oversized"),
        (lambda reply, payloads: ({"refused": "non-finite", "detail": "NaN"}, {}), "non-finite"),
        (lambda reply, payloads: ({"refused": "whatever"}, {}), "refused"),
    ],
)
def test_a_bad_answer_is_rejected_with_its_reason(change, reason, tmp_path):
    run = made(drop_rate=0.9)
    run.begin(toy_arrays())
    opened = run.open(1, ["site-1", "site-2"])
    assert answer(run, "site-1", tmp_path, trained, 1)
    turn = turn_of(run, "site-2", tmp_path)
    payloads, reply, _ = turn.answer(trained(turn.arrays({}), 2, 1), differences=False)
    reply, payloads = change(reply, payloads)
    assert not run.take("site-2", reply, payloads, 1, {})
    assert opened.rejections["site-2"].reason == reason
    finished = run.close()
    assert finished.moved and list(finished.answers) == ["site-1"]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (float("nan"), "weight"),
        (-1, "weight"),
        (0, "no-examples"),
        ("9", "weight"),
        (1e300, "weight"),
    ],
)
def test_a_weight_that_is_no_number_of_steps_is_rejected(weight, reason, tmp_path):
    run = made(drop_rate=0.9)
    run.begin(toy_arrays())
    opened = run.open(1, ["site-1"])
    turn = turn_of(run, "site-1", tmp_path)
    payloads, reply, _ = turn.answer(trained(turn.arrays({}), 1, 1), differences=False)
    assert not run.take("site-1", reply, payloads, weight, {})
    assert opened.rejections["site-1"].reason == reason


def test_training_that_gives_a_nan_is_refused_by_the_site(tmp_path):
    run = made(drop_rate=0.9)
    run.begin(toy_arrays())
    run.open(1, ["site-1"])
    turn = turn_of(run, "site-1", tmp_path)
    bad = {**turn.arrays({}), "encoder.bias": np.full(25, np.nan, np.float32)}
    with pytest.raises(DareError) as caught:
        turn.answer(bad, differences=False)
    assert caught.value.reason == "non-finite"


def test_torch_tensors_are_refused_with_the_remedy(tmp_path):
    run = made(drop_rate=0.9)
    run.begin(toy_arrays())
    run.open(1, ["site-1"])
    turn = turn_of(run, "site-1", tmp_path)
    with pytest.raises(DareError, match="server_expected_format"):
        turn.answer({"encoder.bias": [1.0] * 25}, differences=False)


@pytest.mark.parametrize("request_", [(1, "", 0), ("", None, 0), ("", "", "0"), ("", "", 1.5)])
def test_a_malformed_request_for_a_version_is_refused(request_, tmp_path):
    run = made(drop_rate=0.9)
    run.begin(toy_arrays())
    run.open(1, ["site-1"])
    with pytest.raises(UpdateError) as caught:
        run.piece("site-1", *request_)
    assert caught.value.reason == "malformed"


def test_requests_for_other_versions_and_places_are_refused(tmp_path):
    run = made(drop_rate=0.9)
    run.begin(toy_arrays())
    run.open(1, ["site-1"])
    version = run.model.ref.version
    with pytest.raises(UpdateError, match="newest"):
        run.piece("site-1", "0" * 64, "", 0)
    with pytest.raises(UpdateError, match="bytes was asked"):
        run.piece("site-1", version, "", 1 << 30)
    with pytest.raises(UpdateError, match="bytes was asked"):
        run.piece("site-1", version, "", -1)
    for number in range(50):
        run.piece("site-1", version, f"{number:064d}", 0)
    assert len(run._pieces) == 1


def test_payloads_come_piece_by_piece_and_whole():
    payloads = {"base": bytes(range(256)) * 9000, "steps": b"step"}
    asked = []

    def ask(at):
        asked.append(at)
        return Pieces(payloads).cut(at)

    assert pull(ask) == payloads
    assert asked[:2] == [0, PIECE_BYTES] and len(asked) == 4


@pytest.mark.parametrize(
    "answers",
    [
        [{}],
        [{"sizes": {"base": -1}, "piece": b""}],
        [{"sizes": {"other": 1}, "piece": b"1"}],
        [{"sizes": {"base": 1 << 50}, "piece": b"1"}],
        [{"sizes": {"base": 4}, "piece": b""}],
        [{"sizes": {"base": 4}, "piece": b"12345"}],
        [{"sizes": {"base": 4}, "piece": "1234"}],
        [{"sizes": {"base": 4}, "piece": b"12"}, {"sizes": {"base": 5}, "piece": b"34"}],
        [{"sizes": {"base": 2, "steps": 2}, "piece": b"123"},
         {"sizes": {"base": 2, "steps": 2}, "piece": b"4"}],
    ],
)  # fmt: skip
def test_pieces_that_do_not_fit_are_refused(answers):
    given = iter(answers)
    with pytest.raises(DareError) as caught:
        pull(lambda at: next(given))
    assert caught.value.reason == "base"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"drop_rat": 0.9}, "drop_rate"),
        ({"drop_rate": 2}, "drop rate"),
        ({"method": "fisher"}, "statistics"),
        ({"downlink": "version"}, "unknown"),
        ({"state": "runs/state"}, "absolute"),
        ({"resume": True}, "without state"),
        ({"client_terms": {"site-1": {"rate": 1}}}, "client_terms"),
        ({"client_terms": {"a": {"drop_rate": 0.9}}, "upload_budget": "1kB"}, "both choose"),
        ({"min_replies": 0}, "min_replies"),
        ({"deadline": -1}, "deadline"),
        ({"secure": "mean"}, "not offered"),
        ({"privacy": 1.0}, "not offered"),
        ({"identities": {}}, "not offered"),
    ],
)
def test_words_out_of_bounds_are_refused_before_the_job(words, said):
    with pytest.raises(ConfigError, match=said):
        read_words(words)


def test_sites_are_drawn_alike_in_every_run():
    run = made(drop_rate=0.9, seed=3)
    sites = [f"site-{number}" for number in (3, 1, 4, 2, 5)]
    drawn = [run.drawn(number, sites, 2) for number in range(1, 6)]
    assert drawn == [made(seed=3).drawn(number, sorted(sites), 2) for number in range(1, 6)]
    assert len({tuple(each) for each in drawn}) > 1
