"""What one admitted sequence holds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from services.core.blocks import BlockHandle, BlockRef
from services.core.sequence import Sequence
from services.rmanager.block_table import BlockTable


@dataclass(slots=True, eq=False)
class SequenceMemory:
    """Written by the engine thread.

    Attributes:
        local: open local blocks reserved for its prompt and not used yet.
        remote: blocks reserved elsewhere for its prompt and not shipped to yet, in filling order.
        reserved: block indices of the prompt that ``local`` and ``remote`` are for.
        staying: how many of those stay here, spread evenly: then no side's attention is far longer than the other's,
            however much of the prompt has been computed.
    """

    sequence: Sequence
    table: BlockTable
    local: list[BlockHandle]
    remote: deque[BlockRef]
    reserved: range
    staying: int

    def staying_before(self, index: int) -> int:
        """How many of the blocks before ``index`` were reserved here."""
        at = min(max(index, self.reserved.start), self.reserved.stop) - self.reserved.start
        return at * self.staying // len(self.reserved) if self.reserved else 0
