"""Transport between hosts: one TCP connection for each pair, all of them in one epoll.

A message goes out in one ``sendmsg``, straight from the caller's buffers; only what the kernel does not take is copied
and follows when the socket is writable. It comes in straight into the connection's ring (``tcp_frames``). One ``poll``
takes a bounded number of bytes from each connection in turn, so that a long message holds up nobody else's. Queries of
decode steps are asked and answered in compiled code (``kernels/cpu/src/stream.h``), which reads and writes the same
frames. A wait begins awake (``Patience``): to be woken costs as much as a short message does.

The receiver checks every message against the window. The sender knows what has been freed only by the peer's frames,
which may lie behind; it gives up on a connection only when no delay explains what is outstanding, so that what waits
here for a peer that takes nothing is bounded.

Nothing here is encrypted, and nobody proves who he is: without ``allow_insecure`` a transport listens on loopback only.
``tcp_tls`` adds mutual TLS.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time

from kernels.cpu.answering import ConnectionWatch, Watched
from kernels.cpu.asking import CompiledAsker
from services.core.errors import ConfigError
from services.dataplane.patience import Patience
from services.dataplane.reception import Reception
from services.dataplane.socket_transport import SocketTransport
from services.dataplane.stream import Stream
from services.dataplane.tcp_connection import TcpConnection, TcpOwner
from services.dataplane.tcp_farewell import FAREWELL_S, Farewell
from services.dataplane.tcp_frames import FrameReader
from services.dataplane.tcp_greeting import ANSWER, TcpGreeting, TcpGuest, pack_greeting
from services.dataplane.tcp_socket import advertised_address, open_connection, open_listener, peer_of, tune
from services.dataplane.transport import Accepted, Connection, Event, Limits


class TcpTransport(SocketTransport[TcpConnection], TcpOwner):
    """Data plane over TCP; addresses are ``tcp:HOST:PORT`` with a numeric host.

    Args:
        listen_at: host:port where ``listen`` listens, port 0 for any; None for a process that only connects.
        advertise: the host that ``listen`` answers, where it is another than that of ``listen_at``.
        allow_insecure: whether ``listen_at`` may be reachable from other hosts.
        peer_timeout_s: silence of a peer's host after which a connection ends.
        awake_s: how long to look for messages before sleep: at least, and where they come soon.
    """

    scheme = "tcp"
    address_form = "tcp:127.0.0.1:7000"

    def __init__(
        self,
        listen_at: str | None = None,
        advertise: str | None = None,
        allow_insecure: bool = False,
        peer_timeout_s: float = 10.0,
        awake_s: tuple[float, float] = (20e-6, 1e-3),
    ) -> None:
        super().__init__()
        self._listen_at = listen_at
        self._advertise = advertise
        self._allow_insecure = allow_insecure
        self._peer_timeout_s = peer_timeout_s
        self._listener: socket.socket | None = None
        self._address = ""
        self._reception: Reception[Stream, TcpGreeting] | None = None
        self._to_report: set[TcpConnection] = set()
        self._patience = Patience(*awake_s)
        self._watch = _StreamWatch()
        self._leaving: dict[Farewell, float] = {}  # until when (time.monotonic)

    def listen(self) -> str:
        if self._listen_at is None:
            raise ConfigError("this tcp transport has no address to listen on")
        if self._listener is None:
            listener = open_listener(self._listen_at, self._allow_insecure)
            try:
                self._address = f"{self.scheme}:{advertised_address(listener, self._advertise)}"
            except ConfigError:
                listener.close()
                raise
            self._listener = listener
            self._reception = Reception(self._loop, listener, self._new_guest, self._admit)
        return self._address

    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        place = self._check_connect(address, hello)
        reader = FrameReader(limits)
        stream = self._open(open_connection(place, self._peer_timeout_s))
        connection = TcpConnection(self, stream, reader, limits, address, len(ANSWER))
        self._adopt(connection)
        connection.transmit([pack_greeting(hello, limits)])
        return connection

    def await_output(self, connection: TcpConnection) -> None:
        self._loop.change(connection.fd, select.EPOLLIN | select.EPOLLOUT)

    def await_report(self, connection: TcpConnection) -> None:
        self._to_report.add(connection)

    def take_answer(self, asker: CompiledAsker) -> bool:
        ending = asker.take_answer(self._patience.awake_s())
        if ending is Watched.TAKEN:
            self._patience.arrived()
        elif ending is Watched.CONTENDED:
            self._patience.contended()
        return ending is Watched.TAKEN

    def lend(self, asker: CompiledAsker) -> None:
        asker.wait_for(self._patience.next_awake_s)

    def take_back(self, asker: CompiledAsker) -> None:
        self._patience.learn_from(asker)

    def take_rest(self, connection: TcpConnection) -> None:
        reason = connection.take_messages(self._pending)
        if reason:
            self.lose(connection, reason)

    # ------------------------------------------------------------ what TLS does in another way

    def _open(self, sock: socket.socket) -> Stream:
        """What a connection that this side opens reads and writes."""
        return sock

    def _new_guest(self, sock: socket.socket) -> TcpGuest:
        return TcpGuest(sock)

    def _new_farewell(self, stream: Stream, unsent: bytearray) -> Farewell:
        return Farewell(stream, unsent)

    # ------------------------------------------------------------ a socket transport

    def _begin_poll(self, events: list[Event]) -> None:
        while self._to_report:
            self._to_report.pop().report()

    def _serve_connection(self, connection: TcpConnection, mask: int, events: list[Event]) -> None:
        if mask & select.EPOLLOUT:
            connection.flush()
            if not connection.unsent:
                self._loop.change(connection.fd, select.EPOLLIN)
        if mask & ~select.EPOLLOUT:
            if connection.answers and self._look([connection], 0.0, -1, events):
                return  # what has come since then makes the socket ready again
            before = len(events)
            reason = connection.receive(events)
            self._patience.arrived(len(events) - before)
            if reason:
                self._end(connection, reason, events)

    def _before_wait(self, events: list[Event], also: int) -> None:
        """Looks for messages for a while; queries are answered meanwhile."""
        if self._connections and not events:
            answering = [connection for connection in self._connections if connection.answers]
            self._look(answering, self._patience.awake_s(), also, events)

    def _look(self, connections: list[TcpConnection], awake_s: float, also: int, events: list[Event]) -> bool:
        """Answers queries in compiled code, and takes what it leaves. Answers whether there was any of both."""
        before = len(events)
        answered, ending = self._watch.look(connections, also, awake_s)
        self._patience.arrived(answered)
        if ending is Watched.CONTENDED:
            self._patience.contended()
        for connection in connections:  # also what an emulated link holds back: no socket tells of it
            reason = connection.take_messages(events)
            if reason:
                self._end(connection, reason, events)
        return answered > 0 or len(events) > before

    def _admit(self, stream: Stream, greeting: TcpGreeting, events: list[Event]) -> None:
        with contextlib.suppress(OSError):  # gone already; what it has sent still counts
            tune(stream, self._peer_timeout_s)
        peer = f"{self.scheme}:{peer_of(stream)}"
        connection = TcpConnection(self, stream, greeting.reader, greeting.limits, peer, 0)
        self._adopt(connection)
        connection.transmit([ANSWER])
        events.append(Accepted(connection, greeting.hello))

    def _remove(self, connection: TcpConnection) -> None:
        self._to_report.discard(connection)
        super()._remove(connection)

    def _part_with(self, connection: TcpConnection) -> None:
        farewell = self._new_farewell(connection.leave(), connection.unsent)
        if farewell.serve():
            farewell.sock.close()
            return
        self._leaving[farewell] = time.monotonic() + FAREWELL_S
        self._loop.watch(farewell.sock.fileno(), lambda _mask, _events: self._serve_farewell(farewell), farewell.mask)

    def _serve_farewell(self, farewell: Farewell) -> None:
        if farewell.serve():
            self._finish(farewell)
        else:
            self._loop.change(farewell.sock.fileno(), farewell.mask)

    def _finish(self, farewell: Farewell) -> None:
        del self._leaving[farewell]
        self._loop.unwatch(farewell.sock.fileno())
        farewell.sock.close()

    def _check_deadlines(self) -> bool:
        if self._leaving:
            now = time.monotonic()
            for farewell in [farewell for farewell, until in self._leaving.items() if until < now]:
                self._finish(farewell)
        guests = self._reception is not None and self._reception.check_deadlines()
        return guests or bool(self._leaving)

    def _close_sockets(self) -> None:
        for farewell in list(self._leaving):
            self._finish(farewell)
        if self._listener is not None and self._reception is not None:
            self._reception.close()
            self._listener.close()


class _StreamWatch:
    """Looks at connections until one of them has something that compiled code does not answer."""

    def __init__(self) -> None:
        self._watches: dict[tuple[int, int], ConnectionWatch] = {}  # of so many streams, and this descriptor

    def look(self, connections: list[TcpConnection], also: int, awake_s: float) -> tuple[int, Watched]:
        """Answers how many queries have been answered meanwhile, and why it looks no more.

        Args:
            also: as in ``arm``; -1 for nothing.
            awake_s: for how long at most, after the last such query.
        """
        lent = [(connection, queries) for connection in connections if (queries := connection.lend_stream())]
        if not lent and also < 0:
            return 0, Watched.TIMEOUT
        key = (len(lent), also)
        watch = self._watches.get(key)
        if watch is None:
            watch = self._watches[key] = ConnectionWatch([None] * len(lent), also)
        before = [queries.answered for _, queries in lent]
        ending = watch.watch([0] * len(lent), [queries for _, queries in lent], awake_s)
        answered = 0
        for (connection, queries), count in zip(lent, before, strict=True):
            connection.take_stream_back(queries)
            answered += queries.answered - count
        return answered, ending
