"""A client does without Flower's serialiser: what it sends is no reply, or far too much of one.

It used to end the run of all, whatever it cost: Flower raises over one reply in the midst of all.
Now each attempt is that client's rejection, within a second and 64 MB, and the others' round has
the bits that it has without the client.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import replies
from made_superlink import SuperLink
from replies import CLIENTS, TOO_LARGE, UNREADABLE, run
from toy import toy_app

from dare_agg.errors import RunError

ROOT = Path(__file__).resolve().parents[3]
# The fake SuperLink's own work is in the measure, and the machine may be busy.
SECONDS = 10
MEGABYTES = 64


@pytest.fixture(scope="module")
def measured():
    """What came of every attempt, in a process of its own."""
    names = [*replies.BY_PARTS, *replies.EDITS]
    done = subprocess.run(
        [sys.executable, replies.__file__, *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def the_others_train(measured, name, reason):
    found, reference = measured[name], measured[""]
    ((client, why, detail),) = found["rejected"]
    assert (client, why) == (0, reason)
    assert len(detail) <= 300 and detail.isprintable()
    assert found["accepted"] == reference["accepted"] == CLIENTS - 1
    assert found["model"] == reference["model"]
    assert found["seconds"] < SECONDS
    assert found["bytes"] < MEGABYTES * 1_000_000


@pytest.mark.parametrize("name", [attempt.__name__ for attempt in UNREADABLE])
def test_what_is_no_reply(measured, name):
    the_others_train(measured, name, "transport")


@pytest.mark.parametrize("name", [*(attempt.__name__ for attempt in TOO_LARGE), *replies.EDITS])
def test_more_than_was_asked_for(measured, name):
    the_others_train(measured, name, "oversized")
    # Nothing is read that is too long: what was under way when the line was cut.
    assert measured[name]["sent"] < 50_000_000


def test_an_upload_that_ends_midway(measured):
    """Flower's word for it: the reply was lost, which a client that crashes brings about too."""
    the_others_train(measured, replies.a_part_that_is_gone.__name__, "lost")


@pytest.mark.parametrize("name", ["a_record_of_garbage", "a_part_of_200_megabytes"])
def test_the_superlink_forgets_what_was_refused(measured, name):
    assert measured[name]["confirmed"] == measured[""]["confirmed"] == 2 * CLIENTS


@pytest.mark.parametrize(("asked", "trained"), [("hello", CLIENTS - 1), ("evaluate", CLIENTS)])
def test_garbage_whatever_is_asked(caplog, asked, trained):
    link = SuperLink(toy_app(), CLIENTS)
    garbage = replies.a_record_of_garbage
    seen = run(link, garbage, asked, min_available_nodes=CLIENTS - 1).outcome
    assert seen.measurements["accepted"] == trained
    assert seen.client_metrics["sum"] != 0
    told = [record.getMessage() for record in caplog.records if "transport" in record.getMessage()]
    assert len(told) == 1 and "DecodeError" in told[0]


def test_uploads_that_never_end_hold_up_nobody():
    """More of them than threads that pull: each thread waited for one of them, up to two hours."""
    link = SuperLink(toy_app(), 10)
    words = {"deadline": 5.0, "fraction_evaluate": 0.0}
    seen = run(link, replies.never_ends, "train", range(1, 10), **words).outcome.measurements
    assert seen["accepted"] == 1
    assert [row["reason"] for row in seen["rejected"]] == ["late"] * 9


def test_a_reply_in_another_nodes_name():
    """Who sent it is what the SuperLink says, which has checked the node's key."""
    link = SuperLink(toy_app(), CLIENTS)
    seen = run(link, replies.in_anothers_name, "train", range(CLIENTS)).outcome.measurements
    assert seen["accepted"] == CLIENTS and not seen["rejected"]


@pytest.mark.parametrize("what", ["pull-messages", "pull-object", "confirm-message-received"])
@pytest.mark.parametrize("status", [404, 501])
def test_what_the_superlink_fails_at_is_nobodys_reply(what, status):
    link = SuperLink(toy_app(), CLIENTS, status={what: status})
    with pytest.raises((RunError, httpx.HTTPStatusError), match=str(status)):
        run(link, lambda reply: reply, "train")
