"""Where an instance finds blocks beside its own: nowhere, or with all the others. The rules are the rManager's."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from services.core.sequence import RequestAge
from services.rmanager.lenders import shares


class Pool:
    """One daemon's blocks, those of the workspace not among them."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.free = blocks

    def take(self, blocks: int) -> None:
        assert 0 <= blocks <= self.free, f"{blocks} of {self.free} free blocks"
        self.free -= blocks

    def give(self, blocks: int) -> None:
        assert 0 <= blocks <= self.blocks - self.free, "more comes back than was taken"
        self.free += blocks


class Grant(NamedTuple):
    """Blocks that an instance's daemon has reserved."""

    instance: int
    blocks: int


class Lending(Protocol):
    """What an instance asks of the others."""

    pooled: bool

    def most_blocks(self, debtor: int) -> int:
        """That one request can ever have."""

    def borrow(self, debtor: int, blocks: int, spare_wanted: bool = False) -> list[Grant]:
        """Up to so many blocks, taken already; ``spare_wanted``: not of instances whose own requests wait."""

    def spare_blocks(self, debtor: int) -> int:
        """Free on the others, those whose own requests wait left out."""

    def waits(self, instance: int, waiting: bool) -> None:
        """Whether requests of the instance wait."""

    def starves(self, instance: int, oldest: RequestAge | None) -> None:
        """The instance's oldest request that cannot go on for want of blocks."""

    def oldest_starving(self) -> RequestAge | None:
        """Of all instances: everybody younger leaves it what comes free."""


class NoLending:
    """Every instance is on its own."""

    pooled = False

    def __init__(self, pools: list[Pool]) -> None:
        self._pools = pools

    def most_blocks(self, debtor: int) -> int:
        return self._pools[debtor].blocks

    def borrow(self, debtor: int, blocks: int, spare_wanted: bool = False) -> list[Grant]:
        return []

    def spare_blocks(self, debtor: int) -> int:
        return 0

    def waits(self, instance: int, waiting: bool) -> None:
        """Nobody else cares."""

    def starves(self, instance: int, oldest: RequestAge | None) -> None:
        """Nobody else cares."""

    def oldest_starving(self) -> RequestAge | None:
        return None


class PooledMemory:
    """Every instance borrows from all others, as ``services.instance.rmanager`` does."""

    pooled = True

    def __init__(self, pools: list[Pool]) -> None:
        self._pools = pools
        self._blocks = sum(pool.blocks for pool in pools)
        self._waiting: set[int] = set()
        self._starving: dict[int, RequestAge] = {}
        self._oldest: RequestAge | None = None

    def most_blocks(self, debtor: int) -> int:
        return self._blocks

    def spare_blocks(self, debtor: int) -> int:
        spared = self._waiting | {debtor}
        return sum(pool.free for index, pool in enumerate(self._pools) if index not in spared)

    def waits(self, instance: int, waiting: bool) -> None:
        (self._waiting.add if waiting else self._waiting.discard)(instance)

    def borrow(self, debtor: int, blocks: int, spare_wanted: bool = False) -> list[Grant]:
        """Of those that the rManager asks."""
        spared = self._waiting if spare_wanted else ()
        rooms = [
            (-pool.free, index)
            for index, pool in enumerate(self._pools)
            if index != debtor and pool.free and index not in spared
        ]
        rooms.sort()
        grants = []
        for (_, index), share in zip(rooms, shares(blocks, [-room for room, _ in rooms]), strict=True):
            if share:
                self._pools[index].take(share)
                grants.append(Grant(index, share))
        return grants

    def starves(self, instance: int, oldest: RequestAge | None) -> None:
        before = self._starving.get(instance)
        if before == oldest:
            return
        if oldest is None:
            del self._starving[instance]
        else:
            self._starving[instance] = oldest
        if before is not None and before == self._oldest:
            self._oldest = min(self._starving.values(), default=None)
        elif oldest is not None and (self._oldest is None or oldest < self._oldest):
            self._oldest = oldest

    def oldest_starving(self) -> RequestAge | None:
        return self._oldest
