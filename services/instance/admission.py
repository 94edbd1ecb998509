"""Which waiting prompts get blocks, and in which order. Used by the engine thread.

First come, first served: once the oldest waiting prompt has found no room, only it is asked for until it has, unless
that would not help (``Admission.deferred``). A prompt gets all of its blocks or none, and only where those that run
and it are not expected to want much more memory together than there is (``lookahead``).
"""

from __future__ import annotations

import time

from services.core.output_share import OutputShare
from services.core.sequence import RequestAge, Sequence, SequenceState
from services.instance.control import Control, PromptDeferred, PromptRefused, PromptReserved, ReservePrompt
from services.instance.lookahead import Growing, most_blocks
from services.instance.memory import BlockMemory
from services.instance.scheduler import Scheduler

RETRY_S = 0.1  # between attempts to reserve a prompt for which there was no room
_AT_ONCE = 8  # prompts whose blocks are reserved at the same time


class Admission:
    """Orders reservations and takes their answers.

    Args:
        max_model_len: longest context in tokens.
    """

    def __init__(self, scheduler: Scheduler, memory: BlockMemory, control: Control, max_model_len: int) -> None:
        self._scheduler = scheduler
        self._memory = memory
        self._control = control
        self._max_model_len = max_model_len
        self._reserving: dict[int, Sequence] = {}  # by attempt
        self._attempts = 0
        self._output_share = OutputShare()
        self._not_before = 0.0  # monotonic
        self._retry_at = 0.0  # monotonic, unless somebody gives up blocks before
        self._oldest_waits = False  # a prompt found no room: nobody younger may take what comes free here ...
        self._oldest_starves = False  # ... nor elsewhere

    @property
    def starving(self) -> RequestAge | None:
        """The prompt to which everybody younger in the cluster must leave what comes free."""
        return self._scheduler.waiting[0].age if self._oldest_starves and self._scheduler.waiting else None

    def tick(self) -> None:
        """Begins to reserve blocks for waiting prompts, oldest first; called once per round of the engine."""
        if self._memory.starved or time.monotonic() < max(self._not_before, self._retry_at):
            return
        geometry = self._memory.geometry
        while (sequence := self._scheduler.next_to_reserve(1 if self._oldest_waits else _AT_ONCE)) is not None:
            sequence.state = SequenceState.RESERVING
            self._attempts += 1
            self._reserving[self._attempts] = sequence
            peak = self._peak_blocks()
            remaining = sequence.request.sampling.max_tokens - sequence.generated
            self._control.order(
                ReservePrompt(
                    sequence.age,
                    self._attempts,
                    self._memory.prompt_keys(sequence),
                    len(sequence.tokens) // geometry.block_tokens,
                    geometry.blocks_for(min(len(sequence.tokens) + remaining, self._max_model_len)),
                    geometry.blocks_for(len(sequence.tokens) + self._to_come(sequence)),
                    peak,
                    sequence.trace,
                )
            )

    def _peak_blocks(self) -> int:
        """The most blocks that those running and those being admitted are expected to hold together.

        Prompts count as if nothing of them were cached.
        """
        geometry = self._memory.geometry
        shared, alone = self._memory.local_use()
        running = [Growing(blocks, self._to_come(sequence)) for sequence, blocks in alone.items()]
        joining = [Growing(geometry.blocks_for(len(s.tokens)), self._to_come(s)) for s in self._reserving.values()]
        return shared + most_blocks([*running, *joining], geometry.block_tokens)

    def _to_come(self, sequence: Sequence) -> int:
        """Tokens that it is expected to generate from now on."""
        return self._output_share.to_come(sequence.generated, sequence.request.sampling.max_tokens)

    def reserved(self, event: PromptReserved) -> Sequence | None:
        """Answers whom it admits: nobody where the request has ended, or a daemon was lost, meanwhile."""
        sequence = self._reserving.pop(event.attempt, None)
        if sequence is None or not self._memory.usable(event):
            self._memory.give_back(event)
            if sequence is not None:
                sequence.state = SequenceState.WAITING
            return None
        self._memory.admit(sequence, event)
        self._scheduler.admit(sequence)
        self._oldest_waits = self._oldest_starves = False
        return sequence

    def deferred(self, event: PromptDeferred) -> None:
        """There was no room. If all who wait said that they starve, everybody would soon starve for somebody, and the
        whole cluster would admit one prompt at a time, by age, however much room there is."""
        sequence = self._reserving.pop(event.attempt, None)
        if sequence is None:
            return
        sequence.state = SequenceState.WAITING
        self._oldest_starves = event.starves
        # Where others hold too much of the pool, it may wait for as long as they like, and nobody helps by waiting.
        self._oldest_waits = event.starves or event.missing <= self._memory.local_blocks
        self._retry_at = time.monotonic() + RETRY_S

    def refused(self, event: PromptRefused) -> Sequence | None:
        """Answers whom it concerns, if anybody still."""
        return self._reserving.pop(event.attempt, None)

    def ended(self, sequence: Sequence, by_itself: bool) -> None:
        """The request is over: an answer that is under way is nobody's.

        Args:
            by_itself: its output has come to its end.
        """
        if by_itself:
            self._output_share.ended(sequence.generated, sequence.request.sampling.max_tokens)
        self._retry_at = 0.0
        self._reserving = {attempt: other for attempt, other in self._reserving.items() if other is not sequence}

    def pause(self, seconds: float) -> None:
        """Asks for nothing for so long: others go first."""
        self._not_before = time.monotonic() + seconds
