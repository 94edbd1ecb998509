"""What an engine tells of a traced request: its stages, what was summed up over steps, and how it ended."""

from __future__ import annotations

import time

from spans import CALLER, Recorder, context_of, parent_of, told

from services.core.sequence import Request, SamplingParams, Sequence
from services.core.trace_context import TraceContext
from services.dataplane.peers import AnswerTimes
from services.instance.engine_traces import EngineTraces
from services.instance.scheduler import Scheduled
from services.instance.step_timings import AttentionTimes

PROMPT = 10
TIMES = AttentionTimes(attention_s=3e-3, local_attention_s=1e-3)
ANSWERS = {"b": AnswerTimes(2, 1e-3, 0), "a": AnswerTimes(2, 2e-3, 0)}


def sequence(trace: TraceContext | None = CALLER) -> Sequence:
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=9)
    return Sequence(Request("r", tuple(range(PROMPT)), PROMPT, sampling, 0.0, 1, trace=trace))


class Told:
    """An engine's steps of one sequence, without the engine."""

    def __init__(self, of: Sequence) -> None:
        self.recorder = Recorder()
        self.traces = EngineTraces(self.recorder.tracer)
        self.sequence = of
        self.traces.submitted(of)

    def step(self, count: int) -> None:
        item = Scheduled(self.sequence, count)
        draws = item.samples
        self.traces.step([item, Scheduled(sequence(None), 1)], time.perf_counter() - 0.01, TIMES, ANSWERS)
        self.sequence.computed += count
        if draws:
            self.sequence.tokens.append(7)


def test_stages_and_their_sums() -> None:
    run = Told(sequence())
    run.traces.admitted(run.sequence, 3, 2)
    for count in (6, 4, 1, 1, 1):
        run.step(count)
    run.traces.ended(run.sequence, "length")
    assert [span.name for span in run.recorder.spans] == ["queue", *["prefill chunk"] * 2, "decode", "compute"]
    queue, first, second, decode, compute = run.recorder.spans
    assert parent_of(compute) == CALLER
    assert {parent_of(span) for span in (queue, first, second, decode)} == {context_of(compute)}
    assert run.sequence.trace == context_of(compute)
    assert told(queue)["infinite_llm.remote_blocks"] == 2
    sizes = [(told(s)["infinite_llm.context_tokens"], told(s)["infinite_llm.tokens"]) for s in (first, second)]
    assert sizes == [(0, 6), (6, 4)]
    sums = told(decode)
    assert (sums["infinite_llm.steps"], sums["infinite_llm.remote_queries"]) == (3, 12)
    assert sums["infinite_llm.kvdaemons"] == ("a", "b")
    assert abs(float(str(sums["infinite_llm.remote_answer_seconds"])) - 9e-3) < 1e-9
    assert abs(float(str(sums["infinite_llm.attention_seconds"])) - 9e-3) < 1e-9
    assert told(compute)["gen_ai.usage.output_tokens"] == 4
    assert told(compute)["gen_ai.response.finish_reasons"] == ("length",)


def test_a_preempted_request_waits_and_is_computed_anew() -> None:
    run = Told(sequence())
    run.traces.admitted(run.sequence, 1, 0)
    run.step(PROMPT)
    run.step(1)
    run.traces.preempted(run.sequence, "memory")
    run.sequence.computed = 0
    run.traces.admitted(run.sequence, 1, 0)
    run.step(12)  # the last token of it is drawn from
    run.traces.ended(run.sequence, "aborted")
    assert [span.name for span in run.recorder.spans] == [
        *("queue", "prefill chunk", "decode", "queue", "prefill chunk", "compute")
    ]
    compute = run.recorder.spans[-1]
    assert [(event.name, dict(event.attributes or {})) for event in compute.events] == [
        ("preempted", {"reason": "memory"})
    ]
    assert compute.status.is_ok


def test_a_refused_request_ends_with_its_reason() -> None:
    run = Told(sequence())
    run.traces.ended(run.sequence, "CONTEXT_TOO_LONG")
    queue, compute = run.recorder.spans
    assert (queue.name, compute.name) == ("queue", "compute")
    assert not compute.status.is_ok
    assert told(compute)["error.type"] == "CONTEXT_TOO_LONG"


def test_nothing_is_told_of_others() -> None:
    run = Told(sequence(trace=None))
    run.traces.admitted(run.sequence, 1, 1)
    run.step(PROMPT)
    run.traces.preempted(run.sequence, "memory")
    run.traces.ended(run.sequence, "stop")
    assert run.recorder.spans == []
    assert run.sequence.trace is None
