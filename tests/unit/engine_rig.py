"""A whole engine in one process: real model, kernels, ledgers and daemon workers, over the loopback transport.

Only the control plane is short-circuited: orders are carried out on the ledgers at once, in the engine's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from engine_daemon import Daemon
from prometheus_client import CollectorRegistry

from services.core.blocks import BlockHandle, BlockKeySpace, BlockRef
from services.core.errors import ContextTooLongError, PoolExhaustedError, SessionRevokedError
from services.core.sequence import Request, SamplingParams
from services.dataplane.device import Device
from services.dataplane.host_device import HostDevice
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.negotiation import Offers
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import RemoteAttention
from services.dataplane.transport import Limits
from services.instance.control import (
    Abort,
    BeginMove,
    CopiesSealed,
    EndMove,
    EndSession,
    LocalSealed,
    MoveReserved,
    Order,
    PeerOpened,
    PromptDeferred,
    PromptRefused,
    PromptReserved,
    Release,
    Replenish,
    Replenished,
    ReserveMove,
    ReservePrompt,
    SealCopies,
    SealLocal,
    Stop,
    Submit,
)
from services.instance.dist_attention import DistAttention
from services.instance.engine import Engine
from services.instance.engine_metrics import EngineMetrics
from services.instance.logprobs import TokenLogprobs
from services.instance.memory import BlockMemory
from services.instance.model import load_model
from services.instance.outputs import EngineSnapshot, FailOutput, FinishOutput, Output, PromptOutput, TokenOutput
from services.instance.passes import PASSES, PassName
from services.instance.passes.apply import apply_passes
from services.instance.probe import probe
from services.instance.recorded_model import record_steps
from services.instance.scheduler import Scheduler
from services.runtime.grammars import Grammars

LIMITS = Limits(1 << 20, 8 << 20)


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
        passes: SequenceOf[PassName] = PASSES,
        grammars: Grammars | None = None,
        max_scored_tokens: int = 128,
        move_bytes_per_s: float = 256 * 2**20,
        device: Device | None = None,
    ) -> None:
        torch.set_num_threads(1)
        hub = LoopbackHub()
        device = device or HostDevice()
        attention_kernels = device.load_kernels(1)
        self.model = load_model(model, dtype, None)
        probe(self.model, attention_kernels, block_tokens, dtype)
        apply_passes(self.model, passes)
        record_steps(self.model, device, max_num_seqs)
        geometry = self.model.shape.geometry(block_tokens, dtype)
        self.local = Daemon(hub, "local", geometry, local_blocks, True, device)
        self.lenders = [Daemon(hub, f"lender-{n}", geometry, blocks, False, device) for n, blocks in enumerate(lenders)]
        self._opened: set[str] = set()
        peers = self.peers = PeerSet(LoopbackTransport(hub, "instance"), LIMITS, query_room=1 << 20)
        remote = self.remote = RemoteAttention(peers, attention_kernels, dtype, 20.0, device)
        pool = self.local.pool.as_tensor(geometry)
        attention = DistAttention(attention_kernels, pool, remote, device)
        attention.attach_to(self.model.module)
        with self.local.shared as ledger:
            blocks = ledger.reserve(self.local.session_id, workspace, workspace, workspace=True)
        space = BlockKeySpace("m", dtype, (0, geometry.kv_heads))
        memory = BlockMemory(
            geometry,
            space,
            self.model.rotary,
            pool,
            blocks,
            "local",
            self.local.session_id,
            peers,
            remote,
            self,
            Offers((self.local.address,)),
            move_bytes_per_s,
            device,
        )
        scheduler = Scheduler(max_num_seqs, max_batch_tokens, max_scored_tokens=max_scored_tokens)
        self.outputs: list[Output] = []
        self.registry = CollectorRegistry()
        self.engine = Engine(
            self.model,
            attention,
            remote,
            peers,
            memory,
            scheduler,
            self,
            self.outputs.extend,
            self._take_snapshot,
            EngineMetrics(self.registry),
            grammars=grammars,
            device=device,
        )
        self.snapshot = EngineSnapshot()
        self.deferred: list[str] = []  # prompts that found no room, once for each attempt
        self.move_ends: dict[str, EndMove] = {}
        self.spared: list[bool] = []  # of each order to replenish: not where others wait
        self.offer_ttl_s, self.use_within_s = 30.0, 15.0
        self._moves: dict[str, BeginMove] = {}
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

    def move(self, request_id: str, source: str, destination: str, blocks: int) -> str:
        """Begins a move and answers its id."""
        move = BeginMove(f"move-{len(self._moves)}", request_id, source, destination, blocks)
        self._moves[move.move_id] = move
        self.engine.post(move)
        return move.move_id

    def moved(self, request_id: str, source: str, destination: str, blocks: int) -> EndMove:
        """A move's end."""
        move_id = self.move(request_id, source, destination, blocks)
        self.wait_until(lambda: move_id in self.move_ends)
        return self.move_ends[move_id]

    def wait(self, *names: str, timeout_s: float = 60.0) -> None:
        """Until these requests have ended."""
        self.wait_until(lambda: set(names) <= self.ended(), timeout_s)

    def wait_until(self, condition: object, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():  # type: ignore[operator]
            assert self.failure is None, self.failure
            assert time.monotonic() < deadline, f"timed out; ended so far: {self.ended()}"
            time.sleep(0.005)

    def bytes_under_way(self, lender: str) -> int:
        """What of a lender's window is taken by messages that it has not answered."""
        return self.peers.get(lender)._bytes_out

    def ended(self) -> set[str]:
        return {output.request_id for output in self.outputs if isinstance(output, FinishOutput | FailOutput)}

    def tokens(self, name: str) -> list[int]:
        return [o.token_id for o in self.outputs if isinstance(o, TokenOutput) and o.request_id == name]

    def cached_tokens(self, name: str) -> int:
        """As told with its first token."""
        return next(o.cached_tokens for o in self.outputs if isinstance(o, TokenOutput) and o.request_id == name)

    def prompt_logprobs(self, name: str) -> list[TokenLogprobs]:
        """Of the prompt's tokens but the first one, each told once and in order."""
        told: list[TokenLogprobs] = []
        for output in self.outputs:
            if isinstance(output, PromptOutput) and output.request_id == name:
                assert output.first == 1 + len(told)
                assert not self._drawn_before(output), "they come before the first token"
                told += output.logprobs
        return told

    def _drawn_before(self, output: PromptOutput) -> bool:
        before = self.outputs[: self.outputs.index(output)]
        return any(isinstance(o, TokenOutput) and o.request_id == output.request_id for o in before)

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
            case SealCopies(kvdaemon_id, session_id, blocks):
                daemon = self._daemon(kvdaemon_id)
                own = [handle for handle, _ in blocks]
                with daemon.shared as ledger:
                    if ledger.revoked(session_id):
                        return
                    now = ledger.seal(session_id, own, [key for _, key in blocks])
                self.engine.post(CopiesSealed(kvdaemon_id, session_id, tuple(zip(own, now, strict=True))))
            case ReserveMove():
                self._reserve_move(order)
            case EndMove():
                self.move_ends[order.move_id] = order
            case Release(kvdaemon_id, session_id, handles):
                daemon = self._daemon(kvdaemon_id)
                if session_id != daemon.session_id:
                    return
                with daemon.shared as ledger:
                    if not ledger.revoked(session_id):
                        ledger.release(session_id, handles)
            case Replenish(count, spare_wanted):
                self.spared.append(spare_wanted)
                local = self._take(self.local, count)
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
        missing = order.full_blocks - len(attached) + 1
        local = self._take(self.local, missing)
        remote = self._borrow(missing - len(local))
        if len(local) + len(remote) == missing:
            tail = BlockRef("local", local.pop()) if local else remote.pop()
            return PromptReserved(
                order.age.request_id, order.attempt, tuple(attached), tuple(local), tuple(remote), tail
            )
        with self.local.shared as ledger:
            ledger.release(self.local.session_id, [*local, *(ref.handle for ref in attached)])
        for ref in remote:
            daemon = self._daemon(ref.kvdaemon_id)
            with daemon.shared as ledger:
                ledger.release(daemon.session_id, [ref.handle])
        self.deferred.append(order.age.request_id)
        fits_here = order.max_blocks <= self.stats()[0].total - self.stats()[0].workspace
        missing -= len(local) + len(remote)
        return PromptDeferred(order.age.request_id, order.attempt, not fits_here, missing)

    def _reserve_move(self, order: ReserveMove) -> None:
        daemon = self._daemon(self._moves[order.move_id].destination_kvdaemon_id)
        with daemon.shared as ledger:
            found = [] if ledger.revoked(daemon.session_id) else ledger.attach(daemon.session_id, order.keys)
        reserved = self._take(daemon, len(order.keys) - len(found), self.offer_ttl_s)
        self._connect(daemon)
        self.engine.post(
            MoveReserved(
                order.move_id,
                daemon.name,
                daemon.session_id,
                tuple(found),
                tuple(reserved),
                time.monotonic(),
                self.use_within_s,
            )
        )

    def _take(self, daemon: Daemon, count: int, ttl_s: float = 0.0) -> list[BlockHandle]:
        try:
            with daemon.shared as ledger:
                return ledger.reserve(daemon.session_id, count, 1, ttl_s=ttl_s) if count else []
        except (PoolExhaustedError, SessionRevokedError):
            return []

    def _borrow(self, count: int) -> list[BlockRef]:
        refs: list[BlockRef] = []
        for daemon in self.lenders:
            taken = self._take(daemon, count - len(refs))
            refs += [BlockRef(daemon.name, handle) for handle in taken]
            if taken:
                self._connect(daemon)
        return refs

    def _connect(self, daemon: Daemon) -> None:
        if daemon is not self.local and daemon.name not in self._opened:
            self._opened.add(daemon.name)
            self.engine.post(PeerOpened(daemon.name, daemon.address, daemon.session_id, Offers((daemon.address,))))

    def _daemon(self, name: str) -> Daemon:
        return next(daemon for daemon in (self.local, *self.lenders) if daemon.name == name)


def check_a_lost_lender(model: Path, device: Device, prompt: SequenceOf[int], max_tokens: int) -> None:
    """A request whose lender is lost in the middle gives the tokens that it gives undisturbed."""
    with EngineRig(model, local_blocks=12, lenders=(10,), workspace=6, device=device) as rig:
        rig.submit("undisturbed", prompt, max_tokens)
        rig.wait("undisturbed")
        rig.submit("r", prompt, max_tokens)
        rig.wait_until(lambda: len(rig.tokens("r")) > 5)
        rig.lenders[0].revoke()
        rig.wait("r")
        assert rig.tokens("r") == rig.tokens("undisturbed")
        rig.check_nothing_held()
