"""Filter, controller and recipes on NVFlare's own messages, without its simulator."""

from types import SimpleNamespace

import numpy as np
import pytest
from made_sites import made, toy_arrays, trained

pytest.importorskip("nvflare", reason="needs the extra nvflare: pip install 'dare-agg[nvflare]'")
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from dare_agg.errors import ConfigError, DareError
from dare_agg.nvflare import DareFedAvg, DareFilter, DareRecipe, NumpyDareRecipe
from dare_agg.nvflare.wire import ANSWER, AT, HAVE, HELLO, ORDER, REFUSAL, REPLY, VERSION
from dare_agg.rounds.messages import Hello, Refusal


class Engine:
    """An engine whose only channel is to a run in memory."""

    def __init__(self, run):
        self.run = run

    def fire_event(self, event_type, fl_ctx):
        """Nobody listens."""

    def send_aux_request(self, targets, topic, request, timeout, fl_ctx):
        reply = make_reply(ReturnCode.OK)
        try:
            piece = self.run.piece("site-1", *(request.get(word) for word in (VERSION, HAVE, AT)))
            reply[ANSWER] = piece
        except DareError as error:
            reply[ANSWER] = Refusal.of(error).to_record()
        return {"server": reply}


def context(run, direction=FilterKey.IN):
    ctx = FLContext()
    ctx.put(ReservedKey.ENGINE, Engine(run), private=True, sticky=False)
    ctx.put(ReservedKey.IDENTITY_NAME, "site-1", private=False, sticky=False)
    ctx.set_prop(FLContextKey.FILTER_DIRECTION, direction, private=True, sticky=False)
    return ctx


def opened(**words):
    run = made(1, **{"drop_rate": 0.9, **words})
    run.begin(toy_arrays())
    run.open(1, ["site-1"])
    return run


def task(run, **changes):
    order = {**run.order("site-1"), **changes}
    return DXO(DataKind.WEIGHTS, {}, {ORDER: order, "own": 1}).to_shareable()


def turned(run, ctx, result):
    ctx.set_prop(FLContextKey.FILTER_DIRECTION, FilterKey.OUT, private=True, sticky=False)
    return DareFilter().process(result, ctx)


def test_a_task_becomes_the_model_and_its_result_an_update():
    run = opened()
    ctx = context(run)
    inside = DareFilter().process(task(run), ctx)
    dxo = from_shareable(inside)
    assert dxo.data_kind == DataKind.WEIGHTS and dxo.meta == {"own": 1}
    assert list(dxo.data) == list(toy_arrays())
    result = DXO(DataKind.WEIGHTS, trained(dxo.data, 1, 1), {"NUM_STEPS_CURRENT_ROUND": 3})
    answer = from_shareable(turned(run, ctx, result.to_shareable()))
    assert answer.meta["NUM_STEPS_CURRENT_ROUND"] == 3
    assert run.take("site-1", answer.meta[REPLY], answer.data, 3, {})


def test_tasks_of_other_controllers_and_their_results_pass():
    run = opened()
    ctx = context(run)
    plain = DXO(DataKind.WEIGHTS, {"w": np.ones(3)}).to_shareable()
    assert DareFilter().process(plain, ctx) is plain
    assert turned(run, ctx, plain) is plain
    empty = Shareable()
    assert turned(run, ctx, empty) is empty


