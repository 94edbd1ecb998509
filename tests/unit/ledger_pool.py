"""A ledger of eight blocks, for its tests."""

from __future__ import annotations

import itertools

from services.core.blocks import BlockHandle, PoolGeometry
from services.rmanager.ledger import Ledger

GEOMETRY = PoolGeometry(layers=1, kv_heads=1, block_tokens=4, head_dim=2, dtype="float32")
OTHER = PoolGeometry(layers=2, kv_heads=1, block_tokens=4, head_dim=2, dtype="float32")
BLOCKS = 8


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Pool:
    """A ledger of eight blocks with one open session."""

    def __init__(self) -> None:
        self.ledger = Ledger(BLOCKS * GEOMETRY.block_bytes + 5, itertools.count(1).__next__)
        self.session = self.open("a")

    def open(self, instance: str, epoch: int = 1, geometry: PoolGeometry = GEOMETRY, mapped: bool = False) -> int:
        return self.ledger.open_session(instance, epoch, geometry, mapped).session_id

    def sealed(self, *numbers: int, session: int | None = None) -> list[BlockHandle]:
        """Blocks sealed under the keys of these numbers, held once by the session."""
        session = self.session if session is None else session
        handles = self.ledger.reserve(session, len(numbers), len(numbers))
        return self.ledger.seal(session, handles, [key(number) for number in numbers])

    def counts(self) -> tuple[int, int, int, int, int]:
        """free, cached, workspace, reserved, in_use; checked against a recount."""
        assert self.ledger.check_integrity() == []
        stats = self.ledger.stats()
        counts = (stats.free, stats.cached, stats.workspace, stats.reserved, stats.in_use)
        assert sum(counts) == stats.total
        return counts
