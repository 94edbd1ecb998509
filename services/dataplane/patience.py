"""For how long to stay awake while waiting.

To be woken from sleep takes tens of microseconds, more on a virtual machine: as long as a layer's attention may take
itself. To stay awake costs nothing but the core's time. So a wait begins awake, for long if what was waited for lately
came soon, as the queries of a step's layers do, and for a moment otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kernels.cpu.answering import Watched
from kernels.cpu.asking import CompiledAsker

_WEIGHT = 1 / 8  # of the newest wait in the average
_MOST_TIMES = 32  # after which it is what the newest waits were


class Patience:
    """One waiting thread's.

    Args:
        least_s, most_s: how long to stay awake; the longer where waits have lately been shorter than it.
        clock: seconds.
    """

    def __init__(self, least_s: float, most_s: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._clock = clock
        self._longest_s = 4 * most_s  # that counts: after a pause, a dozen soon arrivals are enough to be awake again
        self._average_s = self._longest_s
        self._since: float | None = None

    def awake_s(self) -> float:
        """For how long to stay awake now. A wait begins with this, if none has begun."""
        if self._since is None:
            self._since = self._clock()
        return self.next_awake_s

    @property
    def next_awake_s(self) -> float:
        """For how long a wait should be awake that begins now."""
        return self._most_s if self._average_s < self._most_s else self._least_s

    def arrived(self, times: int = 1) -> None:
        """Something has come, so many times since the wait began, which is over."""
        if times and self._since is not None:
            self._learn(self._clock() - self._since, times)
            self._since = None

    def learn_from(self, asker: CompiledAsker) -> None:
        """Compiled code has waited for answers, one after the other; no wait has begun here."""
        exchanged = asker.exchanged
        if exchanged.answers:
            self._learn(exchanged.waits_s, exchanged.answers)
        if asker.ending is Watched.CONTENDED:
            self.contended()

    def _learn(self, seconds: float, times: int) -> None:
        """Of so many waits, all together as long as that."""
        for _ in range(min(times, _MOST_TIMES)):
            self._average_s += _WEIGHT * (min(seconds / times, self._longest_s) - self._average_s)

    def contended(self) -> None:
        """Others want the core: it takes a while until it pays again to stay awake."""
        self._average_s = self._longest_s
