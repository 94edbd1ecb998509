"""How long a transport stays awake."""

from __future__ import annotations

import os
import threading
import time
from ctypes import c_uint64

import pytest

from kernels.cpu import find_library
from kernels.cpu.answering import ConnectionWatch, Watched
from services.dataplane.patience import Patience

LEAST, MOST = 20e-6, 1e-3
LONG_S = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def waits(patience: Patience, clock: Clock, seconds: float, times: int) -> list[float]:
    """So many waits of that length; answers how long each one began awake."""
    awake = []
    for _ in range(times):
        awake.append(patience.awake_s())
        clock.now += seconds
        patience.arrived()
    return awake


def test_soon_arrivals_make_patient_and_late_ones_impatient() -> None:
    clock = Clock()
    patience = Patience(LEAST, MOST, clock)
    assert waits(patience, clock, 0.3e-3, 1) == [LEAST]
    waits(patience, clock, 0.3e-3, 20)
    assert waits(patience, clock, 0.3e-3, 1) == [MOST]
    waits(patience, clock, 5.0, 1)
    assert waits(patience, clock, 0.3e-3, 1) == [MOST], "one pause, as between two steps, changes nothing"
    waits(patience, clock, 5.0, 10)
    assert waits(patience, clock, 5.0, 1) == [LEAST]


def test_a_wait_lasts_until_something_arrives_however_often_it_is_asked_for() -> None:
    clock = Clock()
    patience = Patience(LEAST, MOST, clock)
    waits(patience, clock, 0.1e-3, 30)
    for _ in range(30):
        patience.awake_s()
        clock.now += 1.0
    patience.arrived()
    assert patience.awake_s() == MOST, "it was one long wait, not thirty"


def test_a_core_that_others_want_is_left_to_them() -> None:
    clock = Clock()
    patience = Patience(LEAST, MOST, clock)
    waits(patience, clock, 0.1e-3, 30)
    assert patience.awake_s() == MOST
    patience.contended()
    assert patience.awake_s() == LEAST


@pytest.mark.skipif(find_library() is None, reason="the CPU kernels are not built")
class TestConnectionWatch:
    def test_a_change_ends_it(self) -> None:
        counters = [c_uint64(5), c_uint64(7)]
        read, write = os.pipe()
        try:
            watch = ConnectionWatch(counters, read)
            assert watch.watch([5, 8], [None, None], LONG_S) is Watched.CHANGED
            changer = threading.Timer(0.05, lambda: setattr(counters[1], "value", 8))
            changer.start()
            endings = [Watched.CONTENDED]
            until = time.monotonic() + LONG_S
            while endings[-1] is Watched.CONTENDED and time.monotonic() < until:  # a busy machine may end it early
                endings.append(watch.watch([5, 7], [None, None], LONG_S))
            assert endings[-1] is Watched.CHANGED
            changer.join()
        finally:
            os.close(read)
            os.close(write)

    def test_a_descriptor_or_the_time_ends_it(self) -> None:
        read, write = os.pipe()
        try:
            watch = ConnectionWatch([c_uint64(0)], read)
            assert watch.watch([0], [None], 1e-6) in (Watched.TIMEOUT, Watched.CONTENDED)
            os.write(write, b"x")
            assert watch.watch([0], [None], LONG_S) in (Watched.READY, Watched.CONTENDED)
        finally:
            os.close(read)
            os.close(write)
