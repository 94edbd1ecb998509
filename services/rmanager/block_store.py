"""The blocks of one pool, one by one: state, generation, number of users, and the indexes that find them.

Knows nothing of sessions; ``Ledger`` says who the users are. A *user* is one hold of a session, or a write under way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum

from services.core.blocks import BlockHandle


class BlockState(Enum):
    FREE = "free"
    RESERVED = "reserved"  # promised or open: written by its one owner
    SEALED = "sealed"  # full and immutable; cached if it has no users


class _Block:
    """One block. Invariants: FREE has no users, RESERVED has no key."""

    __slots__ = ("generation", "key", "state", "users")

    def __init__(self, generation: int) -> None:
        self.state = BlockState.FREE
        self.generation = generation
        self.users = 0
        self.key = b""


class BlockStore:
    """All blocks of a pool. Every transition is O(1)."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._free: list[int] = []  # taken from the end
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_key: dict[bytes, int] = {}  # sealed blocks
        self._first_generation = 0  # of the next format's blocks: above all that were ever given away
        self._reserved = 0

    @property
    def total(self) -> int:
        return len(self._blocks)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def reserved(self) -> int:
        return self._reserved

    @property
    def in_use(self) -> int:
        """Sealed blocks with users."""
        return self.total - self.free - self.cached - self._reserved

    def format(self, total: int) -> None:
        """Starts again with ``total`` free blocks. No block may have users; cached ones are forgotten."""
        assert self.free + self.cached == self.total
        self._first_generation = max((block.generation for block in self._blocks), default=self._first_generation)
        self._blocks = [_Block(self._first_generation) for _ in range(total)]
        self._free = list(range(total - 1, -1, -1))
        self._cached.clear()
        self._by_key.clear()

    def state(self, index: int) -> BlockState:
        return self._blocks[index].state

    def key(self, index: int) -> bytes:
        """What a sealed block holds."""
        return self._blocks[index].key

    def handle(self, index: int) -> BlockHandle:
        return BlockHandle(index, self._blocks[index].generation)

    def find(self, key: bytes) -> int | None:
        """The block sealed under ``key``."""
        return self._by_key.get(key)

    def take(self) -> BlockHandle:
        """Gives a block away, with one user: a free one, else the least recently used cached one. One must be there."""
        if self._free:
            index = self._free.pop()
            block = self._blocks[index]
        else:
            index, _ = self._cached.popitem(last=False)
            block = self._blocks[index]
            del self._by_key[block.key]
            block.key = b""
        block.state = BlockState.RESERVED
        # u32 on the wire. A message would have to outlive four billion owners of one block to be mistaken.
        block.generation = (block.generation + 1) & 0xFFFFFFFF
        block.users = 1
        self._reserved += 1
        return BlockHandle(index, block.generation)

    def seal(self, index: int, key: bytes) -> None:
        """RESERVED -> SEALED; no other block may have the key. The users stay."""
        block = self._blocks[index]
        assert block.state is BlockState.RESERVED
        assert key not in self._by_key
        self._reserved -= 1
        block.state = BlockState.SEALED
        block.key = key
        self._by_key[key] = index

    def add_user(self, index: int) -> None:
        """One more user of a block that is not free; a cached block is in use again."""
        block = self._blocks[index]
        assert block.state is not BlockState.FREE
        block.users += 1
        if block.users == 1:
            del self._cached[index]

    def drop_user(self, index: int) -> None:
        """One user less; without users a sealed block is cached, as the most recently used, and a reserved one free."""
        block = self._blocks[index]
        assert block.users > 0
        block.users -= 1
        if block.users:
            return
        if block.state is BlockState.SEALED:
            self._cached[index] = None
        else:
            self._reserved -= 1
            block.state = BlockState.FREE
            self._free.append(index)

    def violations(self, users: Mapping[int, int]) -> list[str]:
        """Counts everything again.

        Args:
            users: block -> number of users, as those who use them believe; blocks without users may be missing.
        """
        found = [f"block {index} has users but does not exist" for index in users if not 0 <= index < self.total]
        free = set(self._free)
        if len(free) != len(self._free):
            found.append("a block is in the free list twice")
        for index, block in enumerate(self._blocks):
            expected = users.get(index, 0)
            name = f"block {index} ({block.state.value})"
            if block.users != expected:
                found.append(f"{name} counts {block.users} users, but has {expected}")
            if (block.state is BlockState.FREE) != (index in free):
                found.append(f"{name} and the free list disagree")
            if (block.state is BlockState.SEALED and block.users == 0) != (index in self._cached):
                found.append(f"{name} with {block.users} users and the list of cached blocks disagree")
            if block.state is BlockState.SEALED and self._by_key.get(block.key) != index:
                found.append(f"{name} is not found by its key")
            if block.state is not BlockState.SEALED and block.key:
                found.append(f"{name} has a key")
            if block.state is BlockState.RESERVED and not block.users:
                found.append(f"{name} has no owner")
        states = [block.state for block in self._blocks]
        for name, believed, counted in (
            ("keys", len(self._by_key), states.count(BlockState.SEALED)),
            ("reserved blocks", self._reserved, states.count(BlockState.RESERVED)),
        ):
            if believed != counted:
                found.append(f"{counted} {name} counted, {believed} expected")
        return found
