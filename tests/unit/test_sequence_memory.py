"""Which blocks of a prompt stay where it is computed."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import pytest

from services.core.sequence import Request, SamplingParams, Sequence
from services.instance.sequence_memory import SequenceMemory
from services.rmanager.block_table import BlockTable


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize(("staying", "blocks"), [(0, 0), (0, 7), (7, 7), (1, 10), (4, 10), (9, 10), (500, 1358)])
def test_blocks_that_stay_are_spread_evenly(first: int, staying: int, blocks: int) -> None:
    request = Request("r", (1,), 1, SamplingParams(temperature=0.0, seed=1, max_tokens=1), 0.0, 1)
    reserved = range(first, first + blocks)
    memory = SequenceMemory(Sequence(request), BlockTable(64), [], deque(), reserved, staying)
    before = [memory.staying_before(index) for index in range(reserved.stop + 3)]
    assert before[: first + 1] == [0] * (first + 1)
    assert set(before[reserved.stop :]) == {staying}
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(before))
    for done in range(blocks + 1):  # of the prompt: the same share of it stays as of the whole
        assert abs(before[first + done] * blocks - done * staying) < max(1, blocks)
