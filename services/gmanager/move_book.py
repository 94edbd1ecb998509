"""Moves that were planned: under way, and how they ended; predicted gain beside measured gain. Pure.

    PLANNED -> MOVING -> DONE, or why it ended early (MoveEnd), or LOST: nothing was heard of it
           \\-> why it was refused (MoveEnd), or UNREACHABLE, or NOT_LEADER: it was not ordered at all

The measured gain compares what the instances concerned put out before the move was ordered and after it had ended.
Whatever else happens to them in that time is in it as well; only over many moves does it say something.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from services.core.placement import MoveEnd, MoveReport
from services.gmanager.output_rate import OutputRates
from services.gmanager.planner.plan import Move

PLANNED, MOVING, LOST = "PLANNED", "MOVING", "LOST"
UNREACHABLE, NOT_LEADER = "UNREACHABLE", "NOT_LEADER"
MEASURE_S = 5.0  # of output, before and after a move
FORGOTTEN_S = 120.0  # a move of which nothing has been heard for so long has ended, somehow
_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """One move.

    Attributes:
        concerned: instances whose output it changes: the debtor, and those beside the daemons.
        ordered_at, ended_at: of the gManager's clock; None until then.
        accepted_blocks: by the rManager.
        moved_blocks: so far; the rManager's word once the move has ended.
        before_blocks: that the request had at the destination when the move was ordered.
        before_rate: output tokens per second of those concerned before.
        measured_gain: None as long as it cannot be told.
    """

    move_id: str
    move: Move
    concerned: tuple[str, ...]
    ordered_at: float
    before_blocks: int
    before_rate: float
    state: str = PLANNED
    accepted_blocks: int = 0
    moved_blocks: int = 0
    ended_at: float | None = None
    seconds: float = 0.0
    measured_gain: float | None = None

    @property
    def active(self) -> bool:
        return self.state in (PLANNED, MOVING)


@dataclass(frozen=True, slots=True)
class MoveTotals:
    """All moves that have ended: their number by (kind, end), and the blocks they have moved by kind."""

    moves: Mapping[tuple[str, str], int] = field(default_factory=dict)
    blocks: Mapping[str, int] = field(default_factory=dict)


class MoveBook:
    """All moves of one leader; ``now`` is of one monotonic clock."""

    def __init__(self, rates: OutputRates) -> None:
        self._rates = rates
        self._active: dict[str, MoveRecord] = {}
        self._ended: deque[MoveRecord] = deque(maxlen=_REMEMBERED)
        self._moved_at: dict[str, float] = {}
        self._moves: Counter[tuple[str, str]] = Counter()
        self._blocks: Counter[str] = Counter()

    @property
    def totals(self) -> MoveTotals:
        return MoveTotals(self._moves, self._blocks)

    @property
    def records(self) -> tuple[MoveRecord, ...]:
        """The latest moves that have ended, oldest first, and those under way."""
        return (*self._ended, *self._active.values())

    @property
    def moved_at(self) -> dict[str, float]:
        """By request id, when blocks of it were moved last, or were refused to move."""
        return self._moved_at

    def plan(self, move_id: str, move: Move, concerned: Iterable[str], before_blocks: int, now: float) -> None:
        """A move that will be ordered."""
        names = tuple(dict.fromkeys(concerned))
        rate = self._rates.between(names, now - MEASURE_S, now)
        self._active[move_id] = MoveRecord(move_id, move, names, now, before_blocks, rate)
        self._moved_at[move.request_id] = now

    def accepted(self, move_id: str, blocks: int) -> None:
        record = self._active.get(move_id)
        if record is not None:
            self._active[move_id] = replace(record, state=MOVING, accepted_blocks=blocks)

    def refused(self, move_id: str, why: str, now: float) -> None:
        self._end(move_id, why, 0, 0.0, now)

    def reported(self, report: MoveReport, now: float) -> MoveRecord | None:
        """The rManager's word on a move; answers its record if it was one of this book that was under way."""
        return self._end(report.move_id, report.end, report.moved_blocks, report.seconds, now)

    def abandon(self, now: float) -> None:
        """Moves of which nothing was heard for long have ended."""
        for record in [r for r in self._active.values() if now - r.ordered_at > FORGOTTEN_S]:
            self._end(record.move_id, LOST, 0, now - record.ordered_at, now)

    def under_way(self, blocks_at: Callable[[Move], int]) -> list[Move]:
        """Accepted moves, each with the blocks that have not arrived yet.

        Args:
            blocks_at: blocks of the move's request that lie at its destination, by the latest heartbeat.
        """
        answer = []
        for move_id, record in self._active.items():
            if record.state == MOVING:
                arrived = max(0, blocks_at(record.move) - record.before_blocks)
                self._active[move_id] = replace(record, moved_blocks=min(arrived, record.accepted_blocks))
                left = record.accepted_blocks - min(arrived, record.accepted_blocks)
                answer.append(replace(record.move, blocks=left))
        return answer

    def measure(self, now: float) -> list[MoveRecord]:
        """Completes the records of moves that ended long enough ago; answers those."""
        completed = []
        for index, record in enumerate(self._ended):
            due = record.measured_gain is None and record.moved_blocks > 0 and record.ended_at is not None
            if due and record.ended_at is not None and now - record.ended_at >= MEASURE_S:
                after = self._rates.between(record.concerned, record.ended_at, record.ended_at + MEASURE_S)
                self._ended[index] = replace(record, measured_gain=after - record.before_rate)
                completed.append(self._ended[index])
        return completed

    def forget_requests(self, running: Collection[str]) -> None:
        """Only requests that run are remembered as moved."""
        self._moved_at = {request_id: at for request_id, at in self._moved_at.items() if request_id in running}

    def _end(self, move_id: str, state: str, blocks: int, seconds: float, now: float) -> MoveRecord | None:
        record = self._active.pop(move_id, None)
        if record is None:
            return None
        state = state.value if isinstance(state, MoveEnd) else state
        ended = replace(record, state=state, moved_blocks=blocks, seconds=seconds, ended_at=now)
        self._ended.append(ended)
        self._moves[record.move.kind, state] += 1
        self._blocks[record.move.kind] += blocks
        self._moved_at[record.move.request_id] = now
        return ended
