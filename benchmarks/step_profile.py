"""``python -m benchmarks.step_profile``: where the time of a decode step goes, without and with the passes.

A whole engine runs in this process, with a gateway's stream on the event loop beside it. Its parts are timed where they
are called, each without those it calls in turn, in CPU time of the engine's thread: what other processes do at the same
time counts as little as it can. A row is the median over the steps that decode the whole batch; engines without passes,
with all, and with all but the last one, which leaves nothing to time between layers, run in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.checkpoints import SHAPES, write_random_checkpoint
from benchmarks.harness import Run, main
from benchmarks.local_engine import LocalEngine
from infinitellm.internal.v1 import instance_pb2 as pb
from kernels import LayerParams
from kernels.layer_ops import LayerAngles
from kernels.layer_stack import LayerStack
from services.instance import engine as engine_module
from services.instance.dist_attention import AttentionContext
from services.instance.model import Model, load_model
from services.instance.outputs import Output
from services.instance.passes import PASSES
from services.instance.passes.apply import apply_passes
from services.instance.passes.layers import WholeLayer
from services.instance.passes.linears import PackedLinear
from services.instance.scheduler import Scheduled
from services.instance.servicer import InstanceServicer

QUESTION = "where does the time of a decode step go?"
BATCHES = (1, 64)
_DTYPE = "bfloat16"
_PROMPT = 192  # tokens; answers go on behind them
_STEPS = 48
_QUICK_STEPS = 24  # more than it takes until all prompts are computed
_REPETITIONS = 5
_CHUNK = 1024
_PASSES = {"none": (), f"all but {PASSES[-1]}": PASSES[:-1], "all": PASSES}
_REST = "engine: events, scheduling, blocks, commit"


class Stopwatch:
    """Exclusive times of nested calls, step by step. One thread."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._since = 0.0
        self._now: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []  # part: seconds

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted for ``part``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._stack.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._stack.pop()

        return timed

    def end_step(self, keep: bool) -> None:
        """All time since the last step has ended belongs to this one."""
        self._switch()
        if keep:
            self.steps.append(self._now)
        self._now = {}

    def _switch(self) -> None:
        now = time.thread_time()
        part = self._stack[-1] if self._stack else _REST
        self._now[part] = self._now.get(part, 0.0) + now - self._since
        self._since = now


class _TimedAttention(AttentionContext):
    def __init__(self, stopwatch: Stopwatch, attention: AttentionContext) -> None:
        self._call = stopwatch.wrap("attention", attention)
        self._of_rows = stopwatch.wrap("attention", attention.of_rows)
        self._through = stopwatch.wrap("model: layers and their attention, one call", attention.through)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        out: Tensor = self._call(q, k, v, params, sinks)
        return out

    def of_rows(
        self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None, rows: Tensor
    ) -> Tensor:
        out: Tensor = self._of_rows(q, k, v, params, sinks, rows)
        return out

    def through(self, stack: LayerStack, x: Tensor, angles: Sequence[LayerAngles]) -> Tensor | None:
        out: Tensor | None = self._through(stack, x, angles)
        return out


