"""Offers: blocks reserved for a while, for other daemons to fill on behalf of the session that reserved them.

Pure. What one ``reserve`` with a time to live has promised is one offer. A block leaves it when it is used (written,
sealed) or released; using one begins the time of the others anew. What is left when the time is over is due to be taken
back: then nobody has begun to write it, and nobody may from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from services.core.blocks import BlockHandle


@dataclass(slots=True, eq=False)
class _Offer:
    session_id: int
    ttl_s: float
    deadline: float
    blocks: dict[int, BlockHandle]


class Offers:
    """The offered blocks of one pool. Times are seconds of the ledger's clock."""

    def __init__(self) -> None:
        self._by_block: dict[int, _Offer] = {}
        self._offers: set[_Offer] = set()

    def add(self, session_id: int, handles: Sequence[BlockHandle], ttl_s: float, now: float) -> None:
        offer = _Offer(session_id, ttl_s, now + ttl_s, {handle.block: handle for handle in handles})
        if handles:
            self._offers.add(offer)
            self._by_block.update(dict.fromkeys(offer.blocks, offer))

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def blocks(self) -> Set[int]:
        return self._by_block.keys()

    def use(self, block: int, now: float) -> None:
        """The block is about to be filled: it is an offer no more, and its fellows get their whole time again."""
        offer = self._by_block.get(block)
        if offer is not None:
            offer.deadline = now + offer.ttl_s
            self.withdraw([block])

    def withdraw(self, blocks: Iterable[int]) -> None:
        """These blocks are offered no more, if they were."""
        for block in blocks:
            offer = self._by_block.pop(block, None)
            if offer is not None:
                del offer.blocks[block]
                if not offer.blocks:
                    self._offers.remove(offer)

    def take_due(self, now: float) -> list[tuple[int, BlockHandle]]:
        """Withdraws what has not been used in time: (session id, block) each."""
        due = [offer for offer in self._offers if offer.deadline <= now]
        taken = [(offer.session_id, handle) for offer in due for handle in offer.blocks.values()]
        self.withdraw([handle.block for _, handle in taken])
        return taken
