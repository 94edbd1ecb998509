"""A whole engine in one process: real model, kernels, ledgers and daemon workers, over the loopback transport.

Only the control plane is short-circuited: orders are carried out on the ledgers at once, in the engine's thread.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from services.core.blocks import BlockKeySpace, BlockRef, PoolGeometry
from services.core.errors import ContextTooLongError, PoolExhaustedError
from services.core.sequence import Request, SamplingParams
from services.dataplane.kv_pool import KvPool
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import RemoteAttention
from services.dataplane.transport import Limits
from services.dataplane.wire import Header
from services.instance.control import (
    Abort,
    EndSession,
    LocalSealed,
    Order,
    PeerOpened,
    PromptDeferred,
    PromptRefused,
    PromptReserved,
    Release,
    Replenish,
    Replenished,
    ReservePrompt,
    SealLocal,
    Stop,
    Submit,
)
from services.instance.dist_attention import DistAttention
from services.instance.engine import Engine
from services.instance.memory import BlockMemory
from services.instance.model import load_model
from services.instance.outputs import EngineSnapshot, FailOutput, FinishOutput, Output, TokenOutput
from services.instance.probe import probe
from services.instance.scheduler import Scheduler
from services.kvdaemon.pool_view import PoolView
from services.kvdaemon.segments import StepPlan
from services.kvdaemon.sessions import SharedLedger
from services.kvdaemon.worker import Worker
from services.rmanager.ledger import Ledger

LIMITS = Limits(1 << 20, 8 << 20)


@dataclass(frozen=True)
class Query:
    """One QUERY that a daemon answered.

    Attributes:
        rows: of the longest segment; 1 in decode.
        distance: from the first row of any segment back to the last key of its blocks there, at least.
    """

    layer: int
    window: int
    rows: int
    distance: int


class _RecordingPoolView(PoolView):
    def __init__(self, pool: KvPool, queries: list[Query]) -> None:
        super().__init__(pool, kernels.load("cpu"))
        self._queries = queries

    def attend(self, query: Header, payload: memoryview, plan: StepPlan, max_answer_bytes: int):
        attention = plan.attention
        last = attention.block_pos[attention.block_start[1:].long() - 1] + self._geometry.block_tokens - 1
        distance = int((attention.query_pos - last).min())
        self._queries.append(Query(query.layer, query.window, attention.max_query_len, distance))
        return super().attend(query, payload, plan, max_answer_bytes)


class Daemon:
    """A KV daemon's pool, ledger and worker thread."""

    session_ids = itertools.count(1)

    def __init__(self, hub: LoopbackHub, name: str, geometry: PoolGeometry, blocks: int, mapped: bool) -> None:
        self.name = name
        self.pool = KvPool(blocks * geometry.block_bytes)
        self.shared = SharedLedger(Ledger(self.pool.pool_bytes, lambda: next(Daemon.session_ids)))
        self._geometry, self._mapped = geometry, mapped
        self._epoch = 0
        self.session_id = self.open_session()
        self._transport = LoopbackTransport(hub, name)
        self.address = self._transport.listen()
        self.queries: list[Query] = []
        self.worker = Worker(self._transport, self.shared, _RecordingPoolView(self.pool, self.queries))
        self._thread = threading.Thread(target=self.worker.run, daemon=True)
        self._thread.start()

    def open_session(self) -> int:
        self._epoch += 1
        with self.shared as ledger:
            self.session_id = ledger.open_session("i", self._epoch, self._geometry, self._mapped).session_id
        return self.session_id

    def revoke(self) -> None:
        """Ends the session, as after a silence."""
        with self.shared as ledger:
            ledger.close_session(self.session_id)
        self.worker.sessions_ended()

    def stop(self) -> None:
        self.worker.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()


