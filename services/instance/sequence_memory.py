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
        first_local: block index from which the prompt's blocks stay here.
    """

    sequence: Sequence
    table: BlockTable
    local: list[BlockHandle]
    remote: deque[BlockRef]
    first_local: int
