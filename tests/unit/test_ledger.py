"""Every rule of the ledger, one by one."""

from __future__ import annotations

import itertools

import pytest
from ledger_pool import BLOCKS, GEOMETRY, OTHER, Pool, key

from services.core.blocks import BlockHandle
from services.core.errors import (
    ConfigError,
    GeometryMismatchError,
    InvalidRequestError,
    PoolExhaustedError,
    SessionRevokedError,
    StaleGenerationError,
)
from services.rmanager.holder import Session
from services.rmanager.ledger import Ledger


@pytest.fixture
def pool() -> Pool:
    return Pool()


# Sessions and formats.


def test_first_session_formats_the_pool() -> None:
    ledger = Ledger(BLOCKS * GEOMETRY.block_bytes + 5, itertools.count(1).__next__)
    assert ledger.geometry is None
    assert (ledger.stats().total, ledger.stats().block_bytes) == (0, 0)
    assert ledger.open_session("a", 7, GEOMETRY, mapped=True) == Session(1, "a", 7, True)
    assert ledger.geometry == GEOMETRY
    assert (ledger.stats().total, ledger.stats().block_bytes) == (BLOCKS, GEOMETRY.block_bytes)


def test_pool_smaller_than_a_block_is_refused() -> None:
    ledger = Ledger(GEOMETRY.block_bytes - 1, itertools.count(1).__next__)
    with pytest.raises(ConfigError, match="smaller than one block"):
        ledger.open_session("a", 1, GEOMETRY, mapped=False)
    assert ledger.geometry is None


def test_other_geometry_is_refused_while_blocks_are_held(pool: Pool) -> None:
    handles = pool.ledger.reserve(pool.session, 1)
    with pytest.raises(GeometryMismatchError):
        pool.open("b", geometry=OTHER)
    assert not pool.ledger.revoked(pool.session)
    pool.ledger.release(pool.session, handles)
    pool.open("b", geometry=OTHER)
    assert pool.ledger.geometry == OTHER
    assert pool.ledger.revoked(pool.session), "an open session of the old shape must not go on"


