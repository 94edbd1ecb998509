"""An instance's connections to the daemons it queries and writes to.

Owned by the engine thread, but for ``report_lost``, ``wake``, ``traffic`` and ``transports``. A peer that is lost, for
whatever reason, is told of once by ``take_lost`` and is gone; a new connection to the same daemon is a new peer that
knows nothing of the old one's blocks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kernels.cpu.asking import CompiledAsker, Exchanged
from services.core.blocks import BlockHandle, HeadRange
from services.core.errors import InvalidRequestError, PeerLostError
from services.core.placement import PeerTransport
from services.dataplane import wire
from services.dataplane.negotiation import Offers
from services.dataplane.transport import (
    SMALLEST_CHARGE_BYTES,
    Accepted,
    Buffer,
    Connected,
    Connection,
    Limits,
    Lost,
    Message,
    Received,
    Transport,
)
from services.dataplane.wire import CopyOrder, Header, Hello, Kind, Role


@dataclass(frozen=True, slots=True)
class Sealed:
    """A daemon has taken a block: answer to ``write_block``."""

    kvdaemon_id: str
    tag: int
    handle: BlockHandle


@dataclass(frozen=True, slots=True)
class Copied:
    """Answer to ``copy_block``; ``failure`` says why the block has not been copied, and is empty if it has."""

    kvdaemon_id: str
    tag: int
    failure: str


@dataclass(frozen=True, slots=True)
class LostPeer:
    """A connection has ended; ``session_id`` tells it from an earlier or later one to the same daemon."""

    kvdaemon_id: str
    session_id: int
    reason: str


@dataclass(slots=True)
class AnswerTimes:
    """A daemon's answers in one step or several: their number, from sending each query until its answer was taken, in
    seconds, and how many were waited for (the others had come before anybody looked)."""

    messages: int = 0
    seconds: float = 0.0
    late: int = 0

    def add(self, other: AnswerTimes) -> None:
        self.messages += other.messages
        self.seconds += other.seconds
        self.late += other.late


@dataclass(frozen=True, slots=True)
class PeerTraffic:
    """What has been exchanged with a daemon since the connection began: bytes of messages, and its answers' times."""

    kvdaemon_id: str
    transport: str
    sent_bytes: int
    received_bytes: int
    answers: int
    answer_s: float


class Peer:
    """One daemon's connection: numbers requests and keeps within the daemon's window."""

    def __init__(
        self,
        kvdaemon_id: str,
        address: str,
        offers: Offers,
        session_id: int,
        connection: Connection,
        query_room: int,
    ) -> None:
        self.kvdaemon_id = kvdaemon_id
        self.address = address
        self.scheme = address.partition(":")[0]
        self.offers = offers
        self.session_id = session_id
        self.connection = connection
        self._query_room = query_room
        self._sequence = 0
        self._unanswered: deque[tuple[int, int]] = deque()  # (sequence, bytes), ascending
        self._bytes_out = 0
        self.sent_bytes = self.received_bytes = 0
        self.answers = AnswerTimes()
        self.expected: set[int] = set()  # sequences whose PARTIAL somebody waits for
        self.partials: dict[int, tuple[Header, memoryview, Message, float]] = {}  # taken at (perf_counter)

    def send(self, header: Header, parts: Sequence[Buffer]) -> int:
        """Sends one message and answers its sequence number."""
        self._sequence += 1
        self.connection.send([replace(header, sequence=self._sequence).pack(), *parts])
        self._sent(wire.HEADER_BYTES + sum(len(part) for part in parts))
        return self._sequence

    def ask(self, asker: CompiledAsker) -> int:
        """Sends a query in compiled code and answers its sequence number; 0: it was not, and ``send`` says why."""
        sent_bytes = self.connection.ask(asker, self._sequence + 1)
        if not sent_bytes:
            return 0
        self._sequence += 1
        self._sent(sent_bytes)
        return self._sequence

    def take_answer(self, asker: CompiledAsker, sequence: int) -> bool:
        """Merges the answer to query ``sequence`` in compiled code, if it is there or comes in a moment."""
        if not self.connection.take_answer(asker):
            return False
        self.answered(sequence)
        self.received_bytes += asker.answer_bytes
        return True

    def lend(self, asker: CompiledAsker, distance: int) -> bool:
        """Lets several layers ask one after the other, in compiled code, until ``take_back``; whether that can be."""
        asker.begin(self._sequence, distance)
        return self.connection.lend(asker)

    def take_back(self, asker: CompiledAsker) -> Exchanged:
        """What they have asked has been sent, and answered but for the last query, maybe."""
        self.connection.take_back(asker)
        exchanged = asker.exchanged
        self._sequence = asker.sequence
        self.sent_bytes += exchanged.sent_bytes
        self.received_bytes += exchanged.received_bytes
        if exchanged.answers:
            self.answered(exchanged.answered)
        if exchanged.asks > exchanged.answers:
            self._charge(asker.query_bytes)
        return exchanged

    def _sent(self, message_bytes: int) -> None:
        self._charge(message_bytes)
        self.sent_bytes += message_bytes

    def _charge(self, message_bytes: int) -> None:
        """Of the last message, which has no answer yet."""
        size = max(message_bytes, SMALLEST_CHARGE_BYTES)
        self._unanswered.append((self._sequence, size))
        self._bytes_out += size

    def traffic(self) -> PeerTraffic:
        """So far; any thread may ask."""
        times = self.answers
        return PeerTraffic(
            self.kvdaemon_id, self.scheme, self.sent_bytes, self.received_bytes, times.messages, times.seconds
        )

    def has_room_to_write(self, payload_bytes: int) -> bool:
        """Whether a block may be written now; room for a step's plan and query is always kept."""
        size = wire.HEADER_BYTES + payload_bytes
        return self._bytes_out + size + self._query_room <= self.connection.limits.window_bytes

    def answered(self, sequence: int) -> None:
        """An answer to ``sequence`` has come: the daemon has released every message up to it."""
        while self._unanswered and self._unanswered[0][0] <= sequence:
            self._bytes_out -= self._unanswered.popleft()[1]