def test_results_that_are_errors_pass():
    run = opened()
    ctx = context(run)
    DareFilter().process(task(run), ctx)
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    assert turned(run, ctx, failed) is failed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"package": "0" * 16}, "package"),
        ({"codec": 0}, "version"),
        ({"ask": "obey"}, "version"),
        ({"downlink": "pigeons"}, "config"),
        ({"base-version": "../../etc"}, "base"),
        ({"version": "0" * 64}, "round"),
        ({"mask-key": b"short"}, "plan"),
        ({"base": "1" * 64}, "base"),
        ({"layout": "1" * 64}, "layout"),
    ],
)
def test_an_order_that_must_not_be_followed_is_refused_before_training(change, reason):
    run = opened()
    ctx = context(run)
    with pytest.raises(DareError):
        DareFilter().process(task(run, **change), ctx)
    refusal = Refusal.read(ctx.get_prop(REFUSAL))
    assert refusal.reason == reason and refusal.detail
    assert REFUSAL in ctx.get_all_public_props()


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (DXO(DataKind.METRICS, {"loss": 1.0}), "transport"),
        (DXO(DataKind.WEIGHTS, {"strange": np.ones(3, np.float32)}), "layout"),
        (DXO(DataKind.WEIGHTS, {"encoder.bias": np.full(25, np.nan, np.float32)}), "non-finite"),
        (DXO(DataKind.WEIGHTS, {"encoder.bias": np.zeros(24, np.float32)}), "layout"),
        (DXO(DataKind.WEIGHT_DIFF, {"encoder.bias": np.zeros(24, np.float32)}), "layout"),
        (DXO(DataKind.WEIGHTS, {"encoder.bias": [1.0] * 25}), "layout"),
    ],
)
def test_training_that_gives_no_update_is_a_reply_with_a_reason(result, reason):
    run = opened()
    ctx = context(run)
    DareFilter().process(task(run), ctx)
    answer = turned(run, ctx, result.to_shareable())
    assert answer.get_return_code() == ReturnCode.OK
    dxo = from_shareable(answer)
    assert Refusal.read(dxo.meta[REPLY]).reason == reason
    assert not run.take("site-1", dxo.meta[REPLY], dxo.data, 1, {})
    assert run._open.rejections["site-1"].reason == reason


def test_a_site_says_who_it_is_from_the_start_of_a_job():
    ctx = context(opened())
    DareFilter().handle_event(EventType.START_RUN, ctx)
    assert Hello.read(ctx.get_prop(HELLO)).name == "site-1"
    assert HELLO in ctx.get_all_public_props()


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (None, "mod"),
        ("text", "mod"),
        ({**Hello(name="site-1").to_record(), "package": "0" * 16}, "package"),
        ({**Hello(name="site-1").to_record(), "codec": 0}, "version"),
        (Hello(name="site-1").to_record(), ""),
    ],
)
def test_a_site_that_would_not_understand_its_task_is_sent_none(hello, reason):
    controller = DareFedAvg(num_clients=1, dare={"drop_rate": 0.9})
    run = controller._rounds
    run.begin(toy_arrays())
    opened_round = run.open(1, ["site-1"])
    controller._prepare_task_data = lambda client_task, fl_ctx: None
    peer, ctx = FLContext(), FLContext()
    if hello is not None:
        peer.set_prop(HELLO, hello, private=False, sticky=False)
    ctx.set_peer_context(peer)
    task_ = SimpleNamespace(completion_status=None)
    client_task = SimpleNamespace(client=SimpleNamespace(name="site-1"), task=task_)
    controller._before_sent(client_task, ctx)
    assert (task_.completion_status is None) == (not reason)
    assert [one.reason for one in opened_round.rejections.values()] == [reason] * bool(reason)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"aggregator": object()}, "method"),
        ({"exclude_vars": "head"}, "exclude"),
        ({"enable_tensor_disk_offload": True}, "leave it out"),
        ({"dare": {"drop_rat": 0.9}}, "drop_rate"),
        ({"num_clients": 2, "dare": {"min_replies": 3}}, "min_replies"),
        ({"num_clients": 2, "dare": {"robust": "median", "byzantine": 1}}, "min_clients"),
    ],
)
def test_words_that_have_no_meaning_are_refused_when_a_job_is_made(words, said):
    with pytest.raises(ConfigError, match=said):
        DareFedAvg(**words)


def test_recipes_refuse_what_is_not_offered(tmp_path):
    script = tmp_path / "client.py"
    script.write_text("")
    common = {"model": [[0.0]], "min_clients": 2, "train_script": str(script)}
    with pytest.raises(ConfigError, match="not offered"):
        NumpyDareRecipe(**common, secure="mean")
    with pytest.raises(ConfigError, match="leave it out"):
        DareRecipe(**common, server_expected_format="pytorch")
    with pytest.raises(ConfigError, match="did you mean 'drop_rate'"):
        NumpyDareRecipe(**common, drop_rat=0.9)
    with pytest.raises(ConfigError, match="in pieces"):
        NumpyDareRecipe(**common, drop_rate=0.9).enable_tensor_streaming(format="numpy")
