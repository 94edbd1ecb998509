"""Which sequences take part in the next step, and with how many tokens. Policy only: no tensors, no I/O."""

from __future__ import annotations

import math
import sys
from bisect import insort
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from services.core.sequence import Sequence, SequenceState
from services.instance.pace import Pace

# Tokens that are computed anew in about the time that is lost to steps sat out, or to messages to one more daemon.
_SOON_COMPUTED = 512

GrowBlocks = Callable[[Sequence, int], bool]


@dataclass(frozen=True, slots=True)
class Scheduled:
    """``count`` next tokens of a sequence; the last one is sampled from if it is the sequence's last.

    Both properties are of the time before the step is committed.
    """

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        return self.count == self.sequence.pending and self.sequence.request.sampling.max_tokens > 0

    @property
    def scored(self) -> range:
        """Positions, among those computed, whose logits tell the log-probability of the prompt's next token."""
        sequence = self.sequence
        first = max(sequence.computed, sequence.scored - 1)
        return range(first, max(first, min(sequence.computed + self.count, sequence.request.prompt_tokens - 1)))


class Scheduler:
    """First come, first served; decode before prefill; prefill in chunks. Used by the engine thread.

    Both lists are ordered by age, oldest first. A sequence is WAITING or RESERVING in ``waiting`` and RUNNING in
    ``running``.

    Args:
        mixed_step_s: about how long a step may take that decodes and computes prompts; chunks become smaller for it.
        max_scored_tokens: of a step at most so many tokens are of prompts whose log-probabilities are told: every one
            of their rows has logits.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_batch_tokens: int,
        mixed_step_s: float = math.inf,
        max_scored_tokens: int = sys.maxsize,
    ) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_scored_tokens = max_scored_tokens
        self._pace = Pace(mixed_step_s)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.lacks_blocks = False  # in the batch scheduled last somebody is missing who could have decoded

    def add(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        insort(self.waiting, sequence, key=lambda s: s.age)

    def admit(self, sequence: Sequence) -> None:
        """Its blocks are reserved: it runs from now on."""
        self.waiting.remove(sequence)
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=lambda s: s.age)

    def preempt(self, sequence: Sequence) -> None:
        """Its blocks are gone: it waits again, at its age, and is computed anew."""
        self.running.remove(sequence)
        sequence.computed_before = max(sequence.computed_before, sequence.computed)
        sequence.computed = 0
        self.add(sequence)

    def cheapest_to_preempt(self) -> Sequence:
        """Who has least to compute anew, the youngest of equals; the oldest that runs only if it is alone."""
        others = self.running[1:] or self.running
        return min(reversed(others), key=lambda sequence: sequence.computed)

    def remove(self, sequence: Sequence) -> None:
        (self.running if sequence.state is SequenceState.RUNNING else self.waiting).remove(sequence)

    def next_to_reserve(self, at_once: int) -> Sequence | None:
        """The oldest sequence whose blocks may be reserved now, ``at_once`` at the same time."""
        reserving = sum(s.state is SequenceState.RESERVING for s in self.waiting)
        if reserving >= at_once or len(self.running) + reserving >= self._max_num_seqs:
            return None
        return next((s for s in self.waiting if s.state is SequenceState.WAITING), None)

    def schedule(self, grow: GrowBlocks) -> list[Scheduled]:
        """The next step's batch; ``grow(sequence, tokens)`` answers whether its first ``tokens`` tokens have blocks."""
        batch: list[Scheduled] = []
        budget = self._max_batch_tokens
        self.lacks_blocks = False
        for sequence in self.running:
            if sequence.pending != 1 or not budget:
                continue
            if grow(sequence, len(sequence.tokens)):
                batch.append(Scheduled(sequence, 1))
                budget -= 1
            else:
                self.lacks_blocks = True
        if batch:
            paced = self._pace.prompt_tokens()
            budget = budget if paced is None else min(budget, paced)
        scored = self._max_scored_tokens
        for sequence in self.running:
            if sequence.pending > 1 and budget:
                count = self._chunk(sequence, min(budget, scored) if sequence.scores else budget, grow)
                if count:
                    batch.append(Scheduled(sequence, count))
                    budget -= count
                    scored -= count if sequence.scores else 0
        return batch

    def took(self, batch: SequenceOf[Scheduled], step_s: float) -> None:
        """Tells how long a step took."""
        self._pace.took(sum(item.count for item in batch if item.count > 1), step_s)

    def _chunk(self, sequence: Sequence, budget: int, grow: GrowBlocks) -> int:
        """The largest chunk, by halves, that has blocks now; 0 if not even a small one has."""
        count = min(sequence.pending, budget)
        while count and not grow(sequence, sequence.computed + count):
            count = count // 2 if count > 16 else 0
        return count


def one_gives_way_soon(running: Collection[Sequence]) -> bool:
    """Whether one of these other than the oldest is soon computed anew, so that it may as well be preempted.

    Then its blocks come free for the growth of others, rather than that an instance which is short as well lends its
    own: that would leave the cluster as much memory as before, and every step with messages.
    """
    oldest = min(running, key=lambda sequence: sequence.age, default=None)
    return any(sequence.computed <= _SOON_COMPUTED for sequence in running if sequence is not oldest)
