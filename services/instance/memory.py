"""The engine's blocks: where new tokens are written and what becomes of a block when it is full.

The instance holds a *workspace* of open blocks in its local pool: those of prefill chunks, which may be on their way
elsewhere, and one for the tail of each running sequence, which the sequence brings along and takes away. A block that
is full leaves it in one of two ways: it is sealed in place (the workspace shrinks by one, and the rManager is asked for
another), or it is shipped to a daemon that has room, and comes back when that daemon has acknowledged it. Where the
local pool has no further block, the oldest sealed block of the longest sequence is shipped away to make room. Blocks of
a prompt have their places before its prefill starts: the first ones elsewhere, as far as the local pool was short, the
last ones in local blocks reserved for them.

All of it runs in the engine thread and never waits: ``grow`` answers False, and the sequence sits a step out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from services.core.blocks import BlockHandle, BlockKeySpace, BlockRef, PoolGeometry, next_block_key
from services.core.placement import MoveEnd
from services.core.sequence import RequestAge, Sequence
from services.dataplane.device import BlockBytes, Device
from services.dataplane.host_device import HostDevice
from services.dataplane.negotiation import Offers
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import RemoteAttention
from services.instance.control import (
    BeginMove,
    Control,
    CopiesSealed,
    LocalSealed,
    MoveReserved,
    PromptReserved,
    Replenish,
    Replenished,
    SealLocal,
)
from services.instance.holds import Holds
from services.instance.moves import Moves
from services.instance.rotary import RotaryRegimes
from services.instance.scheduler import one_gives_way_soon
from services.instance.sequence_memory import SequenceMemory
from services.instance.transfers import Transfers
from services.rmanager.block_table import BlockTable, Home

_STARVED_PAUSE_S = 0.1  # before asking again for room that was nowhere


@dataclass(slots=True)
class _Sealing:
    """A local block being sealed. ``memory`` is None once its sequence has gone."""

    memory: SequenceMemory | None
    index: int
    home: Home


class BlockMemory:
    """All blocks of one engine. Used by the engine thread.

    Args:
        pool: [num_blocks, layers, kv_heads, 2, block_tokens, head_dim], the mapped local pool.
        workspace: the open blocks held at start. So many, and one for each sequence, are held from then on.
        local_offers: how other daemons can reach the local one.
        move_bytes_per_s: about how fast blocks move that the gManager wants elsewhere.
        device: that has the pool; the CPU where none is given.
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
        local_offers: Offers,
        move_bytes_per_s: float,
        device: Device | None = None,
    ) -> None:
        self.geometry = geometry
        self._key_space = keys
        self._rotary = rotary
        self._free = list(workspace)
        self._base = self._held = len(self._free)
        self._local_id = local_kvdaemon_id
        self._peers = peers
        self._remote = remote
        self._control = control
        self._memories: dict[Sequence, SequenceMemory] = {}
        self._places: deque[BlockRef] = deque()  # elsewhere, each for a block that makes room for an admitted tail
        self._sealing: dict[BlockHandle, _Sealing] = {}
        self._holds = Holds(local_kvdaemon_id, local_session_id, peers, control)
        content = BlockBytes(pool, device or HostDevice())
        self._transfers = Transfers(
            content, local_offers, peers, remote, self._holds, control, free_workspace=self._free.append
        )
        self._moves = Moves(
            self._transfers,
            self._holds,
            control,
            self._refuse_move_here,
            key=lambda memory, index: self._key(memory.sequence, index),
            blocks_per_s=move_bytes_per_s / geometry.block_bytes,
        )
        self._replenishing = False
        self._replenish_at = 0.0  # monotonic clock, not before
        self._found_no_room = False  # the last attempt to replenish
        self._came_free = False  # blocks of the local pool, since that attempt began
        self.oldest_starving: RequestAge | None = None  # in the cluster, as known when we starved last

    @property
    def settling(self) -> bool:
        """Whether blocks are under way that will come free without anybody's doing."""
        return bool(self._sealing or self._replenishing or self._transfers.leaving or self._moves.leaving)

    @property
    def starved(self) -> bool:
        """Whether the workspace is short of blocks and there is no room anywhere, as far as is known."""
        return (self._found_no_room or bool(self._places)) and self._held < self._wanted

    @property
    def local_blocks(self) -> int:
        """Blocks of the local pool that running sequences hold: that will be free when all of them have ended."""
        return sum(len(memory.table.local_blocks) + len(memory.local) for memory in self._memories.values())

    def local_use(self) -> tuple[int, dict[Sequence, int]]:
        """Blocks of the local pool that several running sequences hold, and those that each holds alone.

        A block for the sequence's tail is among the latter, whether it is written to already or not.
        """
        tables = {sequence: memory.table.local_blocks[:, 0] for sequence, memory in self._memories.items()}
        holders = np.bincount(np.concatenate([*tables.values(), np.zeros(0, np.int64)]))
        alone = {
            sequence: int(np.count_nonzero(holders[blocks] == 1)) + len(self._memories[sequence].local) + 1
            for sequence, blocks in tables.items()
        }
        return int(np.count_nonzero(holders > 1)), alone

    @property
    def _wanted(self) -> int:
        """Blocks of the workspace, as many as there should be."""
        return self._base + len(self._memories)

    def prompt_keys(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Keys of the blocks that may be attached to: the last token is always computed, and what is to be scored."""
        count = sequence.cacheable // self.geometry.block_tokens
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
                table.append_remote(ref, self._transfers.segment_handle())
        self._memories[sequence] = SequenceMemory(
            sequence,
            table,
            list(reserved.local),
            deque(reserved.remote),
            range(len(table), len(table) + len(reserved.local) + len(reserved.remote)),
            len(reserved.local),
        )
        sequence.computed = sequence.cached_tokens = len(reserved.attached) * self.geometry.block_tokens
        if reserved.tail.kvdaemon_id == self._local_id:
            self._held += 1
            self._free.append(reserved.tail.handle)
        else:
            self._places.append(reserved.tail)

    def usable(self, reserved: PromptReserved) -> bool:
        """Whether the daemons of a reservation are still connected."""
        refs = (*reserved.attached, *reserved.remote, reserved.tail)
        return all(r.kvdaemon_id == self._local_id or self._peers.is_connected(r.kvdaemon_id) for r in refs)

    def give_back(self, reserved: PromptReserved) -> None:
        """Nobody wants this reservation any more."""
        self._release_holds(reversed((*reserved.attached, *reserved.remote, reserved.tail)))
        self._release_holds(self._here(handle) for handle in reserved.local)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Makes sure that the first ``tokens`` tokens have blocks. False: not enough blocks now, nothing changed."""
        memory = self._memories[sequence]
        table = memory.table
        indices = range(len(table), self.geometry.blocks_for(tokens))
        staying = memory.staying_before(indices.stop) - memory.staying_before(indices.start)
        if len(indices) - staying > len(self._free):
            return False
        for index in indices:
            if memory.staying_before(index) < memory.staying_before(index + 1):
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
            key = self._key(sequence, index)
            if entry.home is Home.WORKSPACE and memory.remote:
                self._transfers.begin(memory, index, key, memory.remote.popleft())
                continue
            if entry.home is Home.WORKSPACE:
                self._held -= 1
            entry.busy = True
            self._sealing[entry.local] = _Sealing(memory, index, entry.home)
            seals.append((entry.local, key))
        if seals:
            self._control.order(SealLocal(tuple(seals)))

    def tick(self) -> None:
        """Sends what is to go elsewhere and keeps the workspace up; called once per round of the engine."""
        self._transfers.tick()
        self._moves.tick()
        while self._places and self._ship_oldest_to(self._places[0]):
            self._places.popleft()
        missing = self._wanted - self._held
        if missing > len(self._places) and not self._replenishing and time.monotonic() >= self._replenish_at:
            self._replenishing, self._came_free = True, False
            self._control.order(Replenish(missing - len(self._places), one_gives_way_soon(self._memories)))
        elif missing < len(self._places):  # a sequence has gone
            self._give_up(len(self._places) - missing)

    def sealed(self, event: LocalSealed) -> None:
        """Blocks have been sealed in place, or found to be sealed already elsewhere in the pool."""
        unused: list[BlockRef] = []
        for own, now in event.blocks:
            sealing = self._sealing.pop(own)
            memory = sealing.memory
            if memory is None:
                unused.append(self._here(now))
            else:
                entry = memory.table.entries[sealing.index]
                entry.busy, entry.home = False, Home.SEALED
                if now != own:
                    memory.table.replace_local(sealing.index, now)
            if now != own:  # the own block is still open, and free for other use
                if sealing.home is Home.WORKSPACE:
                    self._held += 1
                    self._free.append(own)
                else:
                    unused.append(self._here(own))
        self._release_holds(unused)

    def copies_sealed(self, event: CopiesSealed) -> None:
        self._transfers.sealed(event)

    def begin_move(self, order: BeginMove, sequence: Sequence | None) -> None:
        """``sequence``: of the order's request, if it is known here."""
        self._moves.begin(order, None if sequence is None else self._memories.get(sequence))

    def move_reserved(self, event: MoveReserved) -> None:
        self._moves.reserved(event)

    def replenished(self, event: Replenished) -> None:
        """Blocks have come for the workspace, and room elsewhere to make more."""
        self._replenishing = False
        self._held += len(event.local)
        self._free.extend(event.local)
        self.oldest_starving = event.oldest_starving
        unused = [ref for ref in event.remote if not self._ship_oldest_to(ref)]
        self._found_no_room = not (event.local or self._came_free) and len(unused) == len(event.remote)
        if self._found_no_room:
            self._replenish_at = time.monotonic() + _STARVED_PAUSE_S
        self._holds.release(unused)

    def _ship_oldest_to(self, place: BlockRef) -> bool:
        """Sends a sealed block of the local pool to a place elsewhere; answers whether there is one that can leave."""
        victim = self._oldest_block_of_longest()
        if victim is None or not self._peers.is_connected(place.kvdaemon_id):
            return False
        memory, index = victim
        self._transfers.begin(memory, index, self._key(memory.sequence, index), place)
        return True

    def _give_up(self, blocks: int) -> None:
        """Gives back so many of the workspace's blocks, unused places first; fewer if the others are in use."""
        surplus = [self._places.pop() for _ in range(min(blocks, len(self._places)))]
        free = [self._free.pop() for _ in range(min(blocks - len(surplus), len(self._free)))]
        self._held -= len(free)
        self._release_holds([*surplus, *map(self._here, free)])

    def release(self, sequence: Sequence) -> None:
        """Gives up everything the sequence holds, if anything; what is under way settles by itself."""
        memory = self._memories.pop(sequence, None)
        if memory is None:
            return
        self._moves.request_ended(memory)
        held: list[BlockRef] = []
        for entry in reversed(memory.table.entries):
            if entry.busy:
                continue
            if entry.remote is not None:
                held.append(entry.remote)
            elif entry.local is not None and entry.home is Home.WORKSPACE:
                self._free.append(entry.local)
            elif entry.local is not None:
                held.append(self._here(entry.local))
        held += map(self._here, memory.local)
        held += memory.remote
        self._transfers.orphan(memory)
        for sealing in self._sealing.values():
            if sealing.memory is memory:
                sealing.memory = None
        for kvdaemon_id, segment in memory.table.segments.items():
            self._remote.forget(kvdaemon_id, segment.handle)
        self._release_holds(held)

    def peer_lost(self, kvdaemon_id: str) -> list[Sequence]:
        """A daemon is gone with all it held. Answers the sequences that must be computed anew (release them next)."""
        affected = {
            sequence
            for sequence, memory in self._memories.items()
            if memory.table.blocks_on(kvdaemon_id) or any(ref.kvdaemon_id == kvdaemon_id for ref in memory.remote)
        }
        self._places = deque(ref for ref in self._places if ref.kvdaemon_id != kvdaemon_id)
        affected |= self._transfers.peer_lost(kvdaemon_id)
        self._moves.peer_lost(kvdaemon_id)
        return sorted(affected, key=lambda sequence: sequence.age)

    def placement(self, sequence: Sequence) -> dict[str, int]:
        """Blocks of the sequence on each daemon."""
        memory = self._memories.get(sequence)
        if memory is None:
            return {}
        counts = {kvdaemon_id: segment.blocks.count for kvdaemon_id, segment in memory.table.segments.items()}
        counts[self._local_id] = len(memory.table.local_blocks)
        return counts

    def _refuse_move_here(self) -> MoveEnd | None:
        """Why the local pool can be no move's destination now, if so."""
        return MoveEnd.DESTINATION_FULL if self.starved else None

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

    def _release_holds(self, refs: Iterable[BlockRef]) -> None:
        """Gives up holds. Where that are some of the local pool's, there is room for what found none."""
        refs = list(refs)
        if any(ref.kvdaemon_id == self._local_id for ref in refs):
            self._found_no_room, self._came_free, self._replenish_at = False, True, 0.0
        self._holds.release(refs)

    def _here(self, handle: BlockHandle) -> BlockRef:
        return BlockRef(self._local_id, handle)