class _Gateway(threading.Thread):
    """The event loop of an instance with one gateway's stream, up to where gRPC begins."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        super().__init__(name="gateway", daemon=True)
        self._shape = model.shape
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._servicer: InstanceServicer | None = None
        self._engine: asyncio.Future[engine_module.Engine] | None = None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.cpu_s = 0.0  # of the event loop's thread, while the engine was running

    def publish(self, outputs: list[Output]) -> None:
        assert self._servicer is not None
        self._servicer.publish(outputs)

    def serve(self, engine: engine_module.Engine) -> None:
        assert self._engine is not None
        self._loop.call_soon_threadsafe(self._engine.set_result, engine)

    def start(self) -> None:
        super().start()
        self._ready.wait()

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._servicer = InstanceServicer(self._shape.vocab_size, self._shape.max_model_len)
        self._engine = self._loop.create_future()
        self._ready.set()
        self._servicer.serve(await self._engine)
        finished, begin = 0, time.thread_time()
        context: Any = None  # Serve does not look at it
        stream: Any = self._servicer.Serve(self._requests(), context)  # an async generator
        async with aclosing(stream) as responses:
            async for response in responses:
                response.SerializeToString()
                finished += len(response.finished)
                if finished == len(self._prompts):
                    break
            self.cpu_s = time.thread_time() - begin

    async def _requests(self) -> AsyncIterator[pb.ServeRequest]:
        for number, prompt in enumerate(self._prompts):
            submit = pb.SubmitRequest(
                request_id=f"request-{number}",
                token_ids=prompt,
                prompt_tokens=len(prompt),
                max_tokens=self._max_tokens,
                arrival_time=time.time(),
            )
            yield pb.ServeRequest(submit=submit)
        await asyncio.Event().wait()


@dataclass(slots=True)
class _Engine:
    """One of those that are compared, and what was measured of it."""

    name: str
    model: Model
    steps: list[dict[str, float]] = field(default_factory=list)
    event_loop_s: list[float] = field(default_factory=list)  # each of a run, for a step


def measure(run: Run) -> None:
    torch.set_num_threads(run.options.threads)
    for name in run.options.models:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / name
            run.progress.update(f"{name}: making the checkpoint")
            write_random_checkpoint(path, SHAPES[name])
            models = {passes: load_model(path, _DTYPE, None) for passes in _PASSES}
        for passes, model in models.items():
            apply_passes(model, _PASSES[passes], run.options.threads)
        for batch in run.options.batches:
            engines = [_Engine(passes, model) for passes, model in models.items()]
            for turn in run.rounds(_REPETITIONS):
                for engine in turn.order(engines):
                    run.progress.update(f"{name}, batch {batch}, {turn.label}: passes: {engine.name}")
                    steps, event_loop_s = _profile(run, engine.model, batch)
                    if turn.recorded:
                        engine.steps += steps
                        engine.event_loop_s.append(event_loop_s)
            _report(run, name, batch, engines)


def _profile(run: Run, model: Model, batch: int) -> tuple[list[dict[str, float]], float]:
    """One engine from beginning to end: its steps, and the event loop's CPU time for one."""
    count = _QUICK_STEPS if run.quick else _STEPS
    choose = random.Random(batch)
    prompts = [choose.choices(range(model.shape.vocab_size), k=_PROMPT) for _ in range(batch)]
    stopwatch = Stopwatch()
    gateway = _Gateway(model, prompts, count)
    gateway.start()
    local = LocalEngine(
        model,
        _DTYPE,
        num_threads=run.options.threads,
        max_num_seqs=batch,
        max_batch_tokens=_CHUNK,
        context=_PROMPT + count,
        publish=stopwatch.wrap("publishing", gateway.publish),
    )
    _TimedAttention(stopwatch, local.attention).attach_to(model.module)
    engine: Any = local.engine
    step = engine._step

    def whole_step(scheduled: Sequence[Scheduled], *arguments: object) -> None:
        step(scheduled, *arguments)
        stopwatch.end_step(len(scheduled) == batch and all(item.count == 1 for item in scheduled))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(engine, "_step", whole_step))
        for part, owner, name in (
            ("step's plan", engine_module, "build_batch"),
            ("sampling", engine._sampler, "draw"),
            ("model: all else", model, "forward"),
            *_model_parts(model),
        ):
            patches.enter_context(mock.patch.object(owner, name, stopwatch.wrap(part, getattr(owner, name))))
        gateway.serve(local.engine)
        local.run(batch)
    gateway.join(10)
    return stopwatch.steps, gateway.cpu_s / count


def _model_parts(model: Model) -> Iterator[tuple[str, object, str]]:
    """Part of the profile, object and the name of its method, for all that is timed inside of a model."""
    for module in model.module.modules():
        if isinstance(module, nn.Linear | PackedLinear):
            yield "model: products", module, "forward"
        elif isinstance(module, WholeLayer):
            yield "model: whole layers without attention", module.op, "begin"
            yield "model: whole layers without attention", module.op, "finish"
        elif "norm" in type(module).__name__.lower():
            yield "model: norms", module, "forward"


def _report(run: Run, name: str, batch: int, engines: Sequence[_Engine]) -> None:
    totals = [statistics.median(sum(step.values()) for step in engine.steps) for engine in engines]
    for engine, total in zip(engines, totals, strict=True):
        common: dict[str, str | int | float] = {"model": name, "batch": batch, "passes": engine.name}
        for part in sorted({part for step in engine.steps for part in step}):
            seconds = statistics.median(step.get(part, 0.0) for step in engine.steps)
            run.row({**common, "part": part, "step_ms": 1e3 * seconds, "share": seconds / total})
        run.row({**common, "part": "whole step", "step_ms": 1e3 * total, "share": 1.0})
        seconds = statistics.median(engine.event_loop_s)
        run.row({**common, "part": "(event loop's thread)", "step_ms": 1e3 * seconds, "share": seconds / total})
    run.summary(f"speedup_{name}_batch_{batch}", totals[0] / totals[-1])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, metavar="N")
    parser.add_argument("--threads", type=int, default=1)


if __name__ == "__main__":
    sys.exit(main("step_profile", QUESTION, measure, _add_arguments))
