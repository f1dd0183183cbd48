"""Versions named by a chain: the name says which bytes led to it, and nothing has to be read."""

from dataclasses import replace

import numpy as np
import pytest

from dare_agg.downlink.lossless import encode_counts
from dare_agg.downlink.step_form import StepHead
from dare_agg.downlink.steps import chained_step, check_chain, read_steps
from dare_agg.errors import UpdateError

HEAD = StepHead("dense", "b1", "i8", 3, "ab" * 32, "00" * 32, bytes(16), survivors=9)


def test_a_name_depends_on_the_parent_and_on_every_byte() -> None:
    step = chained_step(HEAD, b"payload", b"dense")
    check_chain(step)
    assert read_steps(step.body, step.dense) == [step]
    others = [
        chained_step(replace(HEAD, parent="ac" * 32), b"payload", b"dense"),
        chained_step(replace(HEAD, round=4), b"payload", b"dense"),
        chained_step(HEAD, b"Payload", b"dense"),
        chained_step(HEAD, b"payload", b"Dense"),
        chained_step(HEAD, b"payloadd", b"ense"),
    ]
    assert len({one.head.child for one in (step, *others)}) == 6


def test_a_step_under_anothers_name_is_refused() -> None:
    step = chained_step(HEAD, b"payload", b"")
    with pytest.raises(UpdateError, match="leads to"):
        check_chain(replace(step, head=replace(step.head, child="cd" * 32)))


def test_a_sum_is_named_by_whoever_sums() -> None:
    head = replace(HEAD, form="lossless", child="cd" * 32)
    check_chain(replace(chained_step(head, encode_counts(np.zeros(4, np.int32)), b""), head=head))
