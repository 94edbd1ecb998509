"""What requests that run together will want, against growing them token by token."""

import random

from services.instance.lookahead import Growing, most_blocks


def grown(requests: list[Growing], block_tokens: int) -> int:
    """The most blocks held after any number of steps; each begins with full blocks."""
    longest = max((request.tokens for request in requests), default=0)
    return max(
        sum(request.blocks + step // block_tokens for request in requests if request.tokens >= step)
        for step in range(longest + 1)
    )


def test_the_most_that_requests_hold_is_what_growing_them_comes_to():
    draw = random.Random(7)
    for _ in range(300):
        requests = [Growing(draw.randint(0, 20), draw.randint(0, 100)) for _ in range(draw.randint(0, 12))]
        size = draw.choice([1, 7, 16])
        assert most_blocks(requests, size) == grown(requests, size)


def test_who_ends_early_makes_room_for_who_grows():
    assert most_blocks([Growing(10, 16), Growing(10, 160)], 16) == 22
    assert most_blocks([Growing(10, 160), Growing(10, 160)], 16) == 40
    assert most_blocks([], 16) == 0
