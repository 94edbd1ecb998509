"""What the transports that wait for sockets have in common: one epoll, a reception, and the order of a ``poll``.

Such a transport can also be waited for together with others.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from functools import partial
from typing import Generic, TypeVar

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.epoll_loop import EpollLoop
from services.dataplane.stream import Stream
from services.dataplane.transport import MAX_HELLO_BYTES, Connection, Event, Lost, Transport

# How late a deadline of a guest may be noticed; also the longest wait of whoever waits for ``fileno``.
DEADLINE_CHECK_S = 0.5


class SocketConnection(Connection):
    """A connection with a socket whose hang-up tells that the peer is gone."""

    sock: Stream
    fd: int  # the socket's, also after it has been closed

    @abstractmethod
    def end(self) -> None:
        """Closes the socket and lets go of everything but the messages that are held. Called once."""


ConnectionT = TypeVar("ConnectionT", bound=SocketConnection)


class WaitableTransport(Transport):
    """A transport that can be waited for together with others: by its descriptor, once it is armed."""

    @abstractmethod
    def fileno(self) -> int:
        """Readable when ``poll`` has something to do, provided that it is armed."""

    @abstractmethod
    def arm(self, also: int) -> bool:
        """Prepares for a wait on ``fileno``; every ``poll`` ends it. Answers False if ``poll`` has something to do.

        Args:
            also: what else is waited for, a descriptor: no time is spent here once it is readable.
        """


class SocketTransport(WaitableTransport, Generic[ConnectionT]):
    """One epoll for all sockets of a transport."""

    address_form: str  # an example, for messages

    def __init__(self) -> None:
        self._loop = EpollLoop()
        self._connections: set[ConnectionT] = set()
        self._pending: list[Event] = []  # of calls between two polls

    # ------------------------------------------------------------ what a backend does

    @abstractmethod
    def _serve_connection(self, connection: ConnectionT, mask: int, events: list[Event]) -> None:
        """A connection's socket is ready."""

    def _begin_poll(self, events: list[Event]) -> None:
        """Does what needs no socket to be ready; called first in every poll."""

    def _before_wait(self, events: list[Event], also: int) -> None:
        """Makes sure that whatever arrives from now on makes a socket ready; ``also`` as in ``arm``."""

    def _part_with(self, connection: ConnectionT) -> None:
        """Ends a connection that this side has closed; it is no longer watched."""
        connection.end()

    @abstractmethod
    def _check_deadlines(self) -> bool:
        """Does what is due. Answers whether it must be called again soon."""

    @abstractmethod
    def _close_sockets(self) -> None:
        """Closes what is not a connection."""

    # ------------------------------------------------------------ the interface

    def fileno(self) -> int:
        return self._loop.fileno()

    def arm(self, also: int) -> bool:
        if not self._pending and not self._loop.closed:
            self._before_wait(self._pending, also)
        return not self._pending

    def poll(self, timeout: float) -> list[Event]:
        if self._loop.closed:
            return []
        events, self._pending = self._pending, []
        self._begin_poll(events)
        if events or timeout <= 0:
            self._serve_sockets(0.0, events)
            return events
        deadline = time.monotonic() + timeout
        left, woken = timeout, False
        while not events and not woken and left > 0:  # more than once where a socket was ready and no event came of it
            self._before_wait(events, self._loop.fileno())
            woken = self._serve_sockets(0.0 if events else left, events)
            left = deadline - time.monotonic()
        return events

    def wake(self) -> None:
        self._loop.wake()

    def close(self) -> None:
        if self._loop.closed:
            return
        for connection in list(self._connections):
            connection.close()
        self._pending.clear()
        self._close_sockets()
        self._loop.close()

    def lose(self, connection: ConnectionT, reason: str) -> None:
        """Ends a connection with an event, which the next ``poll`` answers."""
        self._end(connection, reason, self._pending)

    def forget(self, connection: ConnectionT) -> None:
        """Ends a connection without an event, if it has not ended before."""
        self._pending = [event for event in self._pending if event.connection is not connection]
        if connection in self._connections:
            self._remove(connection)
            self._part_with(connection)

    # ------------------------------------------------------------ for backends

    def _check_connect(self, address: str, hello: bytes) -> str:
        """What stands behind the scheme of an address to connect to."""
        scheme, _, place = address.partition(":")
        if scheme != self.scheme or not place:
            raise ConfigError(
                f"{address!r} is no address of the {self.scheme} transport, which look like {self.address_form}"
            )
        if self._loop.closed:
            raise PeerLostError("this transport is closed")
        if len(hello) > MAX_HELLO_BYTES:
            raise ValueError(f"a hello of {len(hello)} bytes to {address}: at most {MAX_HELLO_BYTES} are allowed")
        return place

    def _adopt(self, connection: ConnectionT) -> None:
        self._connections.add(connection)
        self._loop.watch(connection.fd, partial(self._serve_connection, connection))

    def _remove(self, connection: ConnectionT) -> None:
        self._loop.unwatch(connection.fd)
        self._connections.remove(connection)

    def _end(self, connection: ConnectionT, reason: str, events: list[Event]) -> None:
        self._remove(connection)
        connection.end()
        events.append(Lost(connection, reason))

    def _serve_sockets(self, timeout: float, events: list[Event]) -> bool:
        """Waits for sockets and serves them. Answers whether ``wake`` has been called."""
        if self._check_deadlines():
            timeout = min(timeout, DEADLINE_CHECK_S)
        return self._loop.serve(timeout, events)
