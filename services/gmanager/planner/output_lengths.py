"""How much output a running request is still expected to generate. Pure.

Requests differ by kind and hour, so what counts is the outputs that ended lately, as they were: nothing is assumed of
their distribution. Given that a request has generated ``g`` tokens already, its whole output is expected to be the mean
of those that were longer than ``g``, none of them counted as longer than the request may become.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from itertools import accumulate

_REMEMBERED = 1000
_ENOUGH = 10  # outputs, for a mean


class OutputLengths:
    """Lengths of the outputs that ended lately, in tokens."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=_REMEMBERED)
        self._sorted: list[int] | None = []  # None: to be made anew
        self._sums = [0]  # of the first k of them

    def ended(self, tokens: int) -> None:
        """A request has ended after generating ``tokens`` tokens."""
        self._recent.append(tokens)
        self._sorted = None

    def remaining(self, generated: int, at_most: int) -> int:
        """Tokens still to be expected of a request that has generated ``generated`` and may generate ``at_most`` more.

        Where too few outputs were longer, as many as there have been so far: what is long already tends to be longer.
        """
        if self._sorted is None:
            self._sorted = sorted(self._recent)
            self._sums = [0, *accumulate(self._sorted)]
        longer = bisect_right(self._sorted, generated)
        number = len(self._sorted) - longer
        if number < _ENOUGH:
            return min(max(1, generated), at_most)
        limit = generated + at_most
        beyond = bisect_right(self._sorted, limit)
        whole = self._sums[beyond] - self._sums[longer] + limit * (len(self._sorted) - beyond)
        return min(-(-whole // number) - generated, at_most)
