"""What is measured in a simulation."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarks.simulator.sequence import SimulatedSequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """One simulation, from the end of its warm-up to its end.

    Attributes:
        tokens_per_s: output tokens of all instances.
        requests_per_s: that ended.
        refused: requests, of all that came, that can never fit.
        preempted: times that a request gave its blocks up.
        ttft_s, tpot_s: quantiles over requests that ended: median and 99th; 0 if none has.
        remote_share: of the blocks in use, those on other instances' daemons, on average over time.
        used_share: of all blocks, those in use.
        moved_blocks, moves: that the planner ordered and that arrived.
        step_error: median over instances of the cost model's own; 0 where nobody plans.
    """

    tokens_per_s: float
    requests_per_s: float
    refused: int
    preempted: int
    ttft_s: tuple[float, float]
    tpot_s: tuple[float, float]
    remote_share: float
    used_share: float
    moved_blocks: int
    moves: int
    step_error: float


@dataclass(frozen=True, slots=True)
class PlacementSample:
    """Blocks of each instance's pool at one time: its own requests', those lent, and all."""

    time_s: float
    own: tuple[int, ...]
    lent: tuple[int, ...]
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Recorder:
    """Counts from ``begin_s`` on; ``placements``: samples over the whole time."""

    begin_s: float
    tokens: int = 0
    all_tokens: int = 0
    ended: int = 0
    refused: int = 0
    preempted: int = 0
    moved_blocks: int = 0
    moves: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    placements: list[PlacementSample] = field(default_factory=list)

    def generated(self, tokens: int, now: float) -> None:
        self.all_tokens += tokens
        if now >= self.begin_s:
            self.tokens += tokens

    def finished(self, sequence: SimulatedSequence, now: float) -> None:
        if now < self.begin_s:
            return
        self.ended += 1
        assert sequence.first_token_at is not None
        self.ttft_s.append(sequence.first_token_at - sequence.request.arrival_time)
        self.tpot_s.append((now - sequence.first_token_at) / max(1, sequence.output - 1))

    def outcome(self, end_s: float, step_error: float) -> Outcome:
        seconds = end_s - self.begin_s
        late = [sample for sample in self.placements if sample.time_s >= self.begin_s]
        lent = sum(sum(sample.lent) for sample in late)
        used = lent + sum(sum(sample.own) for sample in late)
        return Outcome(
            self.tokens / seconds,
            self.ended / seconds,
            self.refused,
            self.preempted,
            _quantiles(self.ttft_s),
            _quantiles(self.tpot_s),
            lent / used if used else 0.0,
            used / sum(sum(sample.blocks) for sample in late) if late else 0.0,
            self.moved_blocks,
            self.moves,
            step_error,
        )


def _quantiles(values: list[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 0.0
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
