"""What requests that run together will want, against growing them token by token."""

import random

from services.core.sequence import Request, SamplingParams, Sequence
from services.instance.lookahead import Growing, OutputLengths, most_blocks


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


def ended(max_tokens: int, generated: int) -> Sequence:
    tokens = tuple(range(5 + generated))
    return Sequence(Request("r", tokens, 5, SamplingParams(0.0, 0, max_tokens), 0.0, 1))


def test_outputs_are_expected_to_be_as_long_as_those_before():
    lengths = OutputLengths()
    assert lengths.to_come(ended(4000, 0)) == 0, "nothing is known yet"
    lengths.ended(ended(4000, 400))
    assert lengths.to_come(ended(1000, 0)) == 100
    assert lengths.to_come(ended(1000, 30)) == 70
    assert lengths.to_come(ended(1000, 500)) == 0, "longer than expected already"
    lengths.ended(ended(0, 0))  # a prompt that was scored says nothing of outputs
    assert lengths.to_come(ended(1000, 0)) == 100
    for _ in range(100):
        lengths.ended(ended(300, 300))
    assert lengths.to_come(ended(1000, 0)) > 990
