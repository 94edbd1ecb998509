"""The engine: one thread that owns the model, the sequences, their blocks and the data plane.

A round of its loop: take events, settle blocks, schedule, run the model, commit, publish. A step is a transaction:
lengths, sealed blocks and samples are committed after the last layer. If a daemon is lost in between, the step is
discarded; sequences with blocks on that daemon are computed anew from their tokens, the others are planned again.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from services.core.errors import InfiniteLLMError, InvalidRequestError, PeerLostError, TransferTimeoutError
from services.core.placement import MOST_WAITING_TOLD, RunningRequest, WaitingRequest
from services.core.sequence import RequestAge, Sequence
from services.dataplane.device import Device
from services.dataplane.host_device import HostDevice
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import RemoteAttention
from services.instance.admission import RETRY_S, Admission
from services.instance.batch import build_batch
from services.instance.control import (
    Abort,
    AbortStream,
    BeginMove,
    Control,
    CopiesSealed,
    EndSession,
    EngineEvent,
    LocalSealed,
    MoveReserved,
    PeerOpened,
    PromptDeferred,
    PromptRefused,
    PromptReserved,
    Replenished,
    Stop,
    Submit,
)
from services.instance.dist_attention import DistAttention
from services.instance.engine_metrics import EngineMetrics, PreemptionReason
from services.instance.engine_traces import NoTraces, Traces
from services.instance.forward import Forward
from services.instance.memory import BlockMemory
from services.instance.model import Model
from services.instance.outputs import EngineSnapshot, FailOutput, FinishOutput, Output, ProgressOutput, TokenOutput
from services.instance.prompt_logprobs import prompt_outputs, sampled_logits
from services.instance.sampler import Sample, Sampler
from services.instance.scheduler import Scheduled, Scheduler, one_gives_way_soon
from services.instance.step_timings import StepTimings
from services.runtime.grammars import Grammars

_log = logging.getLogger(__name__)
_IDLE_WAIT_S = 0.5  # longest wait for an event; only bounds how late a missed wake-up would be noticed
_YIELD_S = 0.5  # a request that gave way lets others reserve first
_PATIENCE_S = (5.0, 15.0)  # between these, stuck with nobody known to give way to, one gives way all the same
_PUBLISH_IDLE_S = 0.2  # how old the snapshot may get while nothing happens


class Engine:
    """Computes requests. ``post`` may be called from any thread; everything else happens in ``run``'s thread.

    Args:
        publish: gets all outputs of a step at once; called by the engine thread, must not block.
        publish_snapshot: gets a new snapshot after a change, at most every few steps; likewise.
        metrics: what the engine counts; None where nobody asks.
        traces: what it tells of single requests; None likewise.
        grammars: of the model's tokenizer, for structured outputs; None refuses them.
        device: that has the model and the pool; the CPU where none is given.
        forward: computes the steps; None: this process does alone.
    """

    def __init__(
        self,
        model: Model,
        attention: DistAttention,
        remote: RemoteAttention,
        peers: PeerSet,
        memory: BlockMemory,
        scheduler: Scheduler,
        control: Control,
        publish: Callable[[list[Output]], None],
        publish_snapshot: Callable[[EngineSnapshot], None],
        metrics: EngineMetrics | None = None,
        traces: Traces | None = None,
        grammars: Grammars | None = None,
        device: Device | None = None,
        forward: Forward | None = None,
    ) -> None:
        self._model = model
        self._device = device or HostDevice()
        self._forward = forward or Forward(model, attention, remote, self._device)
        self._attention = attention
        self._remote = remote
        self._peers = peers
        self._memory = memory
        self._scheduler = scheduler
        self._control = control
        self._publish = publish
        self._publish_snapshot = publish_snapshot
        self._metrics = metrics or EngineMetrics(CollectorRegistry())
        self._traces = traces or NoTraces()
        self._inbox: deque[EngineEvent] = deque()
        self._sequences: dict[str, Sequence] = {}
        self._admission = Admission(scheduler, memory, control, model.shape.max_model_len)
        self._stuck_since: float | None = None  # monotonic: nobody could take a step for want of blocks
        self._patience_s = 0.0
        self._steps = 0
        self._sampler = Sampler(model.shape.vocab_size, grammars)
        self._outputs: list[Output] = []
        self._snapshot_at = 0.0
        self.timings = StepTimings()
        self._stopping = threading.Event()

    def post(self, event: EngineEvent) -> None:
        """Puts an event into the inbox and wakes the engine."""
        self._inbox.append(event)
        self._peers.wake()

    def run(self) -> None:
        """The loop; returns after ``Stop``."""
        self._device.enter_thread()
        while not self._stopping.is_set():
            begun = time.perf_counter()
            self._take_events()
            self._settle_peers()
            self._memory.tick()
            self._admission.tick()
            batch = self._scheduler.schedule(self._memory.grow)
            if (self._scheduler.lacks_blocks or not batch) and self._make_room(stuck=not batch):
                batch = self._scheduler.schedule(self._memory.grow)
            if batch:
                self._stuck_since = None
                self._step(batch, begun)
            self._flush()
            self._peers.poll(0.0 if batch else self._idle_wait())
        self._peers.close()

    def _step(self, scheduled: list[Scheduled], begun: float) -> None:
        """One transaction: plan, forward, sample, commit. ``begun`` (perf_counter): the round it belongs to."""
        tables = [self._memory.table(item.sequence) for item in scheduled]
        batch = build_batch(scheduled, tables, self._model.rotary, self._model.shape.attention.reach)
        self._steps += 1
        try:
            logits = self._forward.run(self._steps, batch)
        except (PeerLostError, TransferTimeoutError) as error:
            _log.warning("step discarded", extra={"step": self._steps, "why": str(error)})
            self._metrics.discarded_step()
            return
        self._traces.step(scheduled, begun, self._attention.times, self._remote.answers)
        sampled = [item.sequence for item in scheduled if item.samples]
        samples = iter(self._sampler.draw(sampled_logits(logits, scheduled), sampled))
        self._outputs += prompt_outputs(logits, scheduled)
        for item in scheduled:
            samples_now = item.samples
            self._memory.commit(item.sequence, item.sequence.computed + item.count)
            if samples_now:
                self._append(item.sequence, next(samples))
            elif not item.sequence.pending:  # nothing is drawn: its prompt was to be scored
                self._finish(item.sequence, "length")
            elif item.sequence.request.progress:
                self._progress(item.sequence)
        step_s = time.perf_counter() - begun
        self._scheduler.took(scheduled, step_s)
        self.timings.add(scheduled, tables, step_s, self._attention.times, self._remote.answers)
        self._metrics.step(scheduled, step_s, self._attention.times, self._remote.merge_s)

    def _append(self, sequence: Sequence, drawn: Sample | InvalidRequestError) -> None:
        request = sequence.request
        if isinstance(drawn, InvalidRequestError):
            self._fail(sequence, drawn)
            return
        if request.progress and sequence.generated == 0:
            self._progress(sequence)
        sequence.tokens.append(drawn.token_id)
        self._outputs.append(
            TokenOutput(request.request_id, request.stream_id, drawn.token_id, drawn.logprobs, sequence.cached_tokens)
        )
        if drawn.token_id in request.sampling.stop_token_ids:
            self._finish(sequence, "stop")
        elif (
            sequence.generated >= request.sampling.max_tokens or len(sequence.tokens) >= self._model.shape.max_model_len
        ):
            self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        request = sequence.request
        self._outputs.append(FinishOutput(request.request_id, request.stream_id, reason))
        self._drop(sequence, reason, by_itself=True)
        _log.info(
            "request finished",
            extra={"request_id": request.request_id, "reason": reason, "generated": sequence.generated},
        )

    def _fail(self, sequence: Sequence, error: InfiniteLLMError) -> None:
        self._outputs.append(FailOutput(sequence.request_id, sequence.request.stream_id, error))
        self._drop(sequence, error.reason)

    def _progress(self, sequence: Sequence) -> None:
        request = sequence.request
        self._outputs.append(
            ProgressOutput(request.request_id, request.stream_id, sequence.computed, len(sequence.tokens))
        )

    def _drop(self, sequence: Sequence, end: str, by_itself: bool = False) -> None:
        """The request is over, for whatever reason: everything it holds is given up."""
        self._traces.ended(sequence, end)
        self._scheduler.remove(sequence)
        self._sampler.forget(sequence)
        del self._sequences[sequence.request_id]
        self._admission.ended(sequence, by_itself)
        self._memory.release(sequence)

    # ------------------------------------------------------------ memory

    def _reserved(self, event: PromptReserved) -> None:
        sequence = self._admission.reserved(event)
        if sequence is None:
            return
        self._traces.admitted(sequence, len(event.local), len(event.remote))
        _log.info(
            "request admitted",
            extra={
                "request_id": sequence.request_id,
                "tokens": len(sequence.tokens),
                "cached_tokens": sequence.cached_tokens,
                "local_blocks": len(event.local),
                "remote_blocks": len(event.remote),
            },
        )

    def _make_room(self, stuck: bool) -> bool:
        """Not everybody here could take a step. If that is for want of blocks and none will come free, one gives way.

        That is whoever has least to compute anew, but never the oldest: at once if that is soon done, otherwise when
        nobody could take a step (``stuck``). The last one here gives way only to an older request elsewhere that
        starves as well; so of all requests in the cluster that wait for each other's blocks, the oldest goes on. Where
        no gManager says who that is, patience ends at a random time, so that one gives way first.
        """
        running, now = self._scheduler.running, time.monotonic()
        if not (running and self._memory.starved) or self._memory.settling:
            return False
        if not (stuck or one_gives_way_soon(running)):
            return False
        if stuck and self._stuck_since is None:
            self._stuck_since, self._patience_s = now, random.uniform(*_PATIENCE_S)
        victim, older = self._scheduler.cheapest_to_preempt(), self._memory.oldest_starving
        gives_way = len(running) > 1 or (older is not None and older < victim.age)
        if not gives_way and (self._stuck_since is None or now - self._stuck_since <= self._patience_s):
            return False
        _log.info("request preempted", extra={"request_id": victim.request_id, "tokens": len(victim.tokens)})
        self._preempted(victim, "memory")
        self._stuck_since = None
        self._admission.pause(_YIELD_S)
        return True

    def _preempted(self, sequence: Sequence, reason: PreemptionReason) -> None:
        """A running request gives up its blocks and waits again."""
        self._memory.release(sequence)
        self._scheduler.preempt(sequence)
        self._metrics.preempted(reason)
        self._traces.preempted(sequence, reason)

    def _settle_peers(self) -> None:
        """Sequences with blocks on a lost daemon are computed anew from their tokens."""
        for lost in self._peers.take_lost():
            self._control.order(EndSession(lost.kvdaemon_id, lost.session_id, lost.reason))
            affected = self._memory.peer_lost(lost.kvdaemon_id)
            _log.warning(
                "kvdaemon lost",
                extra={
                    "kvdaemon": lost.kvdaemon_id,
                    "why": lost.reason,
                    "recomputed_requests": [sequence.request_id for sequence in affected],
                },
            )
            for sequence in affected:
                self._preempted(sequence, "kvdaemon_lost")

    # ------------------------------------------------------------ events

    def _take_events(self) -> None:
        while self._inbox:
            self._take(self._inbox.popleft())

    def _take(self, event: EngineEvent) -> None:
        match event:
            case Submit(request):
                # A gateway that gave up on its stream may submit a request again before we know of it, and what was
                # sent by the old stream may be read after that.
                known = self._sequences.get(request.request_id)
                if known is not None:
                    if known.request.stream_id > request.stream_id:
                        return
                    self._drop(known, "replaced")
                sequence = Sequence(request)
                self._sequences[request.request_id] = sequence
                self._scheduler.add(sequence)
                self._traces.submitted(sequence)
            case Abort(request_id, stream_id):
                aborted = self._sequences.get(request_id)
                if aborted is not None and aborted.request.stream_id == stream_id:
                    self._drop(aborted, "aborted")
                    _log.info("request aborted", extra={"request_id": request_id})
            case AbortStream(stream_id):
                for sequence in [s for s in self._sequences.values() if s.request.stream_id == stream_id]:
                    self._drop(sequence, "aborted")
            case PromptReserved():
                self._reserved(event)
            case PromptDeferred():
                self._admission.deferred(event)
            case PromptRefused():
                refused = self._admission.refused(event)
                if refused is not None:
                    self._fail(refused, event.error)
            case LocalSealed():
                self._memory.sealed(event)
            case Replenished():
                self._memory.replenished(event)
            case CopiesSealed():
                self._memory.copies_sealed(event)
            case BeginMove():
                self._memory.begin_move(event, self._sequences.get(event.request_id))
            case MoveReserved():
                self._memory.move_reserved(event)
            case PeerOpened(kvdaemon_id, address, session_id, offers):
                self._peers.disconnect(kvdaemon_id, "a new session replaces it")
                self._settle_peers()
                self._peers.connect(kvdaemon_id, address, session_id, offers)
            case Stop():
                self._stopping.set()

    def _idle_wait(self) -> float:
        """How long nothing can happen without an event."""
        if self._inbox or self._stopping.is_set():
            return 0.0
        waits_for_room = self._scheduler.running or self._scheduler.waiting
        return RETRY_S if waits_for_room else _IDLE_WAIT_S

    def _flush(self) -> None:
        """Publishes what the round brought."""
        changed = bool(self._outputs)
        if changed:
            outputs, self._outputs = self._outputs, []
            self._publish(outputs)
        now = time.monotonic()
        if now - self._snapshot_at >= _PUBLISH_IDLE_S or (changed and not self._scheduler.running):
            self._snapshot_at = now
            running = self._scheduler.running
            placement = tuple((s.request_id, self._memory.placement(s)) for s in running)
            waiting = self._scheduler.waiting
            self._publish_snapshot(
                EngineSnapshot(
                    len(running),
                    len(waiting),
                    placement,
                    self._oldest_starving(),
                    tuple(self._told_of(sequence) for sequence in running),
                    tuple(self._told_of_waiting(sequence) for sequence in waiting[:MOST_WAITING_TOLD]),
                )
            )

    def _told_of(self, sequence: Sequence) -> RunningRequest:
        request, size = sequence.request, self._memory.geometry.block_tokens
        blocks = sequence.computed // size
        return RunningRequest(request.request_id, request.arrival_time, blocks * size, self._final_tokens(sequence))

    def _told_of_waiting(self, sequence: Sequence) -> WaitingRequest:
        tokens = len(sequence.tokens)
        return WaitingRequest(tokens, self._final_tokens(sequence) - tokens)

    def _final_tokens(self, sequence: Sequence) -> int:
        """The length of the sequence's context in the end, unless a stop token ends it before."""
        request = sequence.request
        return min(request.prompt_tokens + request.sampling.max_tokens, self._model.shape.max_model_len)

    def _oldest_starving(self) -> RequestAge | None:
        """The oldest request that cannot go on for want of blocks: a running one, or a prompt that found no room."""
        starving = []
        if self._stuck_since is not None:
            starving.append(self._scheduler.running[0].age)
        if (prompt := self._admission.starving) is not None:
            starving.append(prompt)
        return min(starving, default=None)