class EngineRig:
    """An engine with its local pool and any number of lenders, in a thread of its own. Pools are given in blocks."""

    def __init__(
        self,
        model: Path,
        *,
        local_blocks: int = 64,
        lenders: SequenceOf[int] = (),
        workspace: int = 8,
        max_num_seqs: int = 4,
        max_batch_tokens: int = 128,
        block_tokens: int = 64,
        dtype: str = "float32",
    ) -> None:
        torch.set_num_threads(1)
        hub = LoopbackHub()
        attention_kernels = kernels.load("cpu")
        self.model = load_model(model, dtype, None)
        probe(self.model, attention_kernels, block_tokens, dtype)
        geometry = self.model.shape.geometry(block_tokens, dtype)
        self.local = Daemon(hub, "local", geometry, local_blocks, mapped=True)
        self.lenders = [Daemon(hub, f"lender-{n}", geometry, blocks, False) for n, blocks in enumerate(lenders)]
        self._opened: set[str] = set()
        peers = PeerSet(LoopbackTransport(hub, "instance"), LIMITS, query_room=1 << 20)
        remote = RemoteAttention(peers, attention_kernels, dtype, timeout_s=20.0)
        pool = self.local.pool.as_tensor(geometry)
        attention = DistAttention(attention_kernels, pool, remote)
        attention.attach_to(self.model.module)
        with self.local.shared as ledger:
            blocks = ledger.reserve(self.local.session_id, workspace, workspace, workspace=True)
        space = BlockKeySpace("m", dtype, (0, geometry.kv_heads))
        memory = BlockMemory(
            geometry, space, self.model.rotary, pool, blocks, "local", self.local.session_id, peers, remote, self
        )
        scheduler = Scheduler(max_num_seqs, max_batch_tokens)
        self.outputs: list[Output] = []
        self.engine = Engine(
            self.model, attention, remote, peers, memory, scheduler, self, self.outputs.extend, self._take_snapshot
        )
        self.snapshot = EngineSnapshot()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> EngineRig:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.post(Stop())
        self._thread.join(30)
        for daemon in (self.local, *self.lenders):
            daemon.stop()
        assert self.failure is None, self.failure
        assert not self._thread.is_alive()

    def submit(
        self, name: str, tokens: SequenceOf[int], max_tokens: int, stream_id: int = 1, **sampling: object
    ) -> None:
        params = SamplingParams(**{"temperature": 0.0, "seed": 1, "max_tokens": max_tokens, **sampling})  # type: ignore[arg-type]
        self.engine.post(Submit(Request(name, tuple(tokens), len(tokens), params, time.time(), stream_id)))

    def abort(self, name: str, stream_id: int = 1) -> None:
        self.engine.post(Abort(name, stream_id))

    def wait(self, *names: str, timeout_s: float = 60.0) -> None:
        """Until these requests have ended."""
        self.wait_until(lambda: set(names) <= self.ended(), timeout_s)

    def wait_until(self, condition: object, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():  # type: ignore[operator]
            assert self.failure is None, self.failure
            assert time.monotonic() < deadline, f"timed out; ended so far: {self.ended()}"
            time.sleep(0.005)

    def ended(self) -> set[str]:
        return {output.request_id for output in self.outputs if isinstance(output, FinishOutput | FailOutput)}

    def tokens(self, name: str) -> list[int]:
        return [o.token_id for o in self.outputs if isinstance(o, TokenOutput) and o.request_id == name]

    def finish(self, name: str) -> FinishOutput:
        return next(o for o in self.outputs if isinstance(o, FinishOutput) and o.request_id == name)

    def check_nothing_held(self) -> None:
        """All pools are free or cached, apart from the workspace, and every ledger is sound."""

        def free() -> bool:
            return all(stats.in_use == stats.reserved == 0 for stats in self.stats())

        self.wait_until(free, 10)
        for daemon in (self.local, *self.lenders):
            with daemon.shared as ledger:
                assert ledger.check_integrity() == []

    def stats(self):
        answers = []
        for daemon in (self.local, *self.lenders):
            with daemon.shared as ledger:
                answers.append(ledger.stats())
        return answers

    def _run(self) -> None:
        try:
            self.engine.run()
        except BaseException as failure:
            self.failure = failure

    def _take_snapshot(self, snapshot: EngineSnapshot) -> None:
        self.snapshot = snapshot

    # ------------------------------------------------------------ the control plane, short-circuited

    def order(self, order: Order) -> None:
        match order:
            case ReservePrompt():
                self.engine.post(self._reserve(order))
            case SealLocal(blocks):
                with self.local.shared as ledger:
                    own = [handle for handle, _ in blocks]
                    now = ledger.seal(self.local.session_id, own, [key for _, key in blocks])
                self.engine.post(LocalSealed(tuple(zip(own, now, strict=True))))
            case Release(kvdaemon_id, session_id, handles):
                daemon = self._daemon(kvdaemon_id)
                if session_id != daemon.session_id:
                    return
                with daemon.shared as ledger:
                    ledger.release(daemon.session_id, handles)
            case Replenish(count):
                local = self._take(self.local, count, workspace=True)
                self.engine.post(Replenished(tuple(local), tuple(self._borrow(count - len(local)))))
            case EndSession(kvdaemon_id, session_id, _):
                daemon = self._daemon(kvdaemon_id)
                if session_id != daemon.session_id:
                    return
                with daemon.shared as ledger:
                    if not ledger.revoked(daemon.session_id):
                        ledger.close_session(daemon.session_id)
                self._opened.discard(kvdaemon_id)
                daemon.open_session()

    def _reserve(self, order: ReservePrompt) -> PromptReserved | PromptDeferred | PromptRefused:
        capacity = sum(s.total - s.workspace for s in self.stats())
        if order.max_blocks > capacity:
            return PromptRefused(order.age.request_id, order.attempt, ContextTooLongError("too long for this rig"))
        attached: list[BlockRef] = []
        with self.local.shared as ledger:
            found = dict(ledger.attach(self.local.session_id, order.keys))
            for index in range(len(order.keys)):
                if index not in found:
                    break
                attached.append(BlockRef("local", found.pop(index)))
            ledger.release(self.local.session_id, list(found.values()))
        missing = order.full_blocks - len(attached)
        local = self._take(self.local, missing, workspace=False)
        remote = self._borrow(missing - len(local))
        if len(local) + len(remote) == missing:
            return PromptReserved(order.age.request_id, order.attempt, tuple(attached), tuple(local), tuple(remote))
        with self.local.shared as ledger:
            ledger.release(self.local.session_id, [*local, *(ref.handle for ref in attached)])
        for ref in remote:
            daemon = self._daemon(ref.kvdaemon_id)
            with daemon.shared as ledger:
                ledger.release(daemon.session_id, [ref.handle])
        return PromptDeferred(order.age.request_id, order.attempt)

    def _take(self, daemon: Daemon, count: int, workspace: bool):
        try:
            with daemon.shared as ledger:
                return ledger.reserve(daemon.session_id, count, 1, workspace=workspace) if count else []
        except PoolExhaustedError:
            return []

    def _borrow(self, count: int) -> list[BlockRef]:
        refs: list[BlockRef] = []
        for daemon in self.lenders:
            taken = self._take(daemon, count - len(refs), workspace=False)
            refs += [BlockRef(daemon.name, handle) for handle in taken]
            if taken and daemon.name not in self._opened:
                self._opened.add(daemon.name)
                self.engine.post(PeerOpened(daemon.name, daemon.address, daemon.session_id))
        return refs

    def _daemon(self, name: str) -> Daemon:
        return next(daemon for daemon in (self.local, *self.lenders) if daemon.name == name)
