"""The tcp transport with mutual TLS: who connects and who listens prove with certificates which role they have.

The handshake takes its turns in ``poll``, like everything else, and has a deadline on both sides. What is sent before
it is over waits, as for a connection whose TCP handshake is not. Whoever is refused is told why: for the certificate by
TLS, for the role by an answer in place of the usual one.

Each byte is encrypted and decrypted by the thread that polls, and copied twice more on each side.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time

from services.core.errors import PeerLostError, PermissionDeniedError
from services.dataplane.stream import Stream
from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_connection import TcpConnection
from services.dataplane.tcp_farewell import Farewell
from services.dataplane.tcp_greeting import REFUSAL, TcpGreeting, TcpGuest
from services.dataplane.tcp_socket import peer_of
from services.dataplane.tls_stream import TlsStream
from services.dataplane.transport import Event
from services.runtime.access import DATA_LISTENER, check_data_caller
from services.runtime.tls import MutualTls
from services.runtime.tls_context import RotatedContext, client_context, listener_context

_BOTH = select.EPOLLIN | select.EPOLLOUT


class TlsGuest(TcpGuest):
    """Shakes hands, shows that it may connect, and then sends its greeting."""

    def __init__(self, stream: TlsStream, tls: MutualTls) -> None:
        super().__init__(stream)
        self._stream = stream
        self._tls = tls
        self._peer = peer_of(stream)

    @property
    def mask(self) -> int:
        return self._stream.wants or select.EPOLLIN

    def receive(self) -> TcpGreeting | None:
        if self._stream.wants:
            try:
                self._stream.handshake()
            except OSError as error:
                raise PeerLostError(f"{self._peer}: {error.strerror}") from error
            if self._stream.wants:
                return None
            self._check_role()
        return super().receive()

    def _check_role(self) -> None:
        try:
            check_data_caller(self._tls, self._stream.peer_dns_names())
        except PermissionDeniedError as error:
            with contextlib.suppress(OSError):
                self._stream.send(REFUSAL)
            raise PeerLostError(f"{self._peer}: {error}") from error


class TlsFarewell(Farewell):
    """The connection may have been closed before its handshake was over; what was sent before goes out yet."""

    def __init__(self, stream: TlsStream, unsent: bytearray) -> None:
        super().__init__(stream, unsent)
        self._stream = stream

    @property
    def mask(self) -> int:
        return self._stream.wants or super().mask


class TlsTcpTransport(TcpTransport):
    """``TcpTransport`` with TLS; it may listen where other hosts reach it.

    Args:
        tls: the own identity, and whom to trust; new files are read for new connections.
        listen_at, advertise: as ``TcpTransport``.
        peer_timeout_s: likewise; also how long a connection may take until it is accepted.

    Raises:
        ConfigError: a file of ``tls`` is of no use.
    """

    def __init__(
        self,
        tls: MutualTls,
        listen_at: str | None = None,
        advertise: str | None = None,
        peer_timeout_s: float = 10.0,
    ) -> None:
        self._client_context = RotatedContext(tls, client_context)
        self._listener_context = RotatedContext(tls, listener_context)
        super().__init__(listen_at, advertise, allow_insecure=True, peer_timeout_s=peer_timeout_s)
        self._tls = tls
        self._not_accepted: dict[TcpConnection, float] = {}  # until when each may take (time.monotonic)
        self._unread: set[TcpConnection] = set()  # may hold bytes that the socket's readiness does not tell of

    def arm(self, also: int) -> bool:
        return super().arm(also) and not self._unread

    def await_output(self, connection: TcpConnection) -> None:
        self._loop.change(connection.fd, _stream_of(connection).wants or _BOTH)

    def _open(self, sock: socket.socket) -> Stream:
        return TlsStream(sock, self._client_context.current(), self._tls.name_of(DATA_LISTENER))

    def _new_guest(self, sock: socket.socket) -> TcpGuest:
        return TlsGuest(TlsStream(sock, self._listener_context.current(), None), self._tls)

    def _new_farewell(self, stream: Stream, unsent: bytearray) -> Farewell:
        assert isinstance(stream, TlsStream)
        return TlsFarewell(stream, unsent)

    def _adopt(self, connection: TcpConnection) -> None:
        super()._adopt(connection)
        self._unread.add(connection)  # an accepted one's first frames may have come with its greeting
        if not connection.accepted:
            self._not_accepted[connection] = time.monotonic() + self._peer_timeout_s

    def _remove(self, connection: TcpConnection) -> None:
        super()._remove(connection)
        self._unread.discard(connection)
        self._not_accepted.pop(connection, None)

    def _serve_sockets(self, timeout: float, events: list[Event]) -> bool:
        now = time.monotonic()
        for connection in [connection for connection, until in self._not_accepted.items() if until < now]:
            reason = f"not connected: the peer has not accepted the connection within {self._peer_timeout_s:g} s"
            self._end(connection, reason, events)
        unread, self._unread = self._unread, set()
        for connection in unread:
            self._serve_connection(connection, select.EPOLLIN, events)
        return super()._serve_sockets(0.0 if events or self._unread else timeout, events)

    def _serve_connection(self, connection: TcpConnection, mask: int, events: list[Event]) -> None:
        stream = _stream_of(connection)
        if stream.wants:
            try:
                stream.handshake()
            except OSError as error:
                self._end(connection, f"not connected: {error.strerror}", events)
                return
            self._loop.change(connection.fd, stream.wants or _BOTH)
            if stream.wants:
                return
            mask = _BOTH
        super()._serve_connection(connection, mask, events)
        if connection in self._connections:
            if stream.holds_more:
                self._unread.add(connection)
            if connection.accepted:
                self._not_accepted.pop(connection, None)

    def _check_deadlines(self) -> bool:
        return super()._check_deadlines() or bool(self._not_accepted)


def _stream_of(connection: TcpConnection) -> TlsStream:
    assert isinstance(connection.sock, TlsStream), "this transport makes no other"
    return connection.sock
