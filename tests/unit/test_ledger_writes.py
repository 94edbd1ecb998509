"""The ledger while content is written over the data plane: the copy runs outside the lock."""

from __future__ import annotations

import pytest
from ledger_pool import BLOCKS, OTHER, Pool, key

from services.core.blocks import BlockHandle
from services.core.errors import (
    GeometryMismatchError,
    InvalidRequestError,
    SessionRevokedError,
    StaleGenerationError,
)


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_write_seals_with_one_hold(pool: Pool) -> None:
    (block,) = pool.ledger.reserve(pool.session, 1)
    pool.ledger.begin_write(pool.session, block)
    assert pool.ledger.finish_write(pool.session, block, key(1)) == block
    pool.ledger.release(pool.session, [block])
    assert pool.counts() == (BLOCKS - 1, 1, 0, 0, 0)


def test_write_that_adopts_gives_its_own_block_back(pool: Pool) -> None:
    (first,) = pool.sealed(1)
    (block,) = pool.ledger.reserve(pool.session, 1)
    pool.ledger.begin_write(pool.session, block)
    assert pool.ledger.finish_write(pool.session, block, key(1)) == first
    assert pool.counts() == (BLOCKS - 1, 0, 0, 0, 1)


def test_write_needs_a_reserved_block_of_the_session(pool: Pool) -> None:
    (sealed,) = pool.sealed(1)
    (foreign,) = pool.ledger.reserve(pool.open("b"), 1)
    (block,) = pool.ledger.reserve(pool.session, 1)
    for handle in (sealed, foreign, BlockHandle(block.block, block.generation + 1)):
        with pytest.raises(StaleGenerationError):
            pool.ledger.begin_write(pool.session, handle)
    pool.ledger.begin_write(pool.session, block)
    with pytest.raises(InvalidRequestError, match="being written"):
        pool.ledger.begin_write(pool.session, block)
    with pytest.raises(InvalidRequestError, match="being written"):
        pool.ledger.seal(pool.session, [block], [key(2)])
    pool.ledger.finish_write(pool.session, block, key(3))
    pool.counts()


@pytest.mark.parametrize("ending", ["close", "supersede", "release"])
def test_block_under_a_write_is_given_to_nobody(pool: Pool, ending: str) -> None:
    other = pool.open("b")
    (block,) = pool.ledger.reserve(pool.session, 1)
    pool.ledger.begin_write(pool.session, block)
    if ending == "close":
        pool.ledger.close_session(pool.session)
    elif ending == "supersede":
        pool.open("a", epoch=2)
    else:
        pool.ledger.release(pool.session, [block])
    taken = pool.ledger.reserve(other, BLOCKS)
    assert block.block not in [handle.block for handle in taken]
    assert pool.counts() == (0, 0, 0, BLOCKS, 0)
    with pytest.raises(StaleGenerationError if ending == "release" else SessionRevokedError):
        pool.ledger.finish_write(pool.session, block, key(1))
    assert pool.counts() == (1, 0, 0, BLOCKS - 1, 0)
    assert pool.ledger.attach(other, [key(1)]) == []


def test_block_under_a_write_prevents_a_format(pool: Pool) -> None:
    (block,) = pool.ledger.reserve(pool.session, 1)
    pool.ledger.begin_write(pool.session, block)
    pool.ledger.close_session(pool.session)
    with pytest.raises(GeometryMismatchError):
        pool.open("b", geometry=OTHER)
    with pytest.raises(SessionRevokedError):
        pool.ledger.finish_write(pool.session, block, key(1))
    pool.open("b", geometry=OTHER)
