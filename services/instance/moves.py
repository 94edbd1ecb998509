"""Moves that the gManager wants: sealed blocks of a running request go to another daemon while it is computed.

A move chooses its blocks at once and claims them (their entries are busy), so that nobody else touches them; then the
rManager finds them a place at the destination: the same content may lie there already, which costs no transfer, and
otherwise room is reserved for a while. Then block after block is transferred, a few begun between two steps and few
under way, so that a move takes little of a step's time and of the links. A move may end at any block: what has moved
has moved, what has not stays where it is, and the room that was left is given back.

Used by the engine thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from services.core.blocks import BlockHandle, BlockRef
from services.core.placement import MoveEnd
from services.instance.control import BeginMove, Control, EndMove, MoveReserved, ReserveMove
from services.instance.holds import Holds
from services.instance.sequence_memory import SequenceMemory
from services.instance.transfers import Stage, Transfer, Transfers
from services.rmanager.block_table import Home

_MOVES_AT_ONCE = 8
_MOST_BLOCKS = 4  # under way: half of what a daemon's window takes, so that what makes room need not wait for them


@dataclass(slots=True, eq=False)
class _Move:
    """One move.

    Attributes:
        claimed: block indices still to be transferred, in that order.
        reserved: blocks at the destination for them, not used yet; as many as ``claimed``, once they are known.
        used_at, use_within_s: when the room was used last (monotonic), and how soon it must be used again.
        under_way: transfers begun and not ended.
        end: how it ends, once that is decided; it is over when nothing is under way any more.
    """

    order: BeginMove
    memory: SequenceMemory
    claimed: deque[int]
    reserved: deque[BlockHandle] = field(default_factory=deque)
    used_at: float = 0.0
    use_within_s: float = 0.0
    under_way: list[Transfer] = field(default_factory=list)
    moved: int = 0
    end: MoveEnd | None = None

    @property
    def use_before(self) -> float:
        return self.used_at + self.use_within_s


class Moves:
    """All moves of one engine.

    Args:
        refuse_local: why the local daemon cannot be a destination now, if so.
        key: of a full block of a sequence, by index.
        blocks_per_s: to begin, all moves together; but one between two steps in any case.
    """

    def __init__(
        self,
        transfers: Transfers,
        holds: Holds,
        control: Control,
        refuse_local: Callable[[], MoveEnd | None],
        key: Callable[[SequenceMemory, int], bytes],
        blocks_per_s: float,
    ) -> None:
        self._transfers = transfers
        self._holds = holds
        self._control = control
        self._refuse_local = refuse_local
        self._key = key
        self._blocks_per_s = blocks_per_s
        self._ticked_at = time.monotonic()
        self._moves: dict[str, _Move] = {}

    @property
    def leaving(self) -> bool:
        """Whether local blocks are about to go elsewhere, and have their places there."""
        local = self._holds.local_id
        return any(move.reserved and move.order.source_kvdaemon_id == local for move in self._moves.values())

    def begin(self, order: BeginMove, memory: SequenceMemory | None) -> None:
        """Chooses the blocks and asks for their places, or refuses. ``memory``: of the request, if it is running."""
        refusal = None
        if memory is None:
            refusal = MoveEnd.UNKNOWN_REQUEST
        elif len(self._moves) >= _MOVES_AT_ONCE:
            refusal = MoveEnd.TOO_MANY_MOVES
        elif order.destination_kvdaemon_id == self._holds.local_id:
            refusal = self._refuse_local()
        chosen = self._choose(order, memory) if memory is not None and refusal is None else []
        if memory is None or refusal is not None or not chosen:
            self._control.order(EndMove(order.move_id, 0, refusal or MoveEnd.NOTHING_TO_MOVE))
            return
        for index in chosen:
            memory.table.entries[index].busy = True
        self._moves[order.move_id] = _Move(order, memory, deque(chosen))
        keys = tuple(self._key(memory, index) for index in chosen)
        self._control.order(ReserveMove(order.move_id, keys, memory.sequence.trace))

    def reserved(self, event: MoveReserved) -> None:
        """The places have come. Content that lies there already is used there at once."""
        move = self._moves.get(event.move_id)
        valid = event.session_id == self._holds.session_id(event.kvdaemon_id)
        if move is None or not valid:
            if valid:
                self._holds.release(BlockRef(event.kvdaemon_id, handle) for _, handle in event.attached)
                self._holds.release(BlockRef(event.kvdaemon_id, handle) for handle in event.reserved)
            if move is not None:
                self._end(move, MoveEnd.DESTINATION_LOST)
            return
        chosen = list(move.claimed)
        for at, handle in event.attached:
            self._transfers.adopt(move.memory, chosen[at], BlockRef(event.kvdaemon_id, handle))
            move.claimed.remove(chosen[at])
            move.moved += 1
        move.reserved.extend(event.reserved)
        move.used_at, move.use_within_s = event.reserved_at, event.use_within_s
        while len(move.claimed) > len(move.reserved):  # the destination has less room than was asked for
            move.memory.table.entries[move.claimed.pop()].busy = False
        if not move.claimed:
            self._end(move, MoveEnd.DONE)

    def tick(self) -> None:
        """Goes on with the moves, the oldest first; called once per round of the engine."""
        now = time.monotonic()
        blocks = max(1, min(_MOST_BLOCKS, int((now - self._ticked_at) * self._blocks_per_s)))
        self._ticked_at = now
        for move in list(self._moves.values()):
            self._take_in(move)
        under_way = sum(len(move.under_way) for move in self._moves.values())
        for _ in range(min(blocks, min(2 * blocks, _MOST_BLOCKS) - under_way)):
            ready = next((move for move in self._moves.values() if move.reserved), None)
            if ready is None:
                break
            self._begin_block(ready)

    def request_ended(self, memory: SequenceMemory) -> None:
        """The request has finished or gives its blocks up; called before these are released."""
        for move in [move for move in self._moves.values() if move.memory is memory]:
            self._take_in(move)
            move.under_way.clear()  # they settle by themselves
            self._end(move, MoveEnd.REQUEST_ENDED)

    def peer_lost(self, kvdaemon_id: str) -> None:
        """A daemon is gone; its transfers have failed already."""
        for move in list(self._moves.values()):
            if move.order.destination_kvdaemon_id == kvdaemon_id:
                self._end(move, MoveEnd.DESTINATION_LOST)
            elif move.order.source_kvdaemon_id == kvdaemon_id:
                self._end(move, MoveEnd.SOURCE_LOST)

    def _choose(self, order: BeginMove, memory: SequenceMemory) -> list[int]:
        """Indices of sealed blocks that lie at the source and rest there.

        The oldest ones leave first and the newest ones come home first: a layer with a window sees the newest only.
        """
        local, table = self._holds.local_id, memory.table
        if order.source_kvdaemon_id == local:
            rows = table.local_blocks
        else:
            segment = table.segments.get(order.source_kvdaemon_id)
            if segment is None:
                return []
            rows = segment.blocks.rows
        indices = (rows[:, -1] // table.block_tokens).tolist()
        if order.destination_kvdaemon_id == local:
            indices.reverse()
        entries = table.entries
        resting = (index for index in indices if entries[index].home is Home.SEALED and not entries[index].busy)
        return list(islice(resting, order.num_blocks))

    def _begin_block(self, move: _Move) -> None:
        if time.monotonic() > move.use_before:
            self._end(move, MoveEnd.EXPIRED)
            return
        index, handle = move.claimed.popleft(), move.reserved.popleft()
        target = BlockRef(move.order.destination_kvdaemon_id, handle)
        key = self._key(move.memory, index)
        move.under_way.append(self._transfers.begin(move.memory, index, key, target, move.use_before))

    def _take_in(self, move: _Move) -> None:
        """Counts what has arrived, and ends the move if something has failed or nothing more is to come."""
        ended = [transfer for transfer in move.under_way if transfer.stage in (Stage.ARRIVED, Stage.FAILED)]
        move.under_way = [transfer for transfer in move.under_way if transfer not in ended]
        for transfer in ended:
            if transfer.failure is None:
                move.moved += 1
                move.used_at = max(move.used_at, transfer.sent_at)  # it was used later than that
            else:
                move.end = move.end or transfer.failure
        if move.end is not None:
            self._end(move, move.end)
        elif ended and not move.claimed:
            self._end(move, MoveEnd.DONE)

    def _end(self, move: _Move, end: MoveEnd) -> None:
        """Begins nothing more of a move, and forgets it when nothing is under way. The first reason counts."""
        for index in move.claimed:
            move.memory.table.entries[index].busy = False
        move.claimed.clear()
        self._holds.release(BlockRef(move.order.destination_kvdaemon_id, handle) for handle in move.reserved)
        move.reserved.clear()
        if not move.under_way:
            if self._moves.pop(move.order.move_id, None) is not None:
                self._control.order(EndMove(move.order.move_id, move.moved, move.end or end))
        elif end is not MoveEnd.DONE:
            move.end = move.end or end
