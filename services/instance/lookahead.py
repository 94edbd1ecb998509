"""How much memory will be wanted by requests that run together. Policy only: no blocks, no I/O.

Prompts that fit now may not fit a hundred tokens later, when all of them have grown: then some sit steps out, with
memory that serves nobody, or give way and are computed anew. So admission looks ahead, as in "Past-Future Scheduler for
LLM Serving under SLA Guarantees" (ASPLOS 2025): what requests hold together is greatest just before one of them ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Of a pool, what may be wanted at the worst. More than all of it: requests join while others end, so the worst seldom
# comes, and who gives way then is soon computed anew. With 1 a quarter of a pool lay idle under a full queue.
_MOST_OF_POOL = 1.5


class Growing(NamedTuple):
    """A request that runs, or is about to.

    Attributes:
        blocks: that it holds, or its prompt needs.
        tokens: still to come.
    """

    blocks: int
    tokens: int


def most_blocks(requests: Iterable[Growing], block_tokens: int) -> int:
    """The most blocks that these hold together at any time if nobody joins them.

    Each grows by a token a step and gives its blocks back when its tokens have come.
    """
    most = held = 0
    for count, request in enumerate(sorted(requests, key=lambda request: -request.tokens), 1):
        held += request.blocks  # of those that last as long as this one or longer, now
        most = max(most, held + count * (request.tokens // block_tokens))
    return most


def too_much_later(expected_blocks: int, peak_blocks: int, own_blocks: int, spare_blocks: int) -> bool:
    """Whether a request and those that run will want more memory together than there should be for them.

    Not so for who will be longer than the own pool: it depends on others' memory anyway, and takes what it can get.

    Args:
        expected_blocks: of the request, in the end.
        peak_blocks: of all of them at any time, if nobody joins.
        own_blocks: that requests can have in the own pool.
        spare_blocks: free on daemons whose own instance has no requests that wait.
    """
    return expected_blocks <= own_blocks and peak_blocks > _MOST_OF_POOL * own_blocks + spare_blocks