def test_format_forgets_cached_blocks_and_repeats_no_generation(pool: Pool) -> None:
    for _ in range(3):
        pool.ledger.release(pool.session, pool.ledger.reserve(pool.session, BLOCKS))
    (old,) = pool.sealed(1)
    pool.ledger.release(pool.session, [old])
    session = pool.open("b", geometry=OTHER)
    assert pool.counts() == (BLOCKS // 2, 0, 0, 0, 0)
    assert pool.ledger.attach(session, [key(1)]) == []
    new = pool.ledger.reserve(session, BLOCKS)
    assert min(handle.generation for handle in new) > old.generation


def test_format_ends_with_the_instances_own_earlier_holds(pool: Pool) -> None:
    pool.sealed(1)
    session = pool.open("a", epoch=2, geometry=OTHER)
    assert pool.ledger.revoked(pool.session)
    assert not pool.ledger.revoked(session)


def test_later_epoch_revokes_and_earlier_is_refused(pool: Pool) -> None:
    pool.sealed(1)
    pool.ledger.reserve(pool.session, 2)
    second = pool.open("a", epoch=2)
    assert pool.ledger.revoked(pool.session)
    assert pool.counts() == (BLOCKS - 1, 1, 0, 0, 0)
    with pytest.raises(SessionRevokedError, match="epoch 2"):
        pool.open("a", epoch=1)
    assert not pool.ledger.revoked(second)
    third = pool.open("a", epoch=2)  # the same process opens again
    assert pool.ledger.revoked(second)
    assert not pool.ledger.revoked(third)
    assert not pool.ledger.revoked(pool.open("b", epoch=1)), "epochs of different instances have nothing to do"


def test_session_ids_are_unique() -> None:
    drawn = iter([5, 5, 5, 6])
    ledger = Ledger(1000, lambda: next(drawn))
    ids = {ledger.open_session(name, 1, GEOMETRY, mapped=False).session_id for name in "ab"}
    assert ids == {5, 6}


def test_everything_is_refused_to_a_session_that_is_over(pool: Pool) -> None:
    (held,) = pool.sealed(1)
    pool.ledger.close_session(pool.session)
    pool.ledger.close_session(pool.session)
    calls = (
        lambda: pool.ledger.reserve(pool.session, 1),
        lambda: pool.ledger.seal(pool.session, [held], [key(1)]),
        lambda: pool.ledger.attach(pool.session, [key(1)]),
        lambda: pool.ledger.release(pool.session, [held]),
        lambda: pool.ledger.begin_write(pool.session, held),
        lambda: pool.ledger.begin_mapping(pool.session),
    )
    for call in calls:
        with pytest.raises(SessionRevokedError):
            call()
    assert not pool.ledger.readable(pool.session, held)
    assert pool.ledger.revoked(12345), "a session that never was"


# Mapped sessions.


def test_mapped_session_keeps_its_blocks_until_the_hang_up(pool: Pool) -> None:
    mapped = pool.open("m", mapped=True)
    pool.ledger.begin_mapping(mapped)
    pool.ledger.reserve(mapped, 2, workspace=True)
    (held,) = pool.sealed(1, session=mapped)
    pool.ledger.close_session(mapped)
    assert pool.ledger.revoked(mapped)
    assert not pool.ledger.readable(mapped, held)
    assert pool.counts() == (BLOCKS - 3, 0, 2, 0, 1)
    pool.ledger.hang_up(mapped)
    assert pool.counts() == (BLOCKS - 1, 1, 0, 0, 0)
    pool.ledger.hang_up(mapped)


def test_hang_up_ends_a_session_that_is_open(pool: Pool) -> None:
    mapped = pool.open("m", mapped=True)
    pool.ledger.begin_mapping(mapped)
    pool.ledger.reserve(mapped, 2)
    pool.ledger.hang_up(mapped)
    assert pool.ledger.revoked(mapped)
    assert pool.counts() == (BLOCKS, 0, 0, 0, 0)
    pool.ledger.close_session(mapped)


def test_mapped_session_that_never_got_the_memory_is_dropped_at_once(pool: Pool) -> None:
    mapped = pool.open("m", mapped=True)
    pool.ledger.reserve(mapped, 2)
    pool.ledger.close_session(mapped)
    assert pool.counts() == (BLOCKS, 0, 0, 0, 0)


def test_blocks_of_a_lingering_mapping_prevent_a_format(pool: Pool) -> None:
    mapped = pool.open("m", mapped=True)
    pool.ledger.begin_mapping(mapped)
    pool.ledger.reserve(mapped, 1)
    with pytest.raises(GeometryMismatchError):
        pool.open("m", epoch=2, geometry=OTHER)
    successor = pool.open("m", epoch=2)
    assert len(pool.ledger.reserve(successor, BLOCKS)) == BLOCKS - 1, "the dead writer's block is not given away"


def test_only_mapped_sessions_get_the_memory(pool: Pool) -> None:
    with pytest.raises(InvalidRequestError, match="mapped"):
        pool.ledger.begin_mapping(pool.session)


# Reserve.


def test_reserve_takes_free_blocks_first_and_counts_workspace(pool: Pool) -> None:
    pool.ledger.release(pool.session, pool.sealed(1))
    pool.ledger.reserve(pool.session, 3, 3, workspace=True)
    pool.ledger.reserve(pool.session, 4, 4)
    assert pool.counts() == (0, 1, 3, 4, 0)


def test_a_workspace_is_a_number_of_blocks_whichever_they_are(pool: Pool) -> None:
    first, second = pool.ledger.reserve(pool.session, 2, workspace=True)
    (tail,) = pool.ledger.reserve(pool.session, 1)
    stats = pool.ledger.stats()
    assert (stats.workspace, stats.reserved) == (2, 1)
    pool.ledger.seal(pool.session, [first], [key(1)])
    stats = pool.ledger.stats()
    assert (stats.workspace, stats.reserved, stats.in_use) == (2, 0, 1), "what was a request's has taken its place"
    pool.ledger.release(pool.session, [second])
    assert pool.ledger.stats().workspace == 1
    pool.ledger.release(pool.session, [tail, first])
    assert pool.ledger.stats().workspace == 0
    assert pool.ledger.check_integrity() == []


def test_reserve_evicts_the_least_recently_used(pool: Pool) -> None:
    blocks = pool.sealed(*range(BLOCKS))
    pool.ledger.release(pool.session, blocks)
    pool.ledger.release(pool.session, [handle for _, handle in pool.ledger.attach(pool.session, [key(0)])])
    taken = pool.ledger.reserve(pool.session, 2)
    assert [handle.block for handle in taken] == [blocks[1].block, blocks[2].block]
    assert [handle.generation for handle in taken] == [blocks[1].generation + 1, blocks[2].generation + 1]
    found = pool.ledger.attach(pool.session, [key(number) for number in range(BLOCKS)])
    assert [index for index, _ in found] == [0, 3, 4, 5, 6, 7]


def test_tail_released_first_is_evicted_first(pool: Pool) -> None:
    blocks = pool.sealed(*range(BLOCKS))
    pool.ledger.release(pool.session, blocks[::-1])
    pool.ledger.reserve(pool.session, 3)
    found = pool.ledger.attach(pool.session, [key(number) for number in range(BLOCKS)])
    assert [index for index, _ in found] == [0, 1, 2, 3, 4]


def test_closing_a_session_keeps_prefixes_longest(pool: Pool) -> None:
    pool.sealed(*range(BLOCKS))
    pool.ledger.close_session(pool.session)
    session = pool.open("b")
    pool.ledger.reserve(session, 3)
    found = pool.ledger.attach(session, [key(number) for number in range(BLOCKS)])
    assert [index for index, _ in found] == [0, 1, 2, 3, 4]


def test_reserve_gives_what_there_is_or_nothing(pool: Pool) -> None:
    held = pool.ledger.reserve(pool.session, 5)
    assert len(pool.ledger.reserve(pool.session, 5, 3)) == 3
    with pytest.raises(PoolExhaustedError, match="asked for 1 blocks; 0 are free and 0 can be evicted of 8"):
        pool.ledger.reserve(pool.session, 1, 1)
    assert pool.ledger.reserve(pool.session, 1, 0) == []
    pool.ledger.release(pool.session, held[:2])
    with pytest.raises(PoolExhaustedError):
        pool.ledger.reserve(pool.session, 5, 3)
    assert pool.counts() == (2, 0, 0, 6, 0)
    with pytest.raises(InvalidRequestError):
        pool.ledger.reserve(pool.session, 1, 2)


# Seal, attach, release.


def test_seal_makes_a_block_readable_for_its_holders_only(pool: Pool) -> None:
    other = pool.open("b")
    (reserved,) = pool.ledger.reserve(pool.session, 1, workspace=True)
    assert not pool.ledger.readable(pool.session, reserved)
    assert pool.ledger.seal(pool.session, [reserved], [key(1)]) == [reserved]
    assert pool.counts() == (BLOCKS - 1, 0, 0, 0, 1)
    assert pool.ledger.readable(pool.session, reserved)
    assert not pool.ledger.readable(pool.session, BlockHandle(reserved.block, reserved.generation - 1))
    assert not pool.ledger.readable(pool.session, BlockHandle(10_000, 0))
    assert not pool.ledger.readable(other, reserved)
    assert pool.ledger.attach(other, [key(2), key(1)]) == [(1, reserved)]
    assert pool.ledger.readable(other, reserved)


def test_sealing_the_same_content_adopts_the_earlier_block(pool: Pool) -> None:
    other = pool.open("b")
    (first,) = pool.sealed(1)
    (mine,) = pool.ledger.reserve(other, 1)
    assert pool.ledger.seal(other, [mine], [key(1)]) == [first]
    assert pool.counts() == (BLOCKS - 2, 0, 0, 1, 1)
    pool.ledger.seal(other, [mine], [key(2)])  # it stayed reserved, and can still be used
    pool.ledger.close_session(pool.session)
    assert pool.ledger.readable(other, first)


def test_two_blocks_of_one_call_with_the_same_content(pool: Pool) -> None:
    first, second = pool.ledger.reserve(pool.session, 2)
    assert pool.ledger.seal(pool.session, [first, second], [key(1), key(1)]) == [first, first]
    assert pool.counts() == (BLOCKS - 2, 0, 0, 1, 1)


def test_sealing_again_is_idempotent_under_the_same_key_only(pool: Pool) -> None:
    (block,) = pool.sealed(1)
    assert pool.ledger.seal(pool.session, [block], [key(1)]) == [block]
    with pytest.raises(StaleGenerationError, match="another key"):
        pool.ledger.seal(pool.session, [block], [key(2)])
    pool.ledger.release(pool.session, [block])
    assert pool.counts() == (BLOCKS - 1, 1, 0, 0, 0), "sealing again added no hold"


def test_seal_is_checked_as_a_whole(pool: Pool) -> None:
    other = pool.open("b")
    (mine,) = pool.ledger.reserve(pool.session, 1)
    (foreign,) = pool.ledger.reserve(other, 1)
    stale = BlockHandle(mine.block, mine.generation - 1)
    bad = [
        ([mine, foreign], [key(1), key(2)], StaleGenerationError),
        ([mine, BlockHandle(99, 0)], [key(1), key(2)], StaleGenerationError),
        ([stale], [key(1)], StaleGenerationError),
        ([mine], [b"short"], InvalidRequestError),
        ([mine], [], InvalidRequestError),
        ([mine, mine], [key(1), key(2)], InvalidRequestError),
    ]
    for handles, keys, error in bad:
        with pytest.raises(error):
            pool.ledger.seal(pool.session, handles, keys)
    assert pool.counts() == (BLOCKS - 2, 0, 0, 2, 0)


def test_release_frees_or_caches(pool: Pool) -> None:
    (sealed,) = pool.sealed(1)
    (reserved,) = pool.ledger.reserve(pool.session, 1, workspace=True)
    pool.ledger.attach(pool.session, [key(1)])
    pool.ledger.release(pool.session, [sealed, reserved])
    assert pool.counts() == (BLOCKS - 1, 0, 0, 0, 1)
    pool.ledger.release(pool.session, [sealed])
    assert pool.counts() == (BLOCKS - 1, 1, 0, 0, 0)
    assert pool.ledger.attach(pool.session, [key(1)]) == [(0, sealed)], "cached blocks keep generation and content"


def test_release_is_checked_as_a_whole(pool: Pool) -> None:
    (block,) = pool.sealed(1)
    (reserved,) = pool.ledger.reserve(pool.session, 1)
    bad = [
        [reserved, BlockHandle(block.block, block.generation + 1)],
        [reserved, block, block],
        [reserved, BlockHandle(77, 1)],
    ]
    for handles in bad:
        with pytest.raises(StaleGenerationError):
            pool.ledger.release(pool.session, handles)
    assert pool.counts() == (BLOCKS - 2, 0, 0, 1, 1)


def test_generation_grows_with_each_owner(pool: Pool) -> None:
    (first,) = pool.ledger.reserve(pool.session, 1)
    pool.ledger.release(pool.session, [first])
    (second,) = pool.ledger.reserve(pool.session, 1)
    assert second == BlockHandle(first.block, first.generation + 1)
    with pytest.raises(StaleGenerationError, match=f"generation {second.generation}"):
        pool.ledger.release(pool.session, [first])
