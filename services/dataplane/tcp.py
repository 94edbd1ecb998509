"""Transport between hosts: one TCP connection for each pair, all of them in one epoll.

A message goes out in one ``sendmsg``, straight from the caller's buffers; only what the kernel does not take is copied
and follows when the socket is writable. It comes in straight into the connection's ring (``tcp_frames``). One ``poll``
takes a bounded number of bytes from each connection in turn, so that a long message holds up nobody else's.

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
from collections.abc import Sequence

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.reception import Reception
from services.dataplane.socket_transport import SocketConnection, SocketTransport
from services.dataplane.stream import Stream
from services.dataplane.tcp_farewell import FAREWELL_S, Farewell
from services.dataplane.tcp_frames import FrameMessage, FrameReader, charge_of, frame, report
from services.dataplane.tcp_greeting import ANSWER, TcpGreeting, TcpGuest, pack_greeting, why_no_answer
from services.dataplane.tcp_socket import advertised_address, open_connection, open_listener, peer_of, tune
from services.dataplane.transport import (
    Accepted,
    Buffer,
    Connected,
    Connection,
    Event,
    Limits,
    Message,
    Received,
    ReleaseHook,
    message_bytes,
)

_MOST_OUTSTANDING = 4  # windows that may seem to be outstanding before the sender calls the promise broken
_REPORT_PART = 4  # a report is due when this part of the window has been freed and not told
_MOST_BUFFERS = 1024  # of one sendmsg, IOV_MAX


class TcpConnection(SocketConnection, ReleaseHook):
    """One end of a TCP connection; as a hook it takes its own received messages back.

    Args:
        answer_bytes: what is to come before the first frame, from the side that accepts.
    """

    def __init__(
        self,
        transport: TcpTransport,
        sock: Stream,
        reader: FrameReader,
        limits: Limits,
        peer: str,
        answer_bytes: int,
    ) -> None:
        self.limits = limits
        self.peer = peer
        self.sock = sock
        self.fd = sock.fileno()
        self.reader = reader
        self.unsent = bytearray()  # what the kernel has not taken
        self._transport = transport
        self._ended = False
        self._answer = b""
        self._answer_bytes = answer_bytes
        self._sent = 0  # charges of all messages
        self._reported = 0  # charges freed that the peer has been told of

    @property
    def accepted(self) -> bool:
        """Whether the other side has taken the connection; nothing but its answer comes before."""
        return len(self._answer) == self._answer_bytes

    def send(self, parts: Sequence[Buffer]) -> None:
        size = message_bytes(parts, self.limits, self.peer)
        if self._ended:
            raise PeerLostError(f"the connection to {self.peer} has ended")
        self._sent += charge_of(size)
        if self._sent - self.reader.freed_by_peer > _MOST_OUTSTANDING * self.limits.window_bytes:
            reason = f"a message of {size} bytes does not fit the peer's window"
            self._transport.lose(self, reason)
            raise PeerLostError(reason)
        self._reported = self.reader.freed
        self.transmit(frame(parts, size, self._reported))

    def transmit(self, buffers: Sequence[Buffer]) -> None:
        """Hands bytes to the kernel and keeps a copy of those that it does not take."""
        sent = 0
        if not self.unsent:
            if len(buffers) > _MOST_BUFFERS:
                buffers = [b"".join(buffers)]
            try:
                sent = self.sock.sendmsg(buffers)
            except BlockingIOError:
                pass
            except OSError:
                return  # hung up: poll says so, after what the peer has sent before
        for part in buffers:
            size = memoryview(part).nbytes
            if sent < size:
                self.unsent += memoryview(part).cast("B")[sent:] if sent else part
            sent = max(0, sent - size)
        if self.unsent:
            self._transport.await_output(self)

    def flush(self) -> None:
        """Hands on what the kernel has not taken before."""
        try:
            while self.unsent:
                del self.unsent[: self.sock.send(self.unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.unsent.clear()  # as in transmit

    def receive(self, events: list[Event]) -> str:
        """Takes what has arrived. Answers why the connection must end, or nothing."""
        try:
            if not self.accepted and not self._receive_answer(events):
                return ""
            if not self.reader.receive(self.sock):
                return "the peer hung up"
            while (message := self.reader.next(self)) is not None:
                events.append(Received(self, message))
        except BlockingIOError:
            return ""
        except PeerLostError as error:
            return str(error)
        except OSError as error:
            return f"{'the connection broke' if self.accepted else 'not connected'}: {error.strerror}"
        if self.reader.freed_by_peer > self._sent:
            return f"the peer sent an impossible count of freed bytes: {self.reader.freed_by_peer}"
        return ""

    def report(self) -> None:
        """Tells the peer what has been freed, unless a message has done so."""
        if not self._ended and self.reader.freed > self._reported:
            self._reported = self.reader.freed
            self.transmit(report(self._reported))

    def end(self) -> None:
        self.leave().close()
        self.unsent.clear()
        if not self.reader.held:
            self.reader.discard()

    def leave(self) -> Stream:
        """Ends the connection but for its socket, which the caller takes over with ``unsent``."""
        self._ended = True
        return self.sock

    def close(self) -> None:
        self._transport.forget(self)
        self.reader.discard()

    def __call__(self, message: Message) -> None:
        assert isinstance(message, FrameMessage)
        self.reader.free(message)
        unreported = self.reader.freed - self._reported
        if unreported * _REPORT_PART >= self.limits.window_bytes and not self._ended:
            self._transport.await_report(self)

    def _receive_answer(self, events: list[Event]) -> bool:
        """Whether the other side's answer is complete; then the connection is."""
        data = self.sock.recv(self._answer_bytes - len(self._answer))
        self._answer += data
        if not data:
            raise PeerLostError("the peer ended before it accepted the connection")
        if not ANSWER.startswith(self._answer):
            raise PeerLostError(why_no_answer(self._answer))
        if not self.accepted:
            return False
        events.append(Connected(self))
        return True


class TcpTransport(SocketTransport[TcpConnection]):
    """Data plane over TCP; addresses are ``tcp:HOST:PORT`` with a numeric host.

    Args:
        listen_at: host:port where ``listen`` listens, port 0 for any; None for a process that only connects.
        advertise: the host that ``listen`` answers, where it is another than that of ``listen_at``.
        allow_insecure: whether ``listen_at`` may be reachable from other hosts.
        peer_timeout_s: silence of a peer's host after which a connection ends.
    """

    scheme = "tcp"
    address_form = "tcp:127.0.0.1:7000"

    def __init__(
        self,
        listen_at: str | None = None,
        advertise: str | None = None,
        allow_insecure: bool = False,
        peer_timeout_s: float = 10.0,
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
        """The connection has bytes that its socket does not take."""
        self._loop.change(connection.fd, select.EPOLLIN | select.EPOLLOUT)

    def await_report(self, connection: TcpConnection) -> None:
        """The connection has freed much. The next poll tells the peer, unless a message does so before."""
        self._to_report.add(connection)

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
            reason = connection.receive(events)
            if reason:
                self._end(connection, reason, events)

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
