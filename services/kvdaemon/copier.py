"""Copies sealed blocks of the pool to other daemons, when instances order it. Owned by the worker thread.

A *lane* is a connection to one daemon on behalf of one session there. Each lane has one block under way and the others
wait, and ``advance`` sends one block at most; the worker calls it between two looks at its messages. So a query waits
for no more than one block's copy here, and no more than one for each daemon that writes to it there.

A block is pinned while it is read. What the other side does with it is the ledger's business there: a block whose
reservation is gone, for whatever reason, is refused, and ends the lane.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from services.core.blocks import BlockHandle
from services.core.errors import ConfigError, InfiniteLLMError, InvalidRequestError, PeerLostError
from services.dataplane import wire
from services.dataplane.negotiation import Offers, choose_address
from services.dataplane.transport import Buffer, Connection, Limits, Message, Transport
from services.dataplane.wire import CopyOrder, Header, Hello, Kind, Role
from services.kvdaemon.pool_view import PoolView
from services.kvdaemon.sessions import SharedLedger

_log = logging.getLogger(__name__)
_COPY_TIMEOUT_S = 10.0  # of one block, connecting included
_LINGER_S = 10.0  # a lane without work is kept so long
_SMALLEST_MESSAGE_BYTES = 4096  # refusals must fit as well


class Client(Protocol):
    """Who orders copies, and is answered."""

    def send(self, parts: Sequence[Buffer]) -> None:
        """
        Raises:
            PeerLostError: it is gone.
        """


class _Job(NamedTuple):
    """One COPY."""

    client: Client
    session_id: int  # of the client, here
    header: Header
    order: CopyOrder


class _Destination(NamedTuple):
    offers: Offers
    session_id: int
    block_bytes: int


@dataclass(slots=True, eq=False)
class _Lane:
    """``deadline`` (monotonic) is of the job under way, or of the lane itself when it has no work."""

    destination: _Destination
    address: str
    connection: Connection
    deadline: float
    waiting: deque[_Job] = field(default_factory=deque)
    under_way: _Job | None = None


class Copier:
    """See the module's docstring. Only the lanes' connections are its own."""

    def __init__(self, transport: Transport, shared: SharedLedger, pool: PoolView) -> None:
        self._transport = transport
        self._shared = shared
        self._pool = pool
        self._lanes: dict[_Destination, _Lane] = {}  # the one that sent last is at the end
        self._by_connection: dict[Connection, _Lane] = {}

    @property
    def ready(self) -> bool:
        """Whether ``advance`` has a block to send now."""
        return any(lane.waiting and lane.under_way is None for lane in self._lanes.values())

    def owns(self, connection: Connection) -> bool:
        return connection in self._by_connection

    def order(self, client: Client, session_id: int, header: Header, payload: memoryview) -> None:
        """Takes a COPY of a client, which is sent the answer when there is one.

        Raises:
            InvalidRequestError: it is not written as it should be.
        """
        job = _Job(client, session_id, header, wire.unpack_copy(payload))
        with self._shared as ledger:
            geometry = ledger.geometry
        if geometry is None:
            raise InvalidRequestError("COPY from a pool without blocks")
        destination = _Destination(job.order.offers, job.order.session_id, geometry.block_bytes)
        lane = self._lanes.get(destination)
        if lane is None:
            try:
                lane = self._connect(destination)
            except (ConfigError, PeerLostError) as error:
                _answer(job, f"{error.reason}: {error}")
                return
        lane.waiting.append(job)

    def forget(self, client: Client) -> None:
        """The client is gone: what it has ordered and waits is dropped."""
        for lane in self._lanes.values():
            lane.waiting = deque(job for job in lane.waiting if job.client is not client)

    def received(self, connection: Connection, message: Message) -> None:
        """An answer on one of the lanes."""
        lane = self._by_connection[connection]
        try:
            header, payload = wire.unpack(message.data)
            reason = bytes(payload).decode(errors="replace") if header.kind is Kind.REFUSED else ""
        except InvalidRequestError as error:
            header, reason = Header(Kind.REFUSED), str(error)
        message.release()
        if header.kind is Kind.BLOCK_FILLED and lane.under_way is not None:
            _answer(lane.under_way, "")
            lane.under_way, lane.deadline = None, time.monotonic() + _LINGER_S
        else:
            self._end(lane, reason or f"unexpected {header.kind.name} message")

    def lost(self, connection: Connection, reason: str) -> None:
        self._end(self._by_connection[connection], f"connection lost: {reason}")

    def advance(self) -> None:
        """Sends one block at most, and gives up what is overdue."""
        now = time.monotonic()
        for lane in list(self._lanes.values()):
            if lane.under_way is not None and now > lane.deadline:
                self._end(lane, f"not answered within {_COPY_TIMEOUT_S:g} s")
            elif lane.under_way is None and not lane.waiting and now > lane.deadline:
                self._end(lane, "")
        ready = next((lane for lane in self._lanes.values() if lane.waiting and lane.under_way is None), None)
        if ready is not None:
            self._lanes[ready.destination] = self._lanes.pop(ready.destination)
            self._send(ready, ready.waiting.popleft())

    def _connect(self, destination: _Destination) -> _Lane:
        longest = max(destination.block_bytes + wire.HEADER_BYTES, _SMALLEST_MESSAGE_BYTES)
        hello = Hello(destination.session_id, Role.WRITER).pack()
        address = choose_address(self._transport.schemes, destination.offers)
        connection = self._transport.connect(address, hello, Limits(longest, longest))
        _log.info("copies to another daemon", extra={"to": address})
        lane = _Lane(destination, address, connection, time.monotonic() + _LINGER_S)
        self._lanes[destination] = self._by_connection[connection] = lane
        return lane

    def _send(self, lane: _Lane, job: _Job) -> None:
        lane.under_way, lane.deadline = job, time.monotonic() + _COPY_TIMEOUT_S
        block = job.header.block
        try:
            with self._shared as ledger:
                geometry = ledger.geometry
                ledger.begin_read(job.session_id, block, job.order.key)
        except InfiniteLLMError as error:  # the client gave the block up meanwhile, or its session is over
            lane.under_way, lane.deadline = None, time.monotonic() + _LINGER_S
            _answer(job, f"{error.reason}: {error}")
            return
        assert geometry is not None, "somebody holds a block"
        try:
            self._pool.use(geometry)
            lane.connection.send([_fill(job.order.target), self._pool.read(block.block)])
        except (PeerLostError, ValueError) as error:  # gone, or the pool has blocks of another size meanwhile
            self._end(lane, str(error))
        finally:  # the message has been taken: its parts may be reused
            with self._shared as ledger:
                ledger.finish_read(block.block)

    def _end(self, lane: _Lane, reason: str) -> None:
        """Ends a lane; all its jobs fail with the reason."""
        if self._by_connection.pop(lane.connection, None) is None:
            return
        del self._lanes[lane.destination]
        lane.connection.close()
        jobs = [*([lane.under_way] if lane.under_way is not None else []), *lane.waiting]
        if jobs:
            _log.warning("copies failed", extra={"to": lane.address, "blocks": len(jobs), "why": reason})
        for job in jobs:
            _answer(job, reason)


def _fill(target: BlockHandle) -> bytes:
    return Header(Kind.FILL_BLOCK, block=target).pack()


def _answer(job: _Job, failure: str) -> None:
    """COPIED, or COPY_FAILED with the reason; nothing where the client is gone."""
    kind = Kind.COPY_FAILED if failure else Kind.COPIED
    header = Header(kind, sequence=job.header.sequence, step=job.header.step, block=job.order.target)
    with contextlib.suppress(PeerLostError, ValueError):  # it is gone, or takes no message of this length
        job.client.send([header.pack(), failure.encode()])