class PeerSet:
    """All daemons that an instance exchanges data with.

    Args:
        limits: of every connection, both directions.
        query_room: bytes that one step's PLAN and one layer's QUERY can take together.
        role: of every connection.
        kv_heads: that queries are for; None: all.
    """

    def __init__(
        self,
        transport: Transport,
        limits: Limits,
        query_room: int,
        role: Role = Role.OWNER,
        kv_heads: HeadRange | None = None,
    ) -> None:
        self._transport = transport
        self._limits = limits
        self._query_room = query_room
        self._role = role
        self._kv_heads = kv_heads
        self._peers: dict[str, Peer] = {}
        self._by_connection: dict[Connection, Peer] = {}
        self._sealed: list[Sealed] = []
        self._copied: list[Copied] = []
        self._lost: list[LostPeer] = []
        self._reports: deque[LostPeer] = deque()

    @property
    def schemes(self) -> tuple[str, ...]:
        """Those of addresses that can be connected to, best first."""
        return self._transport.schemes

    def connect(self, kvdaemon_id: str, address: str, session_id: int, offers: Offers | None = None) -> None:
        """Begins to connect; messages may be sent at once. A failure shows as a lost peer.

        Args:
            offers: how other daemons can reach this one; None: at ``address`` alone.
        """
        assert kvdaemon_id not in self._peers, "disconnect the old session's peer first"
        try:
            hello = Hello(session_id, self._role, self._kv_heads)
            connection = self._transport.connect(address, hello.pack(), self._limits)
        except PeerLostError as error:
            self._lost.append(LostPeer(kvdaemon_id, session_id, str(error)))
            return
        offers = Offers((address,)) if offers is None else offers
        peer = Peer(kvdaemon_id, address, offers, session_id, connection, self._query_room)
        self._peers[kvdaemon_id] = peer
        self._by_connection[connection] = peer

    def disconnect(self, kvdaemon_id: str, reason: str) -> None:
        """Ends the connection to a daemon, if there is one, and counts it as lost."""
        peer = self._peers.get(kvdaemon_id)
        if peer is not None:
            self._drop(kvdaemon_id)
            self._lost.append(LostPeer(kvdaemon_id, peer.session_id, reason))

    def get(self, kvdaemon_id: str) -> Peer:
        """The peer.

        Raises:
            PeerLostError: there is no connection to it.
        """
        peer = self._peers.get(kvdaemon_id)
        if peer is None:
            raise PeerLostError(f"no data connection to kvdaemon {kvdaemon_id}")
        return peer

    def is_connected(self, kvdaemon_id: str) -> bool:
        return kvdaemon_id in self._peers

    def session_id(self, kvdaemon_id: str) -> int | None:
        """The session of the connection to a daemon; None where there is none."""
        peer = self._peers.get(kvdaemon_id)
        return None if peer is None else peer.session_id

    def write_block(self, kvdaemon_id: str, tag: int, handle: BlockHandle, key: bytes, content: Buffer) -> None:
        """Ships a full block into a block reserved there; ``take_sealed`` tells where it lies in the end."""
        header = Header(Kind.WRITE_BLOCK, step=tag, block=handle)
        self.get(kvdaemon_id).send(header, [key, content])

    def copy_block(self, kvdaemon_id: str, tag: int, handle: BlockHandle, order: CopyOrder) -> None:
        """Has a daemon copy a block, which we hold there sealed, to another daemon; ``take_copied`` tells when."""
        self.get(kvdaemon_id).send(Header(Kind.COPY, step=tag, block=handle), [order.pack()])

    def report_lost(self, kvdaemon_id: str, session_id: int, reason: str) -> None:
        """Another thread knows that the session is over: ends its connection at the next ``poll``."""
        self._reports.append(LostPeer(kvdaemon_id, session_id, reason))
        self._transport.wake()

    def traffic(self) -> tuple[PeerTraffic, ...]:
        """With each daemon that is connected; any thread may ask."""
        return tuple(peer.traffic() for peer in tuple(self._peers.values()))

    def transports(self) -> tuple[PeerTransport, ...]:
        """How each daemon that is connected is reached; any thread may ask."""
        peers = tuple(self._peers.values())
        return tuple(PeerTransport(peer.kvdaemon_id, peer.scheme) for peer in peers)

    def wake(self) -> None:
        """Lets a waiting ``poll`` return; any thread."""
        self._transport.wake()

    def poll(self, timeout: float) -> None:
        """Moves all transfers forward; waits up to ``timeout`` seconds for something to happen."""
        while self._reports:
            report = self._reports.popleft()
            peer = self._peers.get(report.kvdaemon_id)
            if peer is not None and peer.session_id == report.session_id:
                self.disconnect(report.kvdaemon_id, report.reason)
        for event in self._transport.poll(0 if self._lost else timeout):
            match event:
                case Received(connection, message):
                    self._receive(connection, message)
                case Lost(connection, reason):
                    peer = self._by_connection.get(connection)
                    if peer is not None:
                        self.disconnect(peer.kvdaemon_id, reason)
                case Accepted(connection, _):
                    connection.close()  # an instance serves nobody here
                case Connected():
                    pass

    def take_sealed(self) -> list[Sealed]:
        """Block writes acknowledged since the last call."""
        taken, self._sealed = self._sealed, []
        return taken

    def take_copied(self) -> list[Copied]:
        """Copies answered since the last call."""
        taken, self._copied = self._copied, []
        return taken

    def take_lost(self) -> list[LostPeer]:
        """Peers lost since the last call."""
        taken, self._lost = self._lost, []
        return taken

    def close(self) -> None:
        for kvdaemon_id in list(self._peers):
            self._drop(kvdaemon_id)
        self._transport.close()

    def _receive(self, connection: Connection, message: Message) -> None:
        peer = self._by_connection.get(connection)
        if peer is None:  # closed by us while this event was on its way
            message.release()
            return
        peer.received_bytes += len(message.data)
        try:
            header, payload = wire.unpack(message.data)
        except InvalidRequestError as error:
            self._fail(peer, message, str(error))
            return
        match header.kind:
            case Kind.PARTIAL:
                peer.answered(header.sequence)
                if header.sequence in peer.expected:
                    peer.partials[header.sequence] = (header, payload, message, time.perf_counter())
                else:  # of a step that was given up
                    message.release()
            case Kind.BLOCK_SEALED:
                peer.answered(header.sequence)
                self._sealed.append(Sealed(peer.kvdaemon_id, header.step, header.block))
                message.release()
            case Kind.COPIED | Kind.COPY_FAILED:
                peer.answered(header.sequence)
                failure = "" if header.kind is Kind.COPIED else bytes(payload).decode(errors="replace")
                self._copied.append(Copied(peer.kvdaemon_id, header.step, failure))
                message.release()
            case Kind.REFUSED:
                self._fail(peer, message, f"refused: {bytes(payload).decode(errors='replace')}")
            case _:
                self._fail(peer, message, f"unexpected {header.kind.name} message")

    def _fail(self, peer: Peer, message: Message, reason: str) -> None:
        message.release()
        self.disconnect(peer.kvdaemon_id, reason)

    def _drop(self, kvdaemon_id: str) -> None:
        peer = self._peers.pop(kvdaemon_id)
        del self._by_connection[peer.connection]
        for _, _, message, _ in peer.partials.values():
            message.release()
        peer.partials.clear()
        peer.connection.close()
