"""What the engine counts as it goes: a few observations a step, however long the contexts and however many daemons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry

from services.instance.scheduler import Scheduled
from services.instance.step_timings import AttentionTimes
from services.runtime import metrics

_PHASES = ("decode", "prefill")
_PARTS = ("non_attention", "send", "local_attention", "remote_wait", "merge")
PreemptionReason = Literal["memory", "kvdaemon_lost"]
_REASONS: tuple[PreemptionReason, ...] = ("memory", "kvdaemon_lost")


class EngineMetrics:
    """Written by the engine thread. Whoever scrapes holds an instrument's lock for one number at a time."""

    def __init__(self, registry: CollectorRegistry) -> None:
        steps = metrics.STEP_TIME.histogram(registry)
        parts = metrics.STEP_PARTS.counter(registry)
        computed = metrics.COMPUTED_TOKENS.counter(registry)
        preemptions = metrics.PREEMPTIONS.counter(registry)
        self._steps = {phase: steps.labels(phase) for phase in _PHASES}
        self._parts = {part: parts.labels(part) for part in _PARTS}
        self._computed = {phase: computed.labels(phase) for phase in _PHASES}
        self._preemptions = {reason: preemptions.labels(reason) for reason in _REASONS}
        self._batch_tokens = metrics.BATCH_TOKENS.histogram(registry)
        self._batch_requests = metrics.BATCH_REQUESTS.histogram(registry)
        self._recomputed = metrics.RECOMPUTED_TOKENS.counter(registry)
        self._discarded = metrics.DISCARDED_STEPS.counter(registry)

    def step(self, scheduled: Sequence[Scheduled], step_s: float, attention: AttentionTimes, merge_s: float) -> None:
        """Takes in one step that was committed.

        Args:
            step_s: from the round's beginning until the tokens were there.
            merge_s: of ``attention``, merging what daemons answered.
        """
        tokens = prefill = recomputed = 0
        for item in scheduled:
            tokens += item.count
            if item.count > 1:
                prefill += item.count
            if item.sequence.computed_before:
                recomputed += item.sequence.recomputed(item.count)
        self._steps["prefill" if prefill else "decode"].observe(step_s)
        self._batch_tokens.observe(tokens)
        self._batch_requests.observe(len(scheduled))
        self._computed["prefill"].inc(prefill)
        self._computed["decode"].inc(tokens - prefill)
        self._recomputed.inc(recomputed)
        remote_s = attention.attention_s - attention.local_attention_s - attention.send_s - merge_s
        self._parts["non_attention"].inc(max(0.0, step_s - attention.attention_s))
        self._parts["send"].inc(attention.send_s)
        self._parts["local_attention"].inc(attention.local_attention_s)
        self._parts["remote_wait"].inc(max(0.0, remote_s))  # differences of clock readings: rounding may go below 0
        self._parts["merge"].inc(merge_s)

    def discarded_step(self) -> None:
        """A daemon was lost in the middle of a step."""
        self._discarded.inc()

    def preempted(self, reason: PreemptionReason) -> None:
        """A running request has given up its blocks."""
        self._preemptions[reason].inc()
