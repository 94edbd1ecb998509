"""Of whom to borrow: pure, so that a simulator asks it as well."""

from __future__ import annotations

from collections.abc import Sequence

FEW = 4  # lenders that compute a request's attention side by side, though fewer would have room
LEAST = 4  # blocks of each of them: attention over less takes no longer than a message


def shares(blocks: int, free: Sequence[int]) -> list[int]:
    """How many of ``blocks`` blocks to ask of each lender; less than ``blocks`` in all where there is not enough room.

    Every lender takes a copy of each query and sends a partial state back, so a request has as few as hold it, or a few
    that share the work. They are those with most room, and give in proportion to it.

    Args:
        free: blocks that each has, most first.
    """
    lenders, room = 0, 0
    few = min(FEW, blocks // LEAST)
    while lenders < len(free) and (room < blocks or lenders < few):
        room += free[lenders]
        lenders += 1
    asked, left = [0] * len(free), min(blocks, room)
    for at in range(lenders):
        asked[at] = min(free[at], -(-blocks * free[at] // room), left) if room else 0
        left -= asked[at]
    return asked
