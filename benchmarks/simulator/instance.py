"""One instance: the real scheduler over counted blocks, in turns of a few steps.

A turn admits, schedules, and takes as many equal steps as ``STEPS_AT_ONCE`` allows; what is decided between two steps
(admission, growth, preemption, moves) is decided between two turns. A prefill chunk is a turn of its own.
The rules are those of ``services.instance.engine`` and ``memory``; README.md says which rule is which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from benchmarks.simulator.costs import Link
from benchmarks.simulator.lending import Lending, Pool
from benchmarks.simulator.moves import Moves
from benchmarks.simulator.recorder import Recorder
from benchmarks.simulator.sequence import SimulatedSequence
from benchmarks.simulator.steps import Device, Part, Timings, Work, work
from services.core.output_share import OutputShare
from services.core.sequence import Sequence as EngineSequence
from services.instance.lookahead import Growing, most_blocks, too_much_later
from services.instance.scheduler import Scheduled, Scheduler, one_gives_way_soon

STEPS_AT_ONCE = 8
_RESERVING_AT_ONCE = 8
RETRY_S = 0.1  # as in services.instance.engine, like the next two
_YIELD_S = 0.5
_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Serving:
    """Settings of every instance.

    Attributes:
        computed_prompts: prompts come with their KV cache, so that only decoding is simulated.
    """

    block_tokens: int
    max_num_seqs: int
    max_batch_tokens: int
    computed_prompts: bool

    def blocks_for(self, tokens: int) -> int:
        """For a sequence of so many tokens."""
        return -(-tokens // self.block_tokens)


class SimulatedInstance:
    """Instance ``index``; ``pools``, ``devices`` and ``links`` are of all instances.

    Args:
        ended: called with each sequence that has been served, or was refused.
    """

    def __init__(
        self,
        index: int,
        serving: Serving,
        pools: Sequence[Pool],
        devices: Sequence[Device],
        links: Sequence[Link],
        lending: Lending,
        moves: Moves,
        recorder: Recorder,
        ended: Callable[[SimulatedSequence], None],
    ) -> None:
        self.index = index
        self.scheduler = Scheduler(serving.max_num_seqs, serving.max_batch_tokens)
        self.timings = Timings()
        self.moves = moves
        self._serving = serving
        self._pools = pools
        self._pool = pools[index]
        self._devices = devices
        self._links = links
        self._lending = lending
        self._recorder = recorder
        self._ended = ended
        self._batch: list[tuple[SimulatedSequence, int]] = []
        self._work: Work | None = None
        self._began_at = 0.0
        self._short_of_room = False  # a prompt found no room
        self._starved = False  # a running sequence found none
        self._reserve_at = 0.0
        self._output_share = OutputShare()
        self._stuck_since: float | None = None
        self._asked: set[int] = set()  # instances whose daemons compute for this one

    @property
    def running(self) -> list[SimulatedSequence]:
        return cast(list[SimulatedSequence], self.scheduler.running)

    @property
    def waiting(self) -> list[SimulatedSequence]:
        return cast(list[SimulatedSequence], self.scheduler.waiting)

    @property
    def max_running(self) -> int:
        """Requests that it can run at the same time."""
        return self._serving.max_num_seqs

    @property
    def computing(self) -> bool:
        return self._work is not None

    def submit(self, sequence: SimulatedSequence) -> None:
        """The request waits here from now on, unless it can never fit."""
        if self._serving.blocks_for(sequence.longest) > self._lending.most_blocks(self.index):
            self._recorder.refused += 1
            self._ended(sequence)
        else:
            self.scheduler.add(sequence)

    def turn(self, now: float) -> float | None:
        """Ends the turn under way, if any, and begins another one; answers when it ends or is to be tried again."""
        if self._work is not None:
            self._commit(self._work, now)
        self._admit(now)
        batch = self._schedule()
        while self.scheduler.lacks_blocks and self._gives_way_at_once():
            self._preempt(now)
            batch = self._schedule()
        if not batch:
            self._work = None
            self._ask({}, 1.0)
            again = self._make_room(now)
            self._tell_starving()
            return again
        self._stuck_since = None
        self._tell_starving()
        steps = self._take_blocks(batch)
        self._batch = [(cast(SimulatedSequence, item.sequence), item.count) for item in batch]
        size = self._serving.block_tokens
        self._work = work(self._batch, steps, size, self.index, self._devices, self._links)
        self._ask(self._work.parts, self._work.step_s)
        self._began_at = now
        return now + steps * self._work.step_s

    def _schedule(self) -> list[Scheduled]:
        self._starved = False
        return self.scheduler.schedule(self._grow)

    # ------------------------------------------------------------ a turn's work

    def _commit(self, done: Work, now: float) -> None:
        for sequence, count in self._batch:
            if count == 1 and sequence.pending == 1:
                drawn = min(done.steps, sequence.remaining)
                sequence.computed += drawn
            else:
                sequence.computed += count
                drawn = 0 if sequence.pending else 1
            if drawn:
                self._draw(sequence, drawn, done)
        self.timings.add(done)
        for lender, part in done.parts.items():
            self._devices[lender].answer(self._devices[self.index].rates.layers, part, done.steps)
        self.moves.advance(done.steps, now - self._began_at, now)
        self._work = None

    def _draw(self, sequence: SimulatedSequence, drawn: int, done: Work) -> None:
        if sequence.first_token_at is None:
            sequence.first_token_at = self._began_at + done.step_s
        sequence.length.number += drawn
        sequence.remaining -= drawn
        at = self._began_at + drawn * done.step_s
        self._recorder.generated(drawn, at)
        if not sequence.remaining:
            self._recorder.finished(sequence, at)
            self._output_share.ended(sequence.output, sequence.request.sampling.max_tokens)
            self.scheduler.remove(sequence)
            self._release(sequence, at)
            self._ended(sequence)

    def _ask(self, asked: Mapping[int, Part], step_s: float) -> None:
        """What the daemons compute for this instance in every step, from now on."""
        for lender in self._asked - asked.keys():
            self._devices[lender].host(self.index, 0.0)
        for lender, part in asked.items():
            self._devices[lender].host(self.index, part.computing_s / step_s)
        self._asked = set(asked)

    # ------------------------------------------------------------ memory

    def _admit(self, now: float) -> None:
        if self._starved or now < self._reserve_at:
            return
        while (found := self.scheduler.next_to_reserve(_RESERVING_AT_ONCE)) is not None:
            sequence = cast(SimulatedSequence, found)
            older = self._lending.oldest_starving()
            for_older = older is not None and older < sequence.age
            if for_older or self._wants_too_much_later(sequence) or not self._reserve(sequence):
                # Who waits for somebody older, or for its own pool, does not starve itself.
                self._short_of_room = not (for_older or self._fits_here(sequence))
                self._reserve_at = now + RETRY_S
                return
            self._short_of_room = False
            self.scheduler.admit(sequence)
            if self._serving.computed_prompts:
                sequence.computed = len(sequence.tokens) - 1

    def _fits_here(self, sequence: SimulatedSequence) -> bool:
        return self._serving.blocks_for(sequence.longest) <= self._pool.blocks

    def _wants_too_much_later(self, joining: SimulatedSequence) -> bool:
        if not self._lending.pooled:
            return False
        needed, to_come = self._serving.blocks_for(len(joining.tokens)), self._to_come(joining)
        expected = self._serving.blocks_for(len(joining.tokens) + to_come)
        requests = [Growing(sequence.local, self._to_come(sequence)) for sequence in self.running]
        peak = most_blocks([*requests, Growing(needed, to_come)], self._serving.block_tokens)
        return too_much_later(expected, peak, self._pool.blocks, self._lending.spare_blocks(self.index))

    def _to_come(self, sequence: SimulatedSequence) -> int:
        return self._output_share.to_come(sequence.generated, sequence.request.sampling.max_tokens)

    def _reserve(self, sequence: SimulatedSequence) -> bool:
        """All blocks of a prompt, or none."""
        needed = self._serving.blocks_for(len(sequence.tokens))
        local = min(needed, self._pool.free)
        spare = self._fits_here(sequence)
        grants = self._lending.borrow(self.index, needed - local, spare_wanted=spare) if needed > local else []
        if local + sum(grant.blocks for grant in grants) < needed:
            for grant in grants:
                self._pools[grant.instance].give(grant.blocks)
            return False
        self._pool.take(local)
        sequence.local += local
        for grant in grants:
            sequence.put(grant.instance, grant.blocks)
        return True

    def _grow(self, found: EngineSequence, tokens: int) -> bool:
        sequence = cast(SimulatedSequence, found)
        missing = self._serving.blocks_for(tokens) - sequence.held
        if missing <= 0:
            return True
        if missing > self._pool.free and not self._spill(missing - self._pool.free):
            self._starved = True
            return False
        self._pool.take(missing)
        sequence.local += missing
        return True

    def _take_blocks(self, batch: list[Scheduled]) -> int:
        """Blocks for as many equal steps as there is room for; answers how many."""
        if any(item.sequence.pending > 1 for item in batch):
            return 1
        sequences = [cast(SimulatedSequence, item.sequence) for item in batch]
        steps = min(STEPS_AT_ONCE, max(sequence.remaining for sequence in sequences))
        while steps > 1:
            needs = [self._missing(sequence, steps) for sequence in sequences]
            missing = sum(needs) - self._pool.free
            if missing <= 0 or self._spill(missing):
                self._pool.take(sum(needs))
                for sequence, need in zip(sequences, needs, strict=True):
                    sequence.local += need
                return steps
            steps //= 2
        return 1

    def _missing(self, sequence: SimulatedSequence, steps: int) -> int:
        """Blocks that it does not have yet for so many steps, the next one among them."""
        end = sequence.length.number + min(steps, sequence.remaining) - 1
        return max(0, self._serving.blocks_for(end) - sequence.held)

    def _spill(self, blocks: int) -> bool:
        """Sends blocks of the longest sequences away, until so many are free; answers whether they are."""
        if not self._lending.pooled:
            return False
        left, size = blocks, self._serving.block_tokens
        spare = one_gives_way_soon(self.running)
        while left > 0:
            longest = max(self.running, key=lambda sequence: sequence.resting(size), default=None)
            most = longest.resting(size) if longest is not None else 0
            grants = self._lending.borrow(self.index, min(left, most), spare_wanted=spare) if most else []
            if longest is None or not grants:
                return False
            for grant in grants:
                longest.put(grant.instance, grant.blocks)
                longest.local -= grant.blocks
                self._pool.give(grant.blocks)
                left -= grant.blocks
        return True

    def _make_room(self, now: float) -> float | None:
        """Nobody could take a step: one gives way if that is for want of blocks. Answers when to go on."""
        if not self.running:
            return max(now + 1e-3, self._reserve_at) if self.waiting else None
        if self._stuck_since is None:
            self._stuck_since = now
        older = self._lending.oldest_starving()
        gives_way = len(self.running) > 1 or (older is not None and older < self._victim().age)
        if not gives_way and now - self._stuck_since < _PATIENCE_S:
            return now + RETRY_S
        self._preempt(now)
        self._stuck_since = None
        return now + 1e-3

    def _gives_way_at_once(self) -> bool:
        """Whether somebody gives way as soon as one lacks blocks; in vLLM whoever came last always does."""
        return one_gives_way_soon(self.running) if self._lending.pooled else len(self.running) > 1

    def _victim(self) -> SimulatedSequence:
        last = self.running[-1]
        return cast(SimulatedSequence, self.scheduler.cheapest_to_preempt()) if self._lending.pooled else last

    def _preempt(self, now: float) -> None:
        victim = self._victim()
        self._recorder.preempted += 1
        self._release(victim, now)
        self.scheduler.preempt(victim)
        self._reserve_at = now + (_YIELD_S if self._lending.pooled else 0.0)

    def _tell_starving(self) -> None:
        starving = []
        if self._stuck_since is not None and self.running:
            starving.append(self.running[0].age)
        if self._short_of_room and self.waiting:
            starving.append(self.waiting[0].age)
        self._lending.waits(self.index, bool(self.waiting))
        self._lending.starves(self.index, min(starving, default=None))

    def _release(self, sequence: SimulatedSequence, now: float) -> None:
        self.moves.request_ended(sequence, now)
        self._pool.give(sequence.local)
        for lender, blocks in sequence.remote.items():
            self._pools[lender].give(blocks)
        sequence.local = sequence.away = 0
        sequence.remote.clear()
