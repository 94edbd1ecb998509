"""Blocks on their way to other daemons while their request decodes: ``services.instance.moves``, in counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulator.costs import Link
from benchmarks.simulator.lending import Pool
from benchmarks.simulator.sequence import SimulatedSequence
from services.core.placement import MoveEnd

MOVES_AT_ONCE = 8


@dataclass(slots=True)
class _Move:
    move_id: str
    sequence: SimulatedSequence
    source: int
    target: int
    left: int  # reserved at the target
    began_at: float
    moved: int = 0


@dataclass(frozen=True, slots=True)
class EndedMove:
    """What the rManager tells of a move."""

    move_id: str
    request_id: str
    source: int
    target: int
    moved_blocks: int
    seconds: float
    end: MoveEnd


class Moves:
    """All moves of one instance, oldest first."""

    def __init__(
        self, index: int, pools: Sequence[Pool], links: Sequence[Link], block_tokens: int, block_bytes: float
    ) -> None:
        self._index = index
        self._pools = pools
        self._links = links
        self._block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._moves: list[_Move] = []
        self._ended: list[EndedMove] = []

    def begin(
        self, move_id: str, sequence: SimulatedSequence, source: int, target: int, blocks: int, now: float
    ) -> int | MoveEnd:
        """Answers how many blocks have their places, or why none."""
        if len(self._moves) == MOVES_AT_ONCE:
            return MoveEnd.TOO_MANY_MOVES
        claimed = sum(move.left for move in self._moves if move.sequence is sequence and move.source == source)
        wanted = min(blocks, self._at(sequence, source) - claimed)
        if wanted <= 0:
            return MoveEnd.NOTHING_TO_MOVE
        accepted = min(wanted, self._pools[target].free)
        if not accepted:
            return MoveEnd.DESTINATION_FULL
        self._pools[target].take(accepted)
        self._moves.append(_Move(move_id, sequence, source, target, accepted, now))
        return accepted

    def advance(self, steps: int, seconds: float, now: float) -> None:
        """So many steps were made: a block may begin between any two, and the link carries what it carries."""
        left = steps
        for move in list(self._moves):
            far = move.target if move.source == self._index else move.source
            carried = int(seconds * self._links[far].bytes_per_s / self._block_bytes)
            blocks = min(left, max(1, carried), move.left, self._at(move.sequence, move.source))
            self._shift(move, blocks)
            left -= blocks
            if not move.left:
                self._end(move, MoveEnd.DONE, now)
            elif not self._at(move.sequence, move.source):  # spilled or moved meanwhile
                self._end(move, MoveEnd.NOTHING_TO_MOVE, now)
            if not left:
                break

    def request_ended(self, sequence: SimulatedSequence, now: float) -> None:
        """Finished or preempted; called before its blocks are given up."""
        for move in [move for move in self._moves if move.sequence is sequence]:
            self._end(move, MoveEnd.REQUEST_ENDED, now)

    def drain(self) -> list[EndedMove]:
        """Those that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def reserved_at(self, target: int) -> int:
        """Blocks there for moves under way."""
        return sum(move.left for move in self._moves if move.target == target)

    def _at(self, sequence: SimulatedSequence, instance: int) -> int:
        """Sealed blocks."""
        if instance == self._index:
            return sequence.resting(self._block_tokens)
        return sequence.remote.get(instance, 0)

    def _shift(self, move: _Move, blocks: int) -> None:
        for instance, change in ((move.source, -blocks), (move.target, blocks)):
            if instance == self._index:
                move.sequence.local += change
            else:
                move.sequence.put(instance, change)
        self._pools[move.source].give(blocks)
        move.left -= blocks
        move.moved += blocks

    def _end(self, move: _Move, end: MoveEnd, now: float) -> None:
        self._pools[move.target].give(move.left)
        self._moves.remove(move)
        request_id = move.sequence.request_id
        seconds = now - move.began_at
        self._ended.append(EndedMove(move.move_id, request_id, move.source, move.target, move.moved, seconds, end))
