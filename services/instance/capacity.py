"""How many rBlocks the cluster can hold for one request, judged over a while.

A request that can never fit is refused for good, so a moment's view must not decide it: a gManager that has just been
started knows no daemons yet, and a daemon that died is back within seconds. A request that came in between waits.
"""

from __future__ import annotations

from collections import deque

MEMORY_S = 60.0  # what the cluster had so recently it will have again
SETTLE_S = 30.0  # who has watched it for less may not have seen all of it: leases come back after an outage


class Capacity:
    """Blocks that other daemons' pools have for requests, as seen over time. ``now`` is of any monotonic clock."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._seen: deque[tuple[float, int]] = deque()  # (when, blocks): blocks descend, the first is the most

    def see(self, blocks: int, now: float) -> None:
        """A gManager says that all other daemons together can hold so many."""
        while self._seen and self._seen[-1][1] <= blocks:
            self._seen.pop()
        self._seen.append((now, blocks))

    def limit(self, now: float) -> int | None:
        """The most that others had lately; None while that is not known well enough to refuse anything."""
        if now - self._since < SETTLE_S:
            return None
        while len(self._seen) > 1 and now - self._seen[0][0] > MEMORY_S:
            self._seen.popleft()
        return self._seen[0][1] if self._seen else None
