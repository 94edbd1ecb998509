"""Sums of step times: those alike together, and each step once."""

from __future__ import annotations

import pytest

from services.core.blocks import BlockHandle, BlockRef
from services.core.sequence import Request, SamplingParams, Sequence
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.dataplane.peers import AnswerTimes
from services.instance.scheduler import Scheduled
from services.instance.step_timings import AttentionTimes, StepTimings
from services.kvdaemon.hosting import Hosting
from services.rmanager.block_table import BlockTable, Home


def table(local: int, remote: int = 0) -> BlockTable:
    """``remote`` blocks on "k", then ``local`` ones."""
    blocks = BlockTable(64)
    for index in range(remote):
        blocks.append_remote(BlockRef("k", BlockHandle(index, 1)), 1)
    for index in range(local):
        blocks.append_local(BlockHandle(index, 1), Home.SEALED)
    return blocks


def item(count: int) -> Scheduled:
    return Scheduled(Sequence(Request("r", (1,) * count, count, SamplingParams(0.0, 1, 9), 0.0, 1)), count)


def times(attention_s: float, local_s: float) -> AttentionTimes:
    attention = AttentionTimes()
    attention.add(attention_s / 2, local_s / 2)  # two layers
    attention.add(attention_s / 2, local_s / 2)
    return attention


def test_steps_alike_are_told_as_their_mean() -> None:
    timings = StepTimings()
    timings.add([item(1), item(1)], [table(3), table(5)], 0.1, times(0.04, 0.04), {})
    timings.add([item(1)], [table(4)], 0.3, times(0.06, 0.06), {})
    (told,) = timings.drain()
    assert told == StepTiming(1.5, 0.0, 6 * 64, pytest.approx(0.2), pytest.approx(0.05), pytest.approx(0.05), steps=2)
    assert timings.drain() == ()


def test_prefill_and_other_daemons_are_told_apart() -> None:
    timings = StepTimings()
    asked = {"k": AnswerTimes(4, 0.02, 1)}
    timings.add([item(1)], [table(2, remote=6)], 0.1, times(0.03, 0.01), asked)
    timings.add([item(1), item(1)], [table(2, remote=8), table(1)], 0.1, times(0.03, 0.01), asked)
    timings.add([item(100), item(1)], [table(2), table(1)], 0.5, times(0.03, 0.03), {})
    told = {timing.prefill_tokens > 0: timing for timing in timings.drain()}
    assert told[True].batch_tokens == 101
    assert told[True].prefill_tokens == 100
    assert told[False].steps == 2
    assert told[False].local_context_tokens == 2.5 * 64
    assert told[False].remotes == (RemoteTiming("k", 4.0, 1.0, 7 * 64, pytest.approx(0.02), 0.25),)


def test_a_daemon_that_was_not_asked_has_no_part() -> None:
    """Its blocks lie beyond every layer's window."""
    timings = StepTimings()
    timings.add([item(1)], [table(2, remote=6)], 0.1, times(0.03, 0.03), {})
    (told,) = timings.drain()
    assert told.remotes == ()


def test_kinds_of_steps_are_bounded() -> None:
    timings = StepTimings()
    for number in range(50):
        timings.add([item(1)], [table(1)], 0.1, times(0.03, 0.03), {f"k{number}": AnswerTimes(4, 0.02, 4)})
    assert len(timings.drain()) == 8


def test_hosting_is_summed() -> None:
    hosting = Hosting()
    assert hosting.drain() == ()
    hosting.add(1, 100.0, 0.25)
    hosting.add(1, 50.0, 0.5)
    assert hosting.drain() == (HostingTiming(2, 150.0, 0.75),)
    assert hosting.drain() == ()
