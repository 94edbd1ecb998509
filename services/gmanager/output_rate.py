"""How many tokens each instance puts out, by its own step timings. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from services.core.timings import StepTiming

MEMORY_S = 60.0


class OutputRates:
    """Output tokens of each instance over time; ``now`` is of any monotonic clock."""

    def __init__(self) -> None:
        self._told: dict[str, deque[tuple[float, float]]] = {}  # (when, output tokens since the message before)

    @property
    def instances(self) -> frozenset[str]:
        """Those that have told anything."""
        return frozenset(self._told)

    def observe(self, instance_id: str, timing: StepTiming, now: float) -> None:
        """Takes in what an instance says of its steps. A prompt's first token is not counted: it comes with prefill."""
        told = self._told.setdefault(instance_id, deque())
        told.append((now, timing.steps * (timing.batch_tokens - timing.prefill_tokens)))
        while told[0][0] < now - MEMORY_S:
            told.popleft()

    def between(self, instance_ids: Iterable[str], begin: float, end: float) -> float:
        """Output tokens per second of these instances together between two times, as far as they have been told."""
        tokens = sum(
            output
            for instance_id in instance_ids
            for when, output in self._told.get(instance_id, ())
            if begin < when <= end
        )
        return tokens / (end - begin)

    def forget(self, instance_ids: Iterable[str]) -> None:
        """Instances that have left."""
        for instance_id in instance_ids:
            self._told.pop(instance_id, None)
