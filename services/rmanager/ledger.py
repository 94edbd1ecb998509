"""The ledger: the authority over the blocks of one pool. Pure: no I/O, no threads, and its clock is given to it.

A block's life:

            reserve              seal                    last release
    FREE ────────────> RESERVED ──────> SEALED, in use ───────────────> SEALED, cached
      ^                 │    ^          one or more       <───────────    │
      └──── release ────┘    │          holds, no writer      attach      │
                             └─────────── reserve evicts it ──────────────┘

* A *session* is the right of one instance to hold blocks. Every hold belongs to a session; ``close_session`` ends them
  all at once. The process behind a *mapped* session may go on reading and writing the memory, so from the moment that
  the mapping is handed out (``begin_mapping``) its blocks are kept until ``hang_up`` proves that the process is gone.
* A *generation* grows whenever the block is given away, across formats too, so a late message never meets a new owner.
* An *offer* is a reservation for a while (``offers``): other daemons fill its blocks on behalf of the session, each
  once, and what nobody has begun to fill in time is free again. The session alone seals what was filled.
* Cached blocks are evicted least recently used first. A block is useful only as long as the blocks before it are there,
  so callers release a sequence's blocks tail first: what is released first is evicted first.

A call is checked in full before anything changes: it happens as a whole or raises and changes nothing. Every operation
costs O(1) per block it names (amortised), but for ``open_session`` where it formats, and ``check_integrity``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from ctypes import c_uint64

from services.core.blocks import BLOCK_KEY_BYTES, BlockHandle, PoolGeometry
from services.core.errors import (
    ConfigError,
    GeometryMismatchError,
    InvalidRequestError,
    PoolExhaustedError,
    SessionRevokedError,
    StaleGenerationError,
)
from services.core.placement import PoolStats
from services.rmanager.block_store import BlockState, BlockStore
from services.rmanager.holder import Holder, Session
from services.rmanager.offers import Offers


class Ledger:
    """Who holds which block.

    Args:
        pool_bytes: size of the pool's memory.
        new_session_id: draws a u64. It should be random: a client of a daemon that was restarted must not be mistaken
            for one of the new daemon's.
        clock: seconds, for offers.
    """

    def __init__(
        self, pool_bytes: int, new_session_id: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool_bytes = pool_bytes
        self._new_session_id = new_session_id
        self._clock = clock
        self._geometry: PoolGeometry | None = None
        self._store = BlockStore()
        self._holders: dict[int, Holder] = {}
        self.ended_sessions = c_uint64(0)  # grows before anything that an ended session held is given up
        self._latest: dict[str, Session] = {}  # instance -> its newest session, open or not
        self._offers = Offers()  # of open sessions
        self._writing: set[int] = set()  # blocks between begin_write and finish_write; each counts as one user
        self._reading: Counter[int] = Counter()  # between begin_read and finish_read, likewise

    # Sessions.

    @property
    def geometry(self) -> PoolGeometry | None:
        """Shape of the blocks; None as long as no session has formatted the pool."""
        return self._geometry

    @property
    def total_blocks(self) -> int:
        return self._store.total

    @property
    def open_sessions(self) -> int:
        return sum(holder.open for holder in self._holders.values())

    def instance_of(self, session_id: int) -> str:
        """Whose session it is.

        Raises:
            SessionRevokedError: the session is over.
        """
        return self._open_holder(session_id).session.instance_id

    def lent(self) -> dict[str, int]:
        """Blocks held by each instance that does not map the pool; one that several hold counts for each of them."""
        return {
            holder.session.instance_id: len(holder.holds)
            for holder in self._holders.values()
            if not holder.session.mapped
        }

    def open_session(self, instance_id: str, epoch: int, geometry: PoolGeometry, mapped: bool) -> Session:
        """Opens a session. The instance's earlier session, of this or an older epoch, is revoked.

        Formats the pool if it is unformatted, or of another shape and without holds (open sessions of the old shape are
        revoked then, and cached blocks forgotten).

        Raises:
            SessionRevokedError: the instance has opened a session with a later epoch.
            ConfigError: the pool is smaller than one block.
            GeometryMismatchError: somebody holds blocks of another shape. (The earlier session is over nevertheless.)
        """
        latest = self._latest.get(instance_id)
        if latest is not None and latest.epoch > epoch:
            raise SessionRevokedError(
                f"instance {instance_id} has opened a session with epoch {latest.epoch}; epoch {epoch} is over"
            )
        if geometry.block_bytes > self._pool_bytes:
            raise ConfigError(
                f"a pool of {self._pool_bytes} bytes is smaller than one block of {geometry.block_bytes} bytes; "
                "give the daemon a larger pool_mib"
            )
        if latest is not None:
            self.close_session(latest.session_id)
        if self._geometry != geometry:
            self._format(instance_id, geometry)
        session_id = self._new_session_id()
        while session_id in self._holders:
            session_id = self._new_session_id()
        session = Session(session_id, instance_id, epoch, mapped)
        self._holders[session_id] = Holder(session)
        self._latest[instance_id] = session
        return session

    def begin_mapping(self, session_id: int) -> None:
        """The session's process is about to get the pool's memory: from now on only ``hang_up`` frees its blocks.

        Raises:
            SessionRevokedError: the session is over.
            InvalidRequestError: the session was not opened as a mapped one.
        """
        holder = self._open_holder(session_id)
        if not holder.session.mapped:
            raise InvalidRequestError(
                f"session {session_id:#x} was not opened as a mapped one; open it with mapped set"
            )
        holder.mapping_out = True

    def close_session(self, session_id: int) -> None:
        """Ends a session; its holds are given up at once or, where its mapping is out, with ``hang_up``. Idempotent."""
        holder = self._holders.get(session_id)
        if holder is not None:
            holder.open = False
            self.ended_sessions.value += 1
            self._offers.withdraw(holder.holds)
            if not holder.mapping_out:
                self._drop(holder)

    def hang_up(self, session_id: int) -> None:
        """The process that had mapped the pool is gone: ends its session and gives up its holds. Idempotent."""
        holder = self._holders.get(session_id)
        if holder is not None:
            holder.mapping_out = False
            self.close_session(session_id)

    def revoked(self, session_id: int) -> bool:
        """Whether the session is over, or never was."""
        holder = self._holders.get(session_id)
        return holder is None or not holder.open

    # Blocks.

    def reserve(
        self, session_id: int, max_blocks: int, min_blocks: int = 0, workspace: bool = False, ttl_s: float = 0.0
    ) -> list[BlockHandle]:
        """Promises up to ``max_blocks`` blocks to the session: free ones first, then cached ones, evicted.

        Args:
            workspace: so many more of the session's reserved blocks count as its workspace from now on.
            ttl_s: makes them an offer that lasts so long; 0: they are promised for as long as the session lasts.

        Raises:
            PoolExhaustedError: fewer than ``min_blocks`` can be had; nothing is reserved then.
            SessionRevokedError: the session is over.
        """
        holder = self._open_holder(session_id)
        if not 0 <= min_blocks <= max_blocks or not 0 <= ttl_s < float("inf"):
            raise InvalidRequestError(f"cannot reserve {min_blocks} to {max_blocks} blocks for {ttl_s:g} s")
        self._expire()
        free, cached = self._store.free, self._store.cached
        if free + cached < min_blocks:
            raise PoolExhaustedError(
                f"asked for {min_blocks} blocks; {free} are free and {cached} can be evicted of {self._store.total}"
            )
        handles = [self._store.take() for _ in range(min(max_blocks, free + cached))]
        holder.holds.update((handle.block, 1) for handle in handles)
        holder.reserved += len(handles)
        holder.workspace += len(handles) if workspace else 0
        if ttl_s:
            self._offers.add(session_id, handles, ttl_s, self._clock())
        return handles

    def seal(self, session_id: int, handles: Sequence[BlockHandle], keys: Sequence[bytes]) -> list[BlockHandle]:
        """Makes reserved blocks of the session immutable, each under the key of what it holds.

        Answers for each the block that holds that content now: the session's own or, where one of that key is sealed
        already, that one, with one more hold; the session's own then stays reserved. Sealing a block once more under
        the key it has changes nothing.

        Raises:
            StaleGenerationError: a block is not reserved by the session, or sealed under another key.
            SessionRevokedError: the session is over.
        """
        holder = self._open_holder(session_id)
        if len(handles) != len(keys) or len(set(handles)) != len(handles):
            raise InvalidRequestError(f"seal of {len(handles)} blocks under {len(keys)} keys; each block needs one")
        for handle, key in zip(handles, keys, strict=True):
            self._check_held(holder, handle)
            if len(key) != BLOCK_KEY_BYTES:
                raise InvalidRequestError(f"a block key has {BLOCK_KEY_BYTES} bytes, not {len(key)}")
            if self._store.state(handle.block) is BlockState.SEALED and self._store.key(handle.block) != key:
                raise StaleGenerationError(f"block {handle.block} is sealed under another key and cannot change")
            if handle.block in self._writing:
                raise InvalidRequestError(f"block {handle.block} is being written over the data plane")
        return [self._seal(holder, handle, key) for handle, key in zip(handles, keys, strict=True)]

    def attach(self, session_id: int, keys: Sequence[bytes]) -> list[tuple[int, BlockHandle]]:
        """Adds one hold on each block sealed under one of the keys; answers (index of the key, block) for those found.

        Raises:
            SessionRevokedError: the session is over.
        """
        holder = self._open_holder(session_id)
        found = ((position, self._store.find(key)) for position, key in enumerate(keys))
        return [(position, self._hold(holder, index)) for position, index in found if index is not None]

    def release(self, session_id: int, handles: Sequence[BlockHandle]) -> None:
        """Gives up one hold on each block; callers name a sequence's blocks tail first.

        Releasing an offer that was taken back meanwhile changes nothing: its session cannot know.

        Raises:
            StaleGenerationError: the session does not hold one of them (that often).
            SessionRevokedError: the session is over.
        """
        holder = self._open_holder(session_id)
        expired = holder.expired.intersection(handles)
        handles = [handle for handle in handles if handle not in expired]
        for handle, count in Counter(handles).items():
            self._check_held(holder, handle)
            if holder.holds[handle.block] < count:
                raise StaleGenerationError(
                    f"block {handle.block} is to be released {count} times, but held {holder.holds[handle.block]} times"
                )
        for handle in handles:
            self._give_up(holder, handle.block)
        holder.expired -= expired

    def readable(self, session_id: int, handle: BlockHandle) -> bool:
        """Whether the session may query the block: sealed, of that generation and held by the session."""
        holder = self._holders.get(session_id)
        return (
            holder is not None
            and holder.open
            and handle.block in holder.holds
            and self._store.handle(handle.block) == handle
            and self._store.state(handle.block) is BlockState.SEALED
        )

    # Transfers over the data plane. The copy runs without the daemon's lock, so other calls come in between.

    def begin_write(self, session_id: int, handle: BlockHandle, on_behalf: bool = False) -> None:
        """The daemon is about to copy into a reserved block of the session. ``finish_write`` must follow.

        Until then nobody else gets the block, even if the session ends.

        Args:
            on_behalf: it is another daemon that writes: only a block that is offered, and only once.

        Raises:
            StaleGenerationError: the block is not reserved by the session, or nobody else may write it (any more).
            SessionRevokedError: the session is over.
        """
        self._expire()
        self._check_held(self._open_holder(session_id), handle)
        if self._store.state(handle.block) is not BlockState.RESERVED:
            raise StaleGenerationError(f"block {handle.block} is sealed and cannot be written")
        if handle.block in self._writing:
            raise InvalidRequestError(f"block {handle.block} is being written already")
        if on_behalf and handle.block not in self._offers:
            raise StaleGenerationError(f"block {handle.block} is not offered to others, or has been filled")
        self._offers.use(handle.block, self._clock())
        self._writing.add(handle.block)
        self._store.add_user(handle.block)

    def finish_write(self, session_id: int, handle: BlockHandle, key: bytes | None) -> BlockHandle:
        """Seals what was written and answers the block that holds that content now.

        If that is another block, the written one is released: a remote writer has no further use for it.

        Args:
            key: of the content; None leaves the block reserved, for its session to seal it.

        Raises:
            StaleGenerationError: the session has released the block meanwhile.
            SessionRevokedError: the session has ended meanwhile.
        """
        self._writing.remove(handle.block)
        try:
            holder = self._open_holder(session_id)
            self._check_held(holder, handle)
            sealed = handle if key is None else self._seal(holder, handle, key)
            if sealed != handle:
                self._give_up(holder, handle.block)
            return sealed
        finally:
            self._store.drop_user(handle.block)

    def begin_read(self, session_id: int, handle: BlockHandle, key: bytes) -> None:
        """The daemon is about to copy a sealed block elsewhere. ``finish_read`` must follow: until then it stays.

        Raises:
            StaleGenerationError: the session does not hold that content there.
        """
        if not self.readable(session_id, handle) or self._store.key(handle.block) != key:
            raise StaleGenerationError(f"session {session_id:#x} does not hold the wanted content in {handle}")
        self._reading[handle.block] += 1
        self._store.add_user(handle.block)

    def finish_read(self, block: int) -> None:
        """The copy is made, or given up."""
        self._reading[block] -= 1
        if not self._reading[block]:
            del self._reading[block]
        self._store.drop_user(block)

    # The whole.

    def stats(self) -> PoolStats:
        """The pool's use."""
        self._expire()
        workspace = sum(min(holder.workspace, holder.reserved) for holder in self._holders.values())
        return PoolStats(
            pool_bytes=self._pool_bytes,
            block_bytes=0 if self._geometry is None else self._geometry.block_bytes,
            total=self._store.total,
            free=self._store.free,
            cached=self._store.cached,
            workspace=workspace,
            reserved=self._store.reserved - workspace,
            in_use=self._store.in_use,
        )

    def check_integrity(self) -> list[str]:
        """Counts everything again and says in words what does not agree; empty if the ledger is sound."""
        users: Counter[int] = Counter(self._writing) + self._reading
        reserved_by: Counter[int] = Counter()
        found: list[str] = []
        for holder in self._holders.values():
            users.update(holder.holds)
            reserved = [i for i in holder.holds if self._store.state(i) is BlockState.RESERVED]
            reserved_by.update(reserved)
            if len(reserved) != holder.reserved:
                found.append(
                    f"session {holder.session.session_id:#x} has {len(reserved)} reserved blocks, "
                    f"{holder.reserved} expected"
                )
        found += [f"block {index} is reserved by {n} sessions" for index, n in reserved_by.items() if n > 1]
        found += [f"block {index} is offered, but not reserved" for index in self._offers.blocks() - reserved_by.keys()]
        return found + self._store.violations(users)

    def _format(self, instance_id: str, geometry: PoolGeometry) -> None:
        if self._store.free + self._store.cached != self._store.total:
            raise GeometryMismatchError(
                f"instance {instance_id} asks for blocks of {geometry}; the pool holds blocks of {self._geometry} that "
                "are in use. End the sessions that hold them, or use another pool"
            )
        for session_id in list(self._holders):
            self.close_session(session_id)
        self._store.format(self._pool_bytes // geometry.block_bytes)
        self._geometry = geometry

    def _open_holder(self, session_id: int) -> Holder:
        holder = self._holders.get(session_id)
        if holder is None or not holder.open:
            raise SessionRevokedError(f"session {session_id:#x} is over; open a new one")
        return holder

    def _check_held(self, holder: Holder, handle: BlockHandle) -> None:
        if handle.block not in holder.holds:
            raise StaleGenerationError(f"session {holder.session.session_id:#x} does not hold block {handle.block}")
        if (current := self._store.handle(handle.block).generation) != handle.generation:
            raise StaleGenerationError(
                f"block {handle.block} has generation {current}; the message is for generation {handle.generation}"
            )

    def _hold(self, holder: Holder, index: int) -> BlockHandle:
        self._store.add_user(index)
        holder.holds[index] = holder.holds.get(index, 0) + 1
        return self._store.handle(index)

    def _seal(self, holder: Holder, handle: BlockHandle, key: bytes) -> BlockHandle:
        sealed = self._store.find(key)
        self._offers.use(handle.block, self._clock())
        if sealed is None:
            self._store.seal(handle.block, key)
            holder.reserved -= 1
        elif sealed != handle.block:
            return self._hold(holder, sealed)
        return handle

    def _give_up(self, holder: Holder, index: int) -> None:
        holder.holds[index] -= 1
        if not holder.holds[index]:
            del holder.holds[index]
            holder.reserved -= self._store.state(index) is BlockState.RESERVED
            self._offers.withdraw([index])
        self._store.drop_user(index)

    def _expire(self) -> None:
        """Takes back what was offered and not used in time."""
        for session_id, handle in self._offers.take_due(self._clock()):
            holder = self._holders[session_id]
            self._give_up(holder, handle.block)
            holder.expired.add(handle)

    def _drop(self, holder: Holder) -> None:
        # Latest first: a session takes a sequence's blocks in order, so their tails are cached, and evicted, first.
        for index, count in reversed(holder.holds.items()):
            for _ in range(count):
                self._store.drop_user(index)
        del self._holders[holder.session.session_id]
