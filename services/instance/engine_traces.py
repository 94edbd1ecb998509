"""What an engine tells of requests that are traced.

    compute                 from the submission until the request is over here
      queue                 waits for its blocks, at first and after each preemption
      prefill chunk         one for each step that computes a part of the prompt
      decode                all steps from the first token on, until the end or a preemption

What happens layer by layer is summed up in attributes. The seconds are those of the steps that the request had a part
in; others may have had a part in them as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from services.core.sequence import Sequence
from services.dataplane.peers import AnswerTimes
from services.instance.scheduler import Scheduled
from services.instance.step_timings import AttentionTimes
from services.runtime.tracing import context_of, ns_ago, under

_GOOD_ENDS = ("stop", "length", "aborted", "replaced")


class Traces(Protocol):
    """Told by the engine thread."""

    def submitted(self, sequence: Sequence) -> None: ...

    def admitted(self, sequence: Sequence, local_blocks: int, remote_blocks: int) -> None:
        """Its blocks are reserved: so many new ones in the own pool, and on other daemons."""

    def step(
        self,
        scheduled: SequenceOf[Scheduled],
        begun: float,
        attention: AttentionTimes,
        answers: Mapping[str, AnswerTimes],
    ) -> None:
        """The model has computed a batch, which is not committed yet.

        Args:
            begun: of the step (perf_counter).
            answers: of the daemons, by their ids.
        """

    def preempted(self, sequence: Sequence, reason: str) -> None: ...

    def ended(self, sequence: Sequence, end: str) -> None:
        """It is over here.

        Args:
            end: "stop", "length", "aborted", "replaced" (by a later submission), or an error's reason.
        """


class NoTraces(Traces):
    """Nobody collects them."""

    def submitted(self, sequence: Sequence) -> None:
        pass

    def admitted(self, sequence: Sequence, local_blocks: int, remote_blocks: int) -> None:
        pass

    def step(
        self,
        scheduled: SequenceOf[Scheduled],
        begun: float,
        attention: AttentionTimes,
        answers: Mapping[str, AnswerTimes],
    ) -> None:
        pass

    def preempted(self, sequence: Sequence, reason: str) -> None:
        pass

    def ended(self, sequence: Sequence, end: str) -> None:
        pass


@dataclass(slots=True)
class _Work:
    """Sums over steps."""

    steps: int = 0
    step_s: float = 0.0
    attention_s: float = 0.0
    local_attention_s: float = 0.0
    queries: int = 0  # to other daemons, answered
    answer_s: float = 0.0
    kvdaemons: set[str] = field(default_factory=set)

    def add(self, step_s: float, attention: AttentionTimes, answers: Mapping[str, AnswerTimes]) -> None:
        self.steps += 1
        self.step_s += step_s
        self.attention_s += attention.attention_s
        self.local_attention_s += attention.local_attention_s
        self.queries += sum(times.messages for times in answers.values())
        self.answer_s += sum(times.seconds for times in answers.values())
        self.kvdaemons |= answers.keys()

    def describe(self, span: Span) -> None:
        span.set_attributes(
            {
                "infinite_llm.steps": self.steps,
                "infinite_llm.step_seconds": self.step_s,
                "infinite_llm.attention_seconds": self.attention_s,
                "infinite_llm.local_attention_seconds": self.local_attention_s,
                "infinite_llm.remote_queries": self.queries,
                "infinite_llm.remote_answer_seconds": self.answer_s,
                "infinite_llm.kvdaemons": sorted(self.kvdaemons),
            }
        )


@dataclass(slots=True)
class _Traced:
    """One request's open spans; at most one of ``queue`` and ``decode`` is open."""

    compute: Span
    queue: Span | None
    decode: Span | None = None
    prefilled: bool = False
    decoding: _Work = field(default_factory=_Work)


class EngineTraces(Traces):
    """Spans of those requests whose gateway's span is sampled."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._traced: dict[Sequence, _Traced] = {}

    def submitted(self, sequence: Sequence) -> None:
        if sequence.trace is None:
            return
        request = sequence.request
        attributes: dict[str, str | int] = {
            "gen_ai.response.id": request.request_id,
            "gen_ai.usage.input_tokens": request.prompt_tokens,
            "infinite_llm.continued_tokens": len(request.token_ids) - request.prompt_tokens,
        }
        compute = self._tracer.start_span("compute", under(sequence.trace), kind=SpanKind.SERVER, attributes=attributes)
        sequence.trace = context_of(compute)
        self._traced[sequence] = _Traced(compute, self._begin(sequence, "queue"))

    def admitted(self, sequence: Sequence, local_blocks: int, remote_blocks: int) -> None:
        traced = self._traced.get(sequence)
        if traced is None or traced.queue is None:
            return
        traced.queue.set_attributes(
            {
                "gen_ai.usage.cache_read.input_tokens": sequence.cached_tokens,
                "infinite_llm.local_blocks": local_blocks,
                "infinite_llm.remote_blocks": remote_blocks,
            }
        )
        traced.queue.end()
        traced.queue = None

    def step(
        self,
        scheduled: SequenceOf[Scheduled],
        begun: float,
        attention: AttentionTimes,
        answers: Mapping[str, AnswerTimes],
    ) -> None:
        if not self._traced:
            return
        step_s = time.perf_counter() - begun
        begun_ns = ns_ago(step_s)
        for item in scheduled:
            traced = self._traced.get(item.sequence)
            if traced is None:
                continue
            if traced.prefilled:
                if traced.decode is None:
                    traced.decode = self._begin(item.sequence, "decode", begun_ns)
                traced.decoding.add(step_s, attention, answers)
                continue
            chunk = self._begin(item.sequence, "prefill chunk", begun_ns)
            chunk.set_attributes(
                {"infinite_llm.tokens": item.count, "infinite_llm.context_tokens": item.sequence.computed}
            )
            work = _Work()
            work.add(step_s, attention, answers)
            work.describe(chunk)
            chunk.end()
            traced.prefilled = item.samples

    def preempted(self, sequence: Sequence, reason: str) -> None:
        traced = self._traced.get(sequence)
        if traced is None:
            return
        self._end_stage(traced)
        traced.compute.add_event("preempted", {"reason": reason})
        traced.queue, traced.prefilled = self._begin(sequence, "queue"), False

    def ended(self, sequence: Sequence, end: str) -> None:
        traced = self._traced.pop(sequence, None)
        if traced is None:
            return
        self._end_stage(traced)
        traced.compute.set_attribute("gen_ai.usage.output_tokens", sequence.generated)
        if end in _GOOD_ENDS:
            traced.compute.set_attribute("gen_ai.response.finish_reasons", (end,))
        else:
            traced.compute.set_attribute("error.type", end)
            traced.compute.set_status(Status(StatusCode.ERROR, end))
        traced.compute.end()

    def _begin(self, sequence: Sequence, name: str, begun_ns: int | None = None) -> Span:
        """A child of the request's span."""
        assert sequence.trace is not None, "it is traced"
        return self._tracer.start_span(name, under(sequence.trace), start_time=begun_ns)

    def _end_stage(self, traced: _Traced) -> None:
        if traced.queue is not None:
            traced.queue.end()
        if traced.decode is not None:
            traced.decoding.describe(traced.decode)
            traced.decode.end()
        traced.queue, traced.decode, traced.decoding = None, None, _Work()
