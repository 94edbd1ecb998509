"""Attention over blocks that lie elsewhere: the query travels, exact partial states come back.

For every step: ``begin_step`` tells each daemon the plan; for every layer ``submit`` sends the query rows, the caller
computes its local part meanwhile, and ``collect`` merges what came back. One message per daemon and layer each way.

On a GPU the caller only asks for its local part. Queries that are still on their way to host memory at ``submit`` are
sent at the beginning of ``collect``, which by then has the GPU's whole local part to hide the way there and back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import AttentionKernels, LayerParams
from kernels.cpu.asking import CompiledAsker
from kernels.layer_stack import NOT_BEGUN, LeftAttention
from services.core.errors import PeerLostError, TransferTimeoutError
from services.dataplane import wire
from services.dataplane.device import Device, Download
from services.dataplane.host_device import HostDevice
from services.dataplane.peers import AnswerTimes, Peer, PeerSet
from services.dataplane.wire import Header, Kind, PlanSegment, SegmentTrace

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class PeerShare:
    """What one daemon computes of a step.

    Attributes:
        rows: [n] int64, the batch's rows that its segments hold, ascending; segments lie in the same order.
        segments: the step's segments there, with blocks that are new to it.
        distance: from any row back to the nearest key of its sequence there, at least: a layer whose window is not
            longer sees nothing there, and the daemon is not asked.
        traces: of segments that are new to the daemon, and whose requests are traced.
    """

    kvdaemon_id: str
    rows: Tensor
    segments: Sequence[PlanSegment]
    distance: int
    traces: Sequence[SegmentTrace] = ()


@dataclass(slots=True)
class _Asked:
    """A daemon in a step.

    Attributes:
        rows: the share's, on the device.
        asker: what asks it in compiled code, from the first layer on, where there is such.
    """

    peer: Peer
    share: PeerShare
    rows: Tensor
    asker: CompiledAsker | None = None


class _Waiting(NamedTuple):
    """A query that has no answer yet. ``sent_at``: time.perf_counter."""

    asked: _Asked
    sequence: int
    sent_at: float


class _Query(NamedTuple):
    """A query on its way to host memory."""

    asked: _Asked
    header: Header
    rows: Download


class RemoteAttention:
    """The instance's side of DistAttention. Used by the engine thread.

    Args:
        out_dtype: element type of the partial outputs on the wire; the log-sum-exp is always float32.
        timeout_s: a daemon that has not answered a layer by then counts as lost.
        device: that has the queries and the partial states; the CPU where none is given.
    """

    def __init__(
        self,
        peers: PeerSet,
        kernels: AttentionKernels,
        out_dtype: str,
        timeout_s: float,
        device: Device | None = None,
    ) -> None:
        self._peers = peers
        self._kernels = kernels
        self._out_dtype = out_dtype
        self._timeout_s = timeout_s
        self._device = device or HostDevice()
        self._step = 0
        self._asked: list[_Asked] = []
        self._unsent: deque[_Query] = deque()  # of the layer under way
        self._waiting: deque[_Waiting] = deque()  # of the layer under way
        self.answers: dict[str, AnswerTimes] = {}  # of the step
        self.merge_s = 0.0  # of the step
        self._forgotten: dict[str, list[int]] = {}

    def asks(self, params: LayerParams) -> bool:
        """Whether ``submit`` asks any daemon for this layer of the step."""
        return any(_sees(asked, params) for asked in self._asked)

    def may_be_left_out(self, params: LayerParams, nobody_asks: bool) -> bool:
        """Whether the step's last layer goes without other daemons: none holds what it sees, or nobody has a query.

        A plan is not left without any query: it would never be answered, and would take room in the daemon's window.
        """
        seeing = [asked for asked in self._asked if _sees(asked, params)]
        return not seeing or (nobody_asks and all(asked.peer.kvdaemon_id in self.answers for asked in seeing))

    def forget(self, kvdaemon_id: str, segment_handle: int) -> None:
        """The segment will not be used again; the daemon is told with its next plan."""
        if self._peers.is_connected(kvdaemon_id):
            self._forgotten.setdefault(kvdaemon_id, []).append(segment_handle)

    def begin_step(self, step: int, shares: Sequence[PeerShare]) -> None:
        """Sends every daemon its part of the step's plan.

        Raises:
            PeerLostError: a daemon is gone; the step must be planned without it. The others have got their plan.
        """
        self._abandon()
        self._step = step
        self._asked = []
        self.answers = {}
        self.merge_s = 0.0
        gone = []
        rows = self._device.upload([share.rows for share in shares])
        # All of them: what a plan has named once counts as known from then on.
        for share, its_rows in zip(shares, rows, strict=True):
            try:
                self._send_plan(share, its_rows)
            except PeerLostError:
                gone.append(share.kvdaemon_id)
        if gone:
            raise PeerLostError(f"no data connection to kvdaemon {', '.join(gone)}")

    def _send_plan(self, share: PeerShare, rows: Tensor) -> None:
        peer = self._peers.get(share.kvdaemon_id)
        forgotten = self._forgotten.pop(share.kvdaemon_id, [])
        if forgotten:
            peer.send(Header(Kind.FORGET, rows=len(forgotten)), [wire.pack_handles(forgotten)])
        if share.traces:
            peer.send(Header(Kind.TRACE, rows=len(share.traces)), [wire.pack_traces(share.traces)])
        peer.send(Header(Kind.PLAN, step=self._step, rows=len(share.segments)), wire.pack_plan(share.segments))
        self._asked.append(_Asked(peer, share, rows))

    def submit(self, params: LayerParams, q: Tensor, left: LeftAttention = NOT_BEGUN) -> bool:
        """Sends the layer's queries, or begins to; answers whether there is anything to collect.

        Args:
            q: [rows of the batch, q_heads, head_dim].
            left: how far the layer has come with that in compiled code.
        """
        whole: Download | None = None
        for at, asked in enumerate(self._asked[left.taken :], left.taken):
            if not _sees(asked, params):
                continue
            if at < left.sent:
                assert asked.asker is not None
                self._sent(asked, asked.asker.sequence, asked.asker.sent_at_s)
                continue
            sent_at = time.perf_counter()
            sequence = self._ask(asked, params, q)
            if sequence:
                self._sent(asked, sequence, sent_at)
                continue
            if len(asked.rows) == len(q):
                whole = rows = whole or self._device.download(q)
            else:
                rows = self._device.download(q.index_select(0, asked.rows))
            query = _Query(asked, self._query_header(asked, params, q), rows)
            if rows.arrived:
                self._send(query)
            else:
                self._unsent.append(query)
        return bool(self._waiting or self._unsent)

    def _sent(self, asked: _Asked, sequence: int, sent_at: float) -> None:
        asked.peer.expected.add(sequence)
        self._waiting.append(_Waiting(asked, sequence, sent_at))

    def _ask(self, asked: _Asked, params: LayerParams, q: Tensor) -> int:
        """Sends a query in compiled code and answers its sequence number; 0 where that cannot be."""
        asker = self._asker(asked, len(q))
        if asker is None:
            return 0
        asker.set_query(q, params)
        return asked.peer.ask(asker)

    def _asker(self, asked: _Asked, batch_rows: int) -> CompiledAsker | None:
        if asked.asker is None and asked.peer.connection.can_ask:
            rows = asked.share.rows
            asker = self._kernels.compiled_asker(
                None if len(rows) == batch_rows else rows, batch_rows, self._step, _TORCH_DTYPES[self._out_dtype]
            )
            if asker is not None:
                asked.peer.connection.ask_with(asker)
            asked.asker = asker
        return asked.asker

    # ------------------------------------------------------------ layers that ask by themselves (LayerStack)

    def askers(self, q: Tensor) -> Sequence[CompiledAsker] | None:
        """What asks each of the step's daemons in compiled code; None: not all can be asked so.

        Args:
            q: every layer's queries have its shape and strides.
        """
        askers = [asker for asked in self._asked if (asker := self._asker(asked, len(q))) is not None]
        if len(askers) < len(self._asked):
            return None
        for asker in askers:
            asker.set_layout(q)
        return askers

    def lend(self) -> bool:
        """Lets compiled code ask until ``take_back``; answers whether that can be now."""
        for at, asked in enumerate(self._asked):
            assert asked.asker is not None, "askers() comes before"
            if not asked.peer.lend(asked.asker, asked.share.distance):
                self._take_back(self._asked[:at])
                return False
        return True

    def take_back(self) -> None:
        """Compiled code has asked. Where a layer has left its attention ``submit`` follows."""
        self._take_back(self._asked)

    def _take_back(self, some: Sequence[_Asked]) -> None:
        for asked in some:
            assert asked.asker is not None
            exchanged = asked.peer.take_back(asked.asker)
            if exchanged.answers:
                self._count(asked.peer, AnswerTimes(exchanged.answers, exchanged.answers_s, exchanged.lates))
            self.merge_s += exchanged.merges_s

    def _count(self, peer: Peer, answers: AnswerTimes) -> None:
        self.answers.setdefault(peer.kvdaemon_id, AnswerTimes()).add(answers)
        peer.answers.add(answers)

    def _query_header(self, asked: _Asked, params: LayerParams, q: Tensor) -> Header:
        return Header(
            Kind.QUERY,
            step=self._step,
            layer=params.layer,
            rows=len(asked.rows),
            q_heads=q.shape[1],
            head_dim=q.shape[2],
            dtype=_DTYPES[q.dtype],
            out_dtype=self._out_dtype,
            scale=params.scale,
            softcap=params.softcap,
            window=params.window,
        )

    def _send(self, query: _Query) -> None:
        rows = query.rows.wait()
        sent_at = time.perf_counter()
        self._sent(query.asked, query.asked.peer.send(query.header, [rows]), sent_at)

    def collect(self, out: Tensor, lse: Tensor) -> None:
        """Waits for the layer's partial states and merges them, in the order in which they were asked for.

        Args:
            out: [rows, q_heads, head_dim] float32, the local partial state, updated in place.
            lse: [rows, q_heads] float32, likewise.

        Raises:
            PeerLostError, TransferTimeoutError: the step must be discarded.
        """
        while self._unsent:
            self._send(self._unsent.popleft())
        deadline = time.monotonic() + self._timeout_s
        if any(waiting.asked.asker is None for waiting in self._waiting):
            self._peers.poll(0.0)
        looked_at = time.perf_counter()
        while self._waiting:
            waiting = self._waiting[0]
            peer = waiting.asked.peer
            answer = self._take(waiting, out, lse) or self._merge(waiting, looked_at, out, lse)
            if answer is None:
                self._wait(peer, deadline)
                continue
            self._count(peer, answer)
            peer.expected.discard(waiting.sequence)
            self._waiting.popleft()

    def _take(self, waiting: _Waiting, out: Tensor, lse: Tensor) -> AnswerTimes | None:
        """Merges an answer in compiled code, if it is there or comes in a moment."""
        peer, asker = waiting.asked.peer, waiting.asked.asker
        if asker is None or waiting.sequence in peer.partials:
            return None
        asker.set_target(out, lse)
        if not peer.take_answer(asker, waiting.sequence):
            return None
        self.merge_s += asker.merge_s
        return AnswerTimes(1, asker.taken_at_s - waiting.sent_at, asker.late)

    def _merge(self, waiting: _Waiting, looked_at: float, out: Tensor, lse: Tensor) -> AnswerTimes | None:
        """Merges an answer that has been received, if it has."""
        rows = waiting.asked.rows
        arrived = waiting.asked.peer.partials.pop(waiting.sequence, None)
        if arrived is None:
            return None
        header, payload, message, taken_at = arrived
        shape = (len(rows), out.shape[1], out.shape[2])
        count = shape[0] * shape[1] * shape[2]
        dtype = _TORCH_DTYPES[header.dtype]
        part_out = torch.frombuffer(payload, dtype=dtype, count=count).view(shape)
        part_lse = torch.frombuffer(payload, dtype=torch.float32, offset=count * dtype.itemsize).view(shape[:2])
        all_rows = len(rows) == len(out)
        begun = time.perf_counter()
        part_out, part_lse = self._device.upload([part_out, part_lse])
        self._kernels.merge_partials(out, lse, part_out, part_lse, None if all_rows else rows)
        self.merge_s += time.perf_counter() - begun
        message.release()
        return AnswerTimes(1, taken_at - waiting.sent_at, taken_at > looked_at)

    def _wait(self, peer: Peer, deadline: float) -> None:
        self._peers.get(peer.kvdaemon_id)  # raises once the peer is lost
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            reason = f"kvdaemon {peer.kvdaemon_id} did not answer a query within {self._timeout_s:g} s"
            self._peers.disconnect(peer.kvdaemon_id, reason)
            raise TransferTimeoutError(reason)
        self._peers.poll(remaining)
        if not self._peers.is_connected(peer.kvdaemon_id):
            raise PeerLostError(f"kvdaemon {peer.kvdaemon_id} was lost during a step")

    def _abandon(self) -> None:
        """Drops what an earlier, discarded step still waits for; late answers are released on arrival."""
        self._unsent.clear()
        for waiting in self._waiting:
            peer = waiting.asked.peer
            peer.expected.discard(waiting.sequence)
            arrived = peer.partials.pop(waiting.sequence, None)
            if arrived is not None:
                arrived[2].release()
        self._waiting.clear()


def _sees(asked: _Asked, params: LayerParams) -> bool:
    """Whether any row of the layer sees a key of the daemon's."""
    return not 0 < params.window <= asked.share.distance
