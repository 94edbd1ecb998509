"""Where a step's time goes, for the gManager's cost model: sums over the steps that are alike, until a heartbeat asks.

A step is divided into attention and the rest by reading the clock three times in each layer, and once more for each
daemon's answer: well under a microsecond, where a layer takes hundreds. Per token nothing is measured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from services.core.timings import RemoteTiming, StepTiming
from services.dataplane.peers import AnswerTimes
from services.instance.scheduler import Scheduled
from services.rmanager.block_table import BlockTable

_MOST_KINDS = 8  # of steps between two heartbeats


@dataclass(slots=True)
class AttentionTimes:
    """A step's attention, summed over layers, in seconds; see ``StepTiming``. ``send_s``: part of it, before the own
    pool's kernel."""

    attention_s: float = 0.0
    local_attention_s: float = 0.0
    send_s: float = 0.0

    def add(self, attention_s: float, local_attention_s: float, send_s: float = 0.0) -> None:
        """Takes in one layer."""
        self.attention_s += attention_s
        self.local_attention_s += local_attention_s
        self.send_s += send_s

    def reset(self) -> None:
        self.attention_s = self.local_attention_s = self.send_s = 0.0


@dataclass(slots=True)
class _Part:
    """One daemon's part of several steps."""

    rows: int = 0
    context_tokens: int = 0
    answers: AnswerTimes = field(default_factory=AnswerTimes)


@dataclass(slots=True)
class _Sum:
    """Several steps."""

    steps: int = 0
    batch_tokens: int = 0
    prefill_tokens: int = 0
    local_context_tokens: int = 0
    step_s: float = 0.0
    attention_s: float = 0.0
    local_attention_s: float = 0.0
    parts: dict[str, _Part] = field(default_factory=dict)


class StepTimings:
    """Filled by the engine thread, emptied by the asyncio thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[tuple[bool, frozenset[str]], _Sum] = {}

    def add(
        self,
        scheduled: Iterable[Scheduled],
        tables: Iterable[BlockTable],
        step_s: float,
        attention: AttentionTimes,
        answers: Mapping[str, AnswerTimes],
    ) -> None:
        """Takes in one step that was committed.

        Args:
            tables: of the scheduled sequences, one each.
            step_s: from building the batch until the tokens were there.
            answers: of the daemons that were asked.
        """
        with self._lock:
            batch = [item.count for item in scheduled]
            prefill = sum(count for count in batch if count > 1)
            kind = (prefill > 0, frozenset(answers))
            total = self._sums.get(kind)
            if total is None:
                if len(self._sums) == _MOST_KINDS:
                    return
                total = self._sums[kind] = _Sum()
            total.steps += 1
            total.batch_tokens += sum(batch)
            total.prefill_tokens += prefill
            total.step_s += step_s
            total.attention_s += attention.attention_s
            total.local_attention_s += attention.local_attention_s
            for table in tables:
                total.local_context_tokens += len(table.local_blocks) * table.block_tokens
                for kvdaemon_id, segment in table.segments.items():
                    if segment.blocks.count and kvdaemon_id in answers:
                        part = total.parts.setdefault(kvdaemon_id, _Part())
                        part.rows += 1
                        part.context_tokens += segment.blocks.count * table.block_tokens
            for kvdaemon_id, times in answers.items():
                total.parts.setdefault(kvdaemon_id, _Part()).answers.add(times)

    def drain(self) -> tuple[StepTiming, ...]:
        """Means of all steps since the last call, those alike together."""
        with self._lock:
            taken, self._sums = self._sums, {}
        return tuple(_mean(total) for total in taken.values())


def _mean(total: _Sum) -> StepTiming:
    share = 1.0 / total.steps
    return StepTiming(
        total.batch_tokens * share,
        total.prefill_tokens * share,
        total.local_context_tokens * share,
        total.step_s * share,
        total.attention_s * share,
        total.local_attention_s * share,
        tuple(
            RemoteTiming(
                kvdaemon_id,
                part.answers.messages * share,
                part.rows * share,
                part.context_tokens * share,
                part.answers.seconds * share,
                part.answers.late / part.answers.messages,
            )
            for kvdaemon_id, part in total.parts.items()
            if part.answers.messages
        ),
        total.steps,
    )
