"""The engine's blocks: where new tokens are written and what becomes of a block when it is full.

The instance holds a *workspace* of open blocks in its local pool: the tails of its sequences and the blocks of prefill
chunks on their way elsewhere. A block that is full leaves it in one of two ways: it is sealed in place (the workspace
shrinks by one, and the rManager is asked for another), or it is shipped to a daemon that has room, and comes back when
that daemon has acknowledged it. Where the local pool has no further block, the oldest sealed block of the longest
sequence is shipped away to make room. Blocks of a prompt have their places before its prefill starts: the first ones
elsewhere, as far as the local pool was short, the last ones in local blocks reserved for them.

All of it runs in the engine thread and never waits: ``grow`` answers False, and the sequence sits a step out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from services.core.blocks import BlockHandle, BlockKeySpace, BlockRef, PoolGeometry, next_block_key
from services.core.sequence import RequestAge, Sequence
from services.dataplane.peers import PeerSet, Sealed
from services.dataplane.remote_attention import RemoteAttention
from services.instance.control import Control, LocalSealed, PromptReserved, Release, Replenish, Replenished, SealLocal
from services.instance.rotary import RotaryRegimes
from services.rmanager.block_table import BlockTable, Home

_STARVED_PAUSE_S = 0.1  # before asking again for room that was nowhere


@dataclass(slots=True, eq=False)
class SequenceMemory:
    """What one admitted sequence holds.

    Attributes:
        local: open local blocks reserved for its prompt and not used yet.
        remote: blocks reserved elsewhere for its prompt and not shipped to yet, in filling order.
        first_local: block index from which the prompt's blocks stay here.
    """

    sequence: Sequence
    table: BlockTable
    local: list[BlockHandle]
    remote: deque[BlockRef]
    first_local: int


@dataclass(slots=True)
class _Transition:
    """A local block being sealed or shipped. ``memory`` is None once its sequence has gone."""

    memory: SequenceMemory | None
    index: int
    own: BlockHandle
    home: Home
    target: BlockRef | None = None


@dataclass(slots=True)
class _Releases:
    """Holds to give up, by daemon."""

    by_daemon: dict[str, list[BlockHandle]] = field(default_factory=dict)

    def add(self, kvdaemon_id: str, handle: BlockHandle) -> None:
        self.by_daemon.setdefault(kvdaemon_id, []).append(handle)


class BlockMemory:
    """All blocks of one engine. Used by the engine thread.

    Args:
        pool: [num_blocks, layers, kv_heads, 2, block_tokens, head_dim], the mapped local pool.
        workspace: the open blocks held at start; their number is kept up.
    """

    def __init__(
        self,
        geometry: PoolGeometry,
        keys: BlockKeySpace,
        rotary: RotaryRegimes,
        pool: Tensor,
        workspace: Iterable[BlockHandle],
        local_kvdaemon_id: str,
        local_session_id: int,
        peers: PeerSet,
        remote: RemoteAttention,
        control: Control,
    ) -> None:
        self.geometry = geometry
        self._key_space = keys
        self._rotary = rotary
        self._pool_bytes = pool.view(torch.uint8).view(pool.shape[0], geometry.block_bytes).numpy()
        self._free = list(workspace)
        self._target = self._held = len(self._free)
        self._local_id = local_kvdaemon_id
        self._local_session = local_session_id
        self._peers = peers
        self._remote = remote
        self._control = control
        self._memories: dict[Sequence, SequenceMemory] = {}
        self._sealing: dict[BlockHandle, _Transition] = {}
        self._shipping: dict[int, _Transition] = {}  # by tag
        self._to_ship: deque[_Transition] = deque()  # no room in the daemon's window yet
        self._next_tag = 1
        self._next_segment = 1
        self._replenishing = False
        self._replenish_at = 0.0  # monotonic clock, not before
        self._found_no_room = False  # the last attempt to replenish
        self.oldest_starving: RequestAge | None = None  # in the cluster, as known when we starved last

    @property
    def settling(self) -> bool:
        """Whether blocks are under way that will come free without anybody's doing."""
        return bool(self._shipping or self._to_ship or self._sealing or self._replenishing)

    @property
    def starved(self) -> bool:
        """Whether the workspace is short of blocks and there is no room anywhere, as far as is known."""
        return self._found_no_room and self._held < self._target

    def prompt_keys(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Keys of the blocks that may be attached to: the last token is always computed."""
        count = (len(sequence.tokens) - 1) // self.geometry.block_tokens
        if count:
            self._key(sequence, count - 1)
        return tuple(sequence.keys[:count])

    def table(self, sequence: Sequence) -> BlockTable:
        return self._memories[sequence].table

    def admit(self, sequence: Sequence, reserved: PromptReserved) -> None:
        """Takes over what was reserved; sets how much of the sequence is computed already."""
        table = BlockTable(self.geometry.block_tokens)
        for ref in reserved.attached:
            if ref.kvdaemon_id == self._local_id:
                table.append_local(ref.handle, Home.SEALED)
            else:
                table.append_remote(ref, self._segment_handle())
        self._memories[sequence] = SequenceMemory(
            sequence,
            table,
            list(reserved.local),
            deque(reserved.remote),
            len(reserved.attached) + len(reserved.remote),
        )
        sequence.computed = sequence.cached_tokens = len(reserved.attached) * self.geometry.block_tokens

    def usable(self, reserved: PromptReserved) -> bool:
        """Whether the daemons of a reservation are still connected."""
        refs = (*reserved.attached, *reserved.remote)
        return all(r.kvdaemon_id == self._local_id or self._peers.is_connected(r.kvdaemon_id) for r in refs)

    def give_back(self, reserved: PromptReserved) -> None:
        """Nobody wants this reservation any more."""
        releases = _Releases()
        for ref in reversed((*reserved.attached, *reserved.remote)):
            releases.add(ref.kvdaemon_id, ref.handle)
        for handle in reserved.local:
            releases.add(self._local_id, handle)
        self._send(releases)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Makes sure that the first ``tokens`` tokens have blocks. False: not enough blocks now, nothing changed."""
        memory = self._memories[sequence]
        table = memory.table
        indices = range(len(table), self.geometry.blocks_for(tokens))
        reserved = min(len(memory.local), max(0, indices.stop - max(indices.start, memory.first_local)))
        if len(indices) - reserved > len(self._free):
            return False
        for index in indices:
            if index >= memory.first_local and memory.local:
                table.append_local(memory.local.pop(), Home.REQUEST)
            else:
                table.append_local(self._free.pop(), Home.WORKSPACE)
        return True

    def commit(self, sequence: Sequence, computed: int) -> None:
        """The first ``computed`` tokens stand in blocks now; blocks that became full are sealed or shipped."""
        memory = self._memories[sequence]
        size = self.geometry.block_tokens
        full = range(sequence.computed // size, computed // size)
        sequence.computed = computed
        seals: list[tuple[BlockHandle, bytes]] = []
        for index in full:
            entry = memory.table.entries[index]
            assert entry.local is not None
            assert not entry.busy
            entry.busy = True
            transition = _Transition(memory, index, entry.local, entry.home)
            if entry.home is Home.WORKSPACE and memory.remote:
                transition.target = memory.remote.popleft()
                self._to_ship.append(transition)
                continue
            if entry.home is Home.WORKSPACE:
                self._held -= 1
            self._sealing[entry.local] = transition
            seals.append((entry.local, self._key(sequence, index)))
        if seals:
            self._control.order(SealLocal(tuple(seals)))

    def tick(self) -> None:
        """Ships what can be shipped and keeps the workspace up; called once per round of the engine."""
        for sealed in self._peers.take_sealed():
            self._shipped(sealed)
        while self._to_ship and self._ship(self._to_ship[0]):
            self._to_ship.popleft()
        if self._held < self._target and not self._replenishing and time.monotonic() >= self._replenish_at:
            self._replenishing = True
            self._control.order(Replenish(self._target - self._held))

    def sealed(self, event: LocalSealed) -> None:
        """Blocks have been sealed in place, or found to be sealed already elsewhere in the pool."""
        releases = _Releases()
        for own, now in event.blocks:
            transition = self._sealing.pop(own)
            memory = transition.memory
            if memory is None:
                releases.add(self._local_id, now)
            else:
                entry = memory.table.entries[transition.index]
                entry.busy, entry.home = False, Home.SEALED
                if now != own:
                    memory.table.replace_local(transition.index, now)
            if now != own:  # the own block is still open, and free for other use
                if transition.home is Home.WORKSPACE:
                    self._held += 1
                    self._free.append(own)
                else:
                    releases.add(self._local_id, own)
        self._send(releases)

    def replenished(self, event: Replenished) -> None:
        """Blocks have come for the workspace, and room elsewhere to make more."""
        self._replenishing = False
        self._held += len(event.local)
        self._free.extend(event.local)
        self._found_no_room = not event.local
        self.oldest_starving = event.oldest_starving
        unused = _Releases()
        for ref in event.remote:
            victim = self._oldest_block_of_longest()
            if victim is None or not self._peers.is_connected(ref.kvdaemon_id):
                unused.add(ref.kvdaemon_id, ref.handle)
                continue
            self._found_no_room = False
            memory, index = victim
            entry = memory.table.entries[index]
            assert entry.local is not None
            entry.busy = True
            self._to_ship.append(_Transition(memory, index, entry.local, entry.home, ref))
        if self._found_no_room:
            self._replenish_at = time.monotonic() + _STARVED_PAUSE_S
        self._send(unused)

    def release(self, sequence: Sequence) -> None:
        """Gives up everything the sequence holds, if anything; what is under way settles by itself."""
        memory = self._memories.pop(sequence, None)
        if memory is None:
            return
        releases = _Releases()
        for entry in reversed(memory.table.entries):
            if entry.busy:
                continue
            if entry.remote is not None:
                releases.add(entry.remote.kvdaemon_id, entry.remote.handle)
            elif entry.local is not None and entry.home is Home.WORKSPACE:
                self._free.append(entry.local)
            elif entry.local is not None:
                releases.add(self._local_id, entry.local)
        for handle in memory.local:
            releases.add(self._local_id, handle)
        for ref in memory.remote:
            releases.add(ref.kvdaemon_id, ref.handle)
        for transition in (*self._sealing.values(), *self._shipping.values(), *self._to_ship):
            if transition.memory is memory:
                transition.memory = None
        for kvdaemon_id, segment in memory.table.segments.items():
            self._remote.forget(kvdaemon_id, segment.handle)
        self._send(releases)

    def peer_lost(self, kvdaemon_id: str) -> list[Sequence]:
        """A daemon is gone with all it held. Answers the sequences that must be computed anew (release them next)."""
        affected = {
            sequence
            for sequence, memory in self._memories.items()
            if memory.table.blocks_on(kvdaemon_id) or any(ref.kvdaemon_id == kvdaemon_id for ref in memory.remote)
        }
        for tag, transition in list(self._shipping.items()):
            if transition.target is not None and transition.target.kvdaemon_id == kvdaemon_id:
                del self._shipping[tag]
                self._ship_failed(transition, affected)
        for transition in [t for t in self._to_ship if t.target and t.target.kvdaemon_id == kvdaemon_id]:
            self._to_ship.remove(transition)
            self._ship_failed(transition, affected)
        return sorted(affected, key=lambda sequence: sequence.age)

    def placement(self, sequence: Sequence) -> dict[str, int]:
        """Blocks of the sequence on each daemon."""
        memory = self._memories.get(sequence)
        if memory is None:
            return {}
        counts = {kvdaemon_id: segment.blocks.count for kvdaemon_id, segment in memory.table.segments.items()}
        counts[self._local_id] = len(memory.table.local_blocks)
        return counts

    def _ship(self, transition: _Transition) -> bool:
        """Writes a block to its target; False if the daemon's window is full for now."""
        if transition.memory is None:  # its sequence has gone meanwhile
            self._settle_local(transition)
            assert transition.target is not None
            self._send_one(*transition.target)
            return True
        assert transition.target is not None
        kvdaemon_id, handle = transition.target
        if not self._peers.is_connected(kvdaemon_id):
            return False  # peer_lost will take it out
        if not self._peers.get(kvdaemon_id).has_room_to_write(self.geometry.block_bytes + 16):
            return False
        tag, self._next_tag = self._next_tag, self._next_tag + 1
        key = self._key(transition.memory.sequence, transition.index)
        content = memoryview(self._pool_bytes[transition.own.block])
        self._peers.write_block(kvdaemon_id, tag, handle, key, content)
        self._shipping[tag] = transition
        return True

    def _shipped(self, sealed: Sealed) -> None:
        transition = self._shipping.pop(sealed.tag, None)
        if transition is None:
            return
        memory = transition.memory
        if memory is None:
            self._send_one(sealed.kvdaemon_id, sealed.handle)
        else:
            ref = BlockRef(sealed.kvdaemon_id, sealed.handle)
            memory.table.move_to_remote(transition.index, ref, self._segment_handle())
            memory.table.entries[transition.index].busy = False
        self._settle_local(transition)

    def _ship_failed(self, transition: _Transition, affected: set[Sequence]) -> None:
        """The target is gone: a spilled block simply stays; one without any other place loses its sequence's place."""
        memory = transition.memory
        if memory is None:
            self._settle_local(transition)
            return
        memory.table.entries[transition.index].busy = False
        if transition.home is Home.WORKSPACE:
            affected.add(memory.sequence)

    def _settle_local(self, transition: _Transition) -> None:
        """The content lies elsewhere, or is not wanted: the local block goes back to where it came from."""
        if transition.home is Home.WORKSPACE:
            self._free.append(transition.own)
        else:
            self._send_one(self._local_id, transition.own)

    def _key(self, sequence: Sequence, index: int) -> bytes:
        """Key of a full block; keys are hashed once, as tokens never change."""
        keys, size = sequence.keys, self.geometry.block_tokens
        if not keys:
            request = sequence.request
            space = replace(self._key_space, rotary=self._rotary.name(request), salt=request.cache_salt)
            keys.append(next_block_key(space.root(), sequence.tokens[:size]))
        while len(keys) <= index:
            start = len(keys) * size
            keys.append(next_block_key(keys[-1], sequence.tokens[start : start + size]))
        return keys[index]

    def _oldest_block_of_longest(self) -> tuple[SequenceMemory, int] | None:
        candidates = sorted(self._memories.values(), key=lambda memory: -len(memory.table.local_blocks))
        for memory in candidates:
            for _, position in memory.table.local_blocks:
                index = int(position) // self.geometry.block_tokens
                entry = memory.table.entries[index]
                if entry.home is Home.SEALED and not entry.busy:
                    return memory, index
        return None

    def _segment_handle(self) -> int:
        handle, self._next_segment = self._next_segment, self._next_segment + 1
        return handle

    def _send(self, releases: _Releases) -> None:
        for kvdaemon_id, handles in releases.by_daemon.items():
            session_id = self._local_session if kvdaemon_id == self._local_id else self._peers.session_id(kvdaemon_id)
            if session_id is not None:  # otherwise the holds have gone with their session
                self._control.order(Release(kvdaemon_id, session_id, tuple(handles)))

    def _send_one(self, kvdaemon_id: str, handle: BlockHandle) -> None:
        self._send(_Releases({kvdaemon_id: [handle]}))
