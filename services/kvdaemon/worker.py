"""The daemon's worker: one thread that owns the transport and the kernels and answers the data plane.

Why a late or stale query is never answered wrongly: blocks are checked against the ledger when a PLAN names them, and
whoever holds a block keeps it. A session that is over holds nothing, and its blocks may be given away while the worker
still reads them. So a session is asked for *after* a partial state has been computed: its end precedes any reuse of its
blocks, and a session that is valid then proves that they stayed what they were.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.answering import CompiledQueries
from services.core.blocks import BlockHandle, HeadRange
from services.core.errors import (
    InfiniteLLMError,
    InvalidRequestError,
    PeerLostError,
    SessionRevokedError,
    StaleGenerationError,
)
from services.dataplane import wire
from services.dataplane.transport import Accepted, Buffer, Connected, Connection, Lost, Message, Received, Transport
from services.dataplane.wire import Header, Kind, Role
from services.kvdaemon.copier import Copier
from services.kvdaemon.hosted_traces import HostedTraces, HostedWork
from services.kvdaemon.hosting import Hosting
from services.kvdaemon.pool_view import PoolView
from services.kvdaemon.segments import SegmentTable, StepPlan
from services.kvdaemon.sessions import SharedLedger
from services.kvdaemon.traffic import InstanceTraffic, Traffic
from services.rmanager.ledger import Ledger

_log = logging.getLogger(__name__)
_POLL_S = 1.0  # only bounds how long one wait lasts; whatever happens ends it
_CHECKED_AT_ONCE = 512  # blocks, for each time the lock is taken
_READERS = frozenset({Kind.PLAN, Kind.QUERY, Kind.FORGET})
_MAY_SEND = {
    Role.OWNER: _READERS | {Kind.TRACE, Kind.WRITE_BLOCK, Kind.COPY},
    Role.READER: _READERS,
    Role.WRITER: frozenset({Kind.FILL_BLOCK}),
}


@dataclass(slots=True)
class _Client:
    """One data connection of one session; its role says what it may ask for, and ``heads`` which KV heads its queries
    are for."""

    connection: Connection
    session_id: int
    role: Role
    heads: HeadRange
    traffic: InstanceTraffic
    segments: SegmentTable = field(default_factory=SegmentTable)
    plan: StepPlan | None = None
    asked: tuple[int, str] | None = None  # query heads and output dtype of its last query: the next ones are alike
    compiled: CompiledQueries | None = None  # queries of the plan that need no Python
    traced: Sequence[HostedWork] = ()  # by the plan, for requests that are traced

    def send(self, parts: Sequence[Buffer]) -> None:
        """
        Raises:
            PeerLostError: the connection has ended.
        """
        self.connection.send(parts)
        self.traffic.sent_bytes += sum(memoryview(part).nbytes for part in parts)


class Worker:
    """Serves the data plane. ``run`` is the thread; ``sessions_ended`` and ``stop`` may be called by any thread.

    Args:
        traces: of requests whose instances say that they are traced; None: nobody collects them.
    """

    def __init__(
        self, transport: Transport, shared: SharedLedger, pool: PoolView, traces: HostedTraces | None = None
    ) -> None:
        self._transport = transport
        self._shared = shared
        self._pool = pool
        self._copier = Copier(transport, shared, pool)
        self._traces = traces
        self._clients: dict[Connection, _Client] = {}
        self._sessions_ended = False
        self._stopped = False
        self.hosting = Hosting()
        self.traffic = Traffic()
        self.round_at = time.monotonic()  # when the loop went round last; read by other threads

    def sessions_ended(self) -> None:
        """Some sessions may be over: their data connections will be closed."""
        self._sessions_ended = True
        self._transport.wake()

    def stop(self) -> None:
        """Lets ``run`` return."""
        self._stopped = True
        self._transport.wake()

    def run(self) -> None:
        """Serves until ``stop``. An exception that leaves this method is a bug, and nothing is served any more."""
        while not self._stopped:
            self.round_at = time.monotonic()
            for event in self._transport.poll(0.0 if self._copier.ready else _POLL_S):
                match event:
                    case Accepted(connection, hello):
                        self._accept(connection, hello)
                    case Received(connection, message):
                        self._receive(connection, message)
                    case Lost(connection, reason):
                        self._lost(connection, reason)
                    case Connected():
                        pass
            for client in self._clients.values():
                self._count_compiled(client)
            self._copier.advance()
            if self._traces is not None:
                self._traces.tick(self.round_at)
            if self._sessions_ended:
                self._sessions_ended = False  # before looking, so that what ends meanwhile is looked at again
                self._close_revoked()
        if self._traces is not None:
            self._traces.close()
        self._transport.close()

    def _accept(self, connection: Connection, hello: bytes) -> None:
        try:
            session_id, role, heads = wire.unpack_hello(hello)
            with self._shared as ledger:
                instance_id, geometry = ledger.instance_of(session_id), ledger.geometry
            assert geometry is not None
            heads = heads or HeadRange(0, geometry.kv_heads)
            if not 0 <= heads.first < heads.end <= geometry.kv_heads:
                raise InvalidRequestError(
                    f"KV heads {heads.first} to {heads.end} (half-open) of blocks that have {geometry.kv_heads}"
                )
        except InfiniteLLMError as error:
            self._refuse(connection, Header(Kind.REFUSED), f"{error.reason}: {error}")
            return
        traffic = self.traffic.begin(instance_id, connection.peer.partition(":")[0])
        self._clients[connection] = _Client(connection, session_id, role, heads, traffic)
        _log.info(
            "data connection accepted",
            extra={"peer": connection.peer, "session": hex(session_id), "role": role.name.lower()},
        )

    def _lost(self, connection: Connection, reason: str) -> None:
        if self._copier.owns(connection):
            self._copier.lost(connection, reason)
        elif self._forget(connection):
            _log.info("data connection lost", extra={"peer": connection.peer, "why": reason})

    def _receive(self, connection: Connection, message: Message) -> None:
        """Serves one message. Whatever is wrong with it costs its sender the connection, and nobody else anything."""
        if self._copier.owns(connection):
            self._copier.received(connection, message)
            return
        client = self._clients.get(connection)
        if client is None:  # closed while this event was on its way
            message.release()
            return
        client.traffic.received_bytes += len(message.data)
        header = Header(Kind.REFUSED)
        try:
            header, payload = wire.unpack(message.data)
            if header.kind not in _MAY_SEND[client.role]:
                raise InvalidRequestError(f"{header.kind.name} from the session's {client.role.name.lower()}")
            match header.kind:
                case Kind.QUERY:
                    self._query(client, header, payload, message)
                case Kind.PLAN:
                    self._plan(client, header, payload)
                case Kind.WRITE_BLOCK:
                    self._write_block(client, header, payload, message)
                case Kind.FILL_BLOCK:
                    self._fill_block(client, header, payload, message)
                case Kind.COPY:
                    self._copier.order(client, client.session_id, header, payload)
                case Kind.FORGET:
                    self._forget_segments(client, wire.unpack_handles(header.rows, payload))
                case Kind.TRACE:
                    if self._traces is not None:
                        self._traces.begin(
                            connection, client.traffic.instance_id, wire.unpack_traces(header.rows, payload)
                        )
                case _:
                    raise InvalidRequestError(f"a daemon does not take {header.kind.name} messages")
        except PeerLostError as error:  # the answer could not be sent; Lost follows or has come
            _log.info("answer not sent", extra={"peer": connection.peer, "why": str(error)})
        except InfiniteLLMError as error:
            self._refuse(connection, header, f"{error.reason}: {error}")
        except Exception as error:  # a bug or a failed kernel: this message's, and no reason to fail the others
            _log.exception("message could not be served", extra={"peer": connection.peer, "kind": header.kind.name})
            self._refuse(connection, header, f"INTERNAL: {type(error).__name__} in the daemon; see its log")
            self._pool.settle()  # a GPU that fails once fails from then on, and the process must end
        message.release()

    def _plan(self, client: _Client, header: Header, payload: memoryview) -> None:
        segments = wire.unpack_plan(header.rows, payload)
        for segment in segments:
            self._check_readable(client, segment.blocks)
        self._count_compiled(client)
        client.plan = self._pool.place(client.segments.plan(header.step, segments))
        self._compile(client, client.plan)
        if self._traces is not None:
            client.traced = self._traces.of(client.connection, segments)

    def _forget_segments(self, client: _Client, handles: Sequence[int]) -> None:
        self._count_compiled(client)
        client.segments.forget(handles)
        if self._traces is not None:
            self._traces.end(client.connection, handles)

    def _query(self, client: _Client, header: Header, payload: memoryview, message: Message) -> None:
        if client.plan is None:
            raise InvalidRequestError("QUERY before any PLAN")
        self._enter(client)
        begun = time.perf_counter()
        out, lse = self._pool.attend(
            header, payload, client.plan, client.heads, client.connection.limits.max_message_bytes
        )
        compute_s = time.perf_counter() - begun
        self._count(client, client.plan, 1, compute_s)
        with self._shared as ledger:
            _check_open(ledger, client.session_id)
        client.asked = (header.q_heads, header.out_dtype)
        answer = Header(
            Kind.PARTIAL,
            sequence=header.sequence,
            step=header.step,
            layer=header.layer,
            rows=header.rows,
            q_heads=header.q_heads,
            head_dim=header.head_dim,
            dtype=header.out_dtype,
        )
        message.release()
        client.send([answer.pack(), out, lse])

    def _count(self, client: _Client, plan: StepPlan, queries: int, compute_s: float, ago_s: float = 0.0) -> None:
        """``ago_s``: the last one was computed so long ago."""
        self.hosting.answered(queries, compute_s)
        for work in client.traced:
            work.add(queries, compute_s, ago_s)
        if plan.attention.max_query_len == 1:
            self.hosting.add(queries, self._pool.context_tokens(plan, client.heads), compute_s)

    def _compile(self, client: _Client, plan: StepPlan) -> None:
        """Lets compiled code answer the queries of a decode step's plan, as far as they are like those before."""
        client.compiled = None
        if client.connection.can_answer:
            if client.asked is not None and plan.rows and plan.attention.max_query_len == 1:
                with self._shared as ledger:
                    ended, before = ledger.ended_sessions, ledger.ended_sessions.value
                self._enter(client)  # after that look: if the session ends from here on, it has changed
                client.compiled = self._pool.compiled_queries(plan, client.heads, *client.asked)
                if client.compiled is not None:
                    client.compiled.allow(plan.step, ended, before)
            client.connection.answer_with(client.compiled)

    def _count_compiled(self, client: _Client) -> None:
        """Takes in what compiled code has answered since the last time."""
        if client.compiled is not None and client.plan is not None:
            answered = client.compiled.take_answered()
            if answered.queries:
                self._count(client, client.plan, answered.queries, answered.compute_s, answered.ago_s)
                client.traffic.received_bytes += answered.received_bytes
                client.traffic.sent_bytes += answered.sent_bytes

    def _write_block(self, client: _Client, header: Header, payload: memoryview, message: Message) -> None:
        block_bytes = self._enter(client)
        key, content = wire.split_block(payload, block_bytes)
        with self._shared as ledger:
            ledger.begin_write(client.session_id, header.block)
        self._pool.write(header.block.block, content)  # sizes have been checked: it does not fail
        with self._shared as ledger:
            sealed = ledger.finish_write(client.session_id, header.block, key)
        message.release()
        client.send([Header(Kind.BLOCK_SEALED, sequence=header.sequence, step=header.step, block=sealed).pack()])

    def _fill_block(self, client: _Client, header: Header, payload: memoryview, message: Message) -> None:
        block_bytes = self._enter(client)
        if len(payload) != block_bytes:
            raise InvalidRequestError(f"FILL_BLOCK carries {len(payload)} bytes; a block has {block_bytes}")
        with self._shared as ledger:
            ledger.begin_write(client.session_id, header.block, on_behalf=True)
        self._pool.write(header.block.block, payload)
        with self._shared as ledger:
            ledger.finish_write(client.session_id, header.block, None)
        message.release()
        client.send([Header(Kind.BLOCK_FILLED, sequence=header.sequence, block=header.block).pack()])

    def _enter(self, client: _Client) -> int:
        """Looks at the pool as the client's session does, and answers the bytes of a block.

        An open session is of the pool's present geometry: a new format ends all others. So the ids that were checked
        for the session lie inside the pool.
        """
        with self._shared as ledger:
            _check_open(ledger, client.session_id)
            geometry = ledger.geometry
        assert geometry is not None
        self._pool.use(geometry)
        return geometry.block_bytes

    def _check_readable(self, client: _Client, blocks: NDArray[np.uint32]) -> None:
        """Checks new blocks of a PLAN, rows (block, generation, position), a few at a time: a context has thousands."""
        for start in range(0, len(blocks), _CHECKED_AT_ONCE):
            handles = [BlockHandle(block, gen) for block, gen, _ in blocks[start : start + _CHECKED_AT_ONCE].tolist()]
            with self._shared as ledger:
                _check_open(ledger, client.session_id)
                stale = [handle for handle in handles if not ledger.readable(client.session_id, handle)]
            if stale:
                raise StaleGenerationError(
                    f"PLAN names {len(stale)} blocks that the session does not hold sealed, for example block "
                    f"{stale[0].block} of generation {stale[0].generation}"
                )

    def _close_revoked(self) -> None:
        with self._shared as ledger:
            revoked = [client for client in self._clients.values() if ledger.revoked(client.session_id)]
        for client in revoked:
            self._refuse(client.connection, Header(Kind.REFUSED), "SESSION_REVOKED: the session is over")

    def _refuse(self, connection: Connection, header: Header, reason: str) -> None:
        """Says why, if the peer still listens, and ends the connection."""
        _log.warning("data connection refused", extra={"peer": connection.peer, "why": reason})
        answer = Header(Kind.REFUSED, sequence=header.sequence, step=header.step, layer=header.layer)
        with contextlib.suppress(PeerLostError, ValueError):  # it is gone, or takes no message of this length
            connection.send([answer.pack(), reason.encode()])
        connection.close()
        self._forget(connection)

    def _forget(self, connection: Connection) -> bool:
        """Answers whether it was a client's."""
        client = self._clients.pop(connection, None)
        if client is not None:
            self._count_compiled(client)
            self.traffic.end(client.traffic)
            if self._traces is not None:
                self._traces.end_all(connection)
            self._copier.forget(client)
        return client is not None


def _check_open(ledger: Ledger, session_id: int) -> None:
    if ledger.revoked(session_id):
        raise SessionRevokedError(f"session {session_id:#x} is over; open a new one")
