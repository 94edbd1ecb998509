"""Which daemons could host more, the one with most to lend first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from services.core.blocks import PoolGeometry
from services.gmanager.planner.state import Daemon, Instance, State

_TRIES = 8  # offers of one sort that a debtor looks at


class Market:
    """Creditors by what they can lend, those with an instance and those without apart: their rates differ.

    Entries that no longer hold are put right when they come up; ``offer`` must be called when a daemon gains room.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        # Of (-lendable, kvdaemon id).
        self._heaps: dict[tuple[PoolGeometry, bool], list[tuple[int, str]]] = {}
        for daemon in state.daemons.values():
            lendable = self.lendable(daemon)
            if lendable > 0:
                self._heap(daemon.geometry, daemon.owner is not None).append((-lendable, daemon.id))
        for heap in self._heaps.values():
            heapq.heapify(heap)

    def lendable(self, daemon: Daemon) -> int:
        """Blocks that it can take; 0 if it is not to take any.

        Who borrows does not lend, who is short of memory does not either, nor who has not been heard of.
        """
        owner = daemon.owner
        if not daemon.fresh or (owner is not None and (not owner.fresh or owner.borrows or owner.pressed)):
            return 0
        reserve = math.ceil(self._state.policy.reserve * daemon.load.total_blocks)
        return max(0, (daemon.free if owner is None else owner.unclaimed) - reserve)

    def offer(self, daemon: Daemon) -> None:
        """The daemon may have more to lend than before."""
        lendable = self.lendable(daemon)
        if lendable > 0:
            heapq.heappush(self._heap(daemon.geometry, daemon.owner is not None), (-lendable, daemon.id))

    def offers(self, debtor: Instance, mapped: bool) -> Iterator[Daemon]:
        """Creditors for one debtor, most to lend first; ``mapped``: those with an instance of their own, or those
        without. The state must not change meanwhile."""
        heap = self._heap(debtor.home.geometry, mapped)
        seen: dict[str, int] = {}
        try:
            while heap and len(seen) < _TRIES:
                lendable, kvdaemon_id = heapq.heappop(heap)
                if kvdaemon_id in seen:
                    continue
                daemon = self._state.daemons[kvdaemon_id]
                now = -self.lendable(daemon)
                if now != lendable:
                    if now < 0:
                        heapq.heappush(heap, (now, kvdaemon_id))
                    continue
                seen[kvdaemon_id] = lendable
                crowded = len(daemon.debtors) >= self._state.policy.max_debtors and debtor not in daemon.debtors
                if daemon is not debtor.home and not crowded:
                    yield daemon
        finally:
            for kvdaemon_id, lendable in seen.items():
                heapq.heappush(heap, (lendable, kvdaemon_id))

    def _heap(self, geometry: PoolGeometry, mapped: bool) -> list[tuple[int, str]]:
        return self._heaps.setdefault((geometry, mapped), [])
