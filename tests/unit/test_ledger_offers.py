"""Offers: room kept for a while, for other daemons to fill; and blocks that are read while they are copied."""

from __future__ import annotations

import itertools

import pytest
from ledger_pool import BLOCKS, GEOMETRY, OTHER, Pool, key

from services.core.errors import (
    GeometryMismatchError,
    InvalidRequestError,
    SessionRevokedError,
    StaleGenerationError,
)
from services.rmanager.ledger import Ledger


class TimedPool(Pool):
    """A pool whose time the test says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ledger = Ledger(BLOCKS * GEOMETRY.block_bytes, itertools.count(1).__next__, lambda: self.now)
        self.session = self.open("a")


@pytest.fixture
def pool() -> TimedPool:
    return TimedPool()


def test_what_is_not_used_in_time_is_free_again(pool: TimedPool) -> None:
    offered = pool.ledger.reserve(pool.session, 3, ttl_s=10)
    kept = pool.ledger.reserve(pool.session, 2)
    pool.now += 9.9
    assert pool.counts() == (BLOCKS - 5, 0, 0, 5, 0)
    pool.now += 0.2
    assert pool.counts() == (BLOCKS - 2, 0, 0, 2, 0)
    other = pool.ledger.reserve(pool.open("b"), BLOCKS)
    assert len(other) == BLOCKS - 2
    with pytest.raises(StaleGenerationError):
        pool.ledger.begin_write(pool.session, offered[0], on_behalf=True)
    pool.ledger.release(pool.session, [*offered, *kept])  # the session cannot have known
    assert pool.counts() == (2, 0, 0, BLOCKS - 2, 0)
    with pytest.raises(StaleGenerationError):
        pool.ledger.release(pool.session, offered)  # but it knows now


def test_late_writes_find_the_time_over_even_if_nobody_looked(pool: TimedPool) -> None:
    (block,) = pool.ledger.reserve(pool.session, 1, ttl_s=10)
    pool.now += 11
    with pytest.raises(StaleGenerationError):
        pool.ledger.begin_write(pool.session, block)


def test_each_use_begins_the_time_anew(pool: TimedPool) -> None:
    first, second, third = pool.ledger.reserve(pool.session, 3, ttl_s=10)
    other = pool.ledger.reserve(pool.session, 1, ttl_s=10)
    for block in (first, second):
        pool.now += 8
        pool.ledger.begin_write(pool.session, block, on_behalf=True)
        pool.ledger.finish_write(pool.session, block, None)
    pool.now += 9
    pool.ledger.begin_write(pool.session, third, on_behalf=True)
    pool.ledger.finish_write(pool.session, third, None)
    with pytest.raises(StaleGenerationError):
        pool.ledger.begin_write(pool.session, other[0], on_behalf=True)
    pool.now += 1000
    assert pool.counts() == (BLOCKS - 3, 0, 0, 3, 0)  # what was used lasts as long as the session


def test_a_filled_block_is_sealed_by_its_session(pool: TimedPool) -> None:
    (block,) = pool.ledger.reserve(pool.session, 1, ttl_s=10)
    pool.ledger.begin_write(pool.session, block, on_behalf=True)
    with pytest.raises(InvalidRequestError, match="being written"):
        pool.ledger.seal(pool.session, [block], [key(1)])
    assert pool.ledger.finish_write(pool.session, block, None) == block
    assert pool.ledger.attach(pool.session, [key(1)]) == []
    assert pool.ledger.seal(pool.session, [block], [key(1)]) == [block]
    assert pool.counts() == (BLOCKS - 1, 0, 0, 0, 1)


def test_others_may_fill_only_what_is_offered_and_only_once(pool: TimedPool) -> None:
    (mine,) = pool.ledger.reserve(pool.session, 1)
    (open_block,) = pool.ledger.reserve(pool.session, 1, workspace=True)
    (sealed,) = pool.sealed(1)
    offered, sealed_offer = pool.ledger.reserve(pool.session, 2, ttl_s=10)
    pool.ledger.begin_write(pool.session, offered, on_behalf=True)
    pool.ledger.finish_write(pool.session, offered, None)
    pool.ledger.seal(pool.session, [sealed_offer], [key(2)])
    for block in (mine, open_block, sealed, offered, sealed_offer):
        with pytest.raises(StaleGenerationError):
            pool.ledger.begin_write(pool.session, block, on_behalf=True)
    (foreign,) = pool.ledger.reserve(pool.open("b"), 1, ttl_s=10)
    with pytest.raises(StaleGenerationError):
        pool.ledger.begin_write(pool.session, foreign, on_behalf=True)


@pytest.mark.parametrize("ending", ["close", "hang up", "release"])
def test_the_right_to_fill_ends_with_what_it_came_from(pool: TimedPool, ending: str) -> None:
    session = pool.open("m", mapped=True)
    pool.ledger.begin_mapping(session)
    begun, idle = pool.ledger.reserve(session, 2, ttl_s=10)
    pool.ledger.begin_write(session, begun, on_behalf=True)
    if ending == "release":
        pool.ledger.release(session, [begun, idle])
    else:
        pool.ledger.close_session(session)
        pool.now += 11
        assert pool.counts() == (BLOCKS - 2, 0, 0, 2, 0), "the process may still look at them"
        if ending == "hang up":
            pool.ledger.hang_up(session)
    error = StaleGenerationError if ending == "release" else SessionRevokedError
    with pytest.raises(error):
        pool.ledger.begin_write(session, idle, on_behalf=True)
    with pytest.raises(error):
        pool.ledger.finish_write(session, begun, None)
    assert pool.counts() == ((BLOCKS - 2, 0, 0, 2, 0) if ending == "close" else (BLOCKS, 0, 0, 0, 0))


def test_impossible_times_are_refused(pool: TimedPool) -> None:
    for ttl_s in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidRequestError):
            pool.ledger.reserve(pool.session, 1, ttl_s=ttl_s)


def test_a_block_that_is_read_stays_what_it_is(pool: TimedPool) -> None:
    (block,) = pool.sealed(1)
    pool.ledger.begin_read(pool.session, block, key(1))
    pool.ledger.begin_read(pool.session, block, key(1))
    pool.ledger.close_session(pool.session)
    with pytest.raises(GeometryMismatchError):
        pool.open("b", geometry=OTHER)
    other = pool.open("b")
    assert len(pool.ledger.reserve(other, BLOCKS)) == BLOCKS - 1
    pool.ledger.finish_read(block.block)
    assert pool.counts() == (0, 0, 0, BLOCKS - 1, 1)
    pool.ledger.finish_read(block.block)
    assert pool.counts() == (0, 1, 0, BLOCKS - 1, 0)
    assert pool.ledger.attach(other, [key(1)]) == [(0, block)]


def test_only_what_the_session_holds_can_be_read(pool: TimedPool) -> None:
    (block,) = pool.sealed(1)
    (reserved,) = pool.ledger.reserve(pool.session, 1)
    for session, handle, content in (
        (pool.open("b"), block, key(1)),
        (pool.session, block, key(2)),
        (pool.session, reserved, key(1)),
        (4711, block, key(1)),
    ):
        with pytest.raises(StaleGenerationError):
            pool.ledger.begin_read(session, handle, content)
