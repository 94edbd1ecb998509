"""Transport between processes of one host: a pair of rings in shared memory for each connection.

Messages never pass through the kernel; ``Message.data`` is a view straight into the ring. The Unix socket of a
connection carries only doorbells, and its hang-up tells that the peer is dead. (A forked child without exec keeps its
parent's sockets open, so services start their children by exec.)

A connection is *awake* or *asleep*. ``poll`` looks at the rings of all awake connections; when none has anything, it
looks again for ``spin_s``, puts them to sleep and waits in epoll. A sleeping connection costs nothing until its
doorbell rings, and a doorbell is rung once per sleep: a sender to a busy receiver makes no system call.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.shm_handshake import BELL, Guest, SharedRings, offer
from services.dataplane.shm_ring import RingReader, RingWriter
from services.dataplane.transport import (
    MAX_HELLO_BYTES,
    Accepted,
    Buffer,
    Connected,
    Connection,
    Event,
    Limits,
    Lost,
    Received,
    Transport,
)
from services.dataplane.unix_socket import UnixListener, connect_unix

_log = logging.getLogger(__name__)
_GREETING_TIMEOUT_S = 5.0
_ACCEPT_PAUSE_S = 1.0
_DEADLINE_CHECK_S = 0.5


class ShmConnection(Connection):
    """One end of a pair of rings."""

    def __init__(
        self, transport: ShmTransport, sock: socket.socket, rings: SharedRings, peer: str, connecting: bool
    ) -> None:
        self.limits = rings.layout.limits
        self.peer = peer
        self.sock = sock
        self.fd = sock.fileno()
        self.waiting = connecting  # for the other side's poll
        self.reader = RingReader(rings.memory, rings.layout, ring=1 if connecting else 0)
        self._writer: RingWriter | None = RingWriter(rings.memory, rings.layout, ring=0 if connecting else 1)
        self._transport = transport

    def send(self, parts: Sequence[Buffer]) -> None:
        size = 0
        for part in parts:
            size += part.nbytes if type(part) is memoryview else len(part)
        if size > self.limits.max_message_bytes:
            raise ValueError(
                f"a message of {size} bytes to {self.peer}: at most {self.limits.max_message_bytes} are allowed"
            )
        if self._writer is None:
            raise PeerLostError(f"the connection to {self.peer} has ended")
        try:
            if self._writer.write(parts, size):
                self.sock.send(BELL)
        except PeerLostError as error:
            self._transport.lose(self, str(error))
            raise
        except OSError:
            # Full: the peer has doorbells enough. Hung up: poll says so, after what the peer has sent before.
            pass

    def end(self) -> None:
        """Lets go of everything but the messages that are held. The transport calls it once."""
        self._writer = None
        self.sock.close()
        if not self.reader.held:
            self.reader.discard()

    def close(self) -> None:
        self._transport.forget(self)
        self.reader.discard()


class ShmTransport(Transport):
    """Data plane over shared memory; addresses are ``shm:/path/of/socket``.

    Args:
        socket_path: where ``listen`` listens; None for a process that only connects.
        spin_s: how long ``poll`` watches awake rings before it sleeps. Watching saves the time to wake up from sleep
            (tens of microseconds); it yields the core to whoever else can run.
    """

    scheme = "shm"

    def __init__(self, socket_path: Path | None = None, spin_s: float = 20e-6) -> None:
        self._socket_path = socket_path
        self._spin_s = spin_s
        self._listener: UnixListener | None = None
        self._connections: dict[int, ShmConnection] = {}  # by file descriptor, as are the guests
        self._guests: dict[int, Guest] = {}
        self._awake: set[ShmConnection] = set()
        self._pending: list[Event] = []  # of calls between two polls
        self._accept_again_at = 0.0  # 0: the listener is watched
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.Lock()  # wake never writes to a descriptor that close has given up
        self._epoll.register(self._wake_fd, select.EPOLLIN)

    def listen(self) -> str:
        if self._socket_path is None:
            raise ConfigError("this shm transport has no socket path to listen on")
        if self._listener is None:
            self._listener = UnixListener(self._socket_path)
            self._epoll.register(self._listener.socket, select.EPOLLIN)
        return f"{self.scheme}:{self._socket_path}"

    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        scheme, _, path = address.partition(":")
        if scheme != self.scheme or not path:
            raise ConfigError(f"{address!r} is no address of the shm transport, which look like shm:/path/of/socket")
        if self._epoll.closed:
            raise PeerLostError("this transport is closed")
        if len(hello) > MAX_HELLO_BYTES:
            raise ValueError(f"a hello of {len(hello)} bytes to {address}: at most {MAX_HELLO_BYTES} are allowed")
        sock = connect_unix(Path(path))
        try:
            connection = ShmConnection(self, sock, offer(sock, hello, limits), peer=address, connecting=True)
        except (ConfigError, PeerLostError) as error:
            sock.close()
            raise PeerLostError(f"cannot connect to {address}: {error}") from error
        self._adopt(connection)
        return connection

    def poll(self, timeout: float) -> list[Event]:
        if self._epoll.closed:
            return []
        events, self._pending = self._pending, []
        self._read_rings(events)
        if events or timeout <= 0:
            self._serve_sockets(0.0, events)
            return events
        deadline = time.monotonic() + timeout
        left, woken = timeout, False
        while not events and not woken and left > 0:  # more than once after a doorbell without a message
            self._fall_asleep(events)
            woken = self._serve_sockets(0.0 if events else left, events)
            left = deadline - time.monotonic()
        return events

    def wake(self) -> None:
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        with self._wake_lock:
            if self._wake_fd < 0:
                return
            os.close(self._wake_fd)
            self._wake_fd = -1
        for connection in list(self._connections.values()):
            connection.close()
        for guest in self._guests.values():
            guest.close_memory()
            guest.sock.close()
        self._guests.clear()
        self._pending.clear()
        if self._listener is not None:
            self._listener.close()
        self._epoll.close()

    def lose(self, connection: ShmConnection, reason: str) -> None:
        """Ends a connection with an event, which the next ``poll`` answers."""
        self._remove(connection)
        self._pending.append(Lost(connection, reason))

    def forget(self, connection: ShmConnection) -> None:
        """Ends a connection without an event."""
        if self._connections.get(connection.fd) is connection:
            self._remove(connection)
        self._pending = [event for event in self._pending if event.connection is not connection]

    def _adopt(self, connection: ShmConnection) -> None:
        self._connections[connection.fd] = connection
        self._epoll.register(connection.fd, select.EPOLLIN)

    def _remove(self, connection: ShmConnection) -> None:
        self._epoll.unregister(connection.fd)
        del self._connections[connection.fd]
        self._awake.discard(connection)
        connection.end()

    def _read_rings(self, events: list[Event]) -> None:
        broken: list[tuple[ShmConnection, str]] = []
        for connection in self._awake:
            reason = _read_ring(connection, events)
            if reason:
                broken.append((connection, reason))
        for connection, reason in broken:
            self._end(connection, reason, events)

    def _fall_asleep(self, events: list[Event]) -> None:
        """Puts the awake connections to sleep, unless one of them has something within ``spin_s``."""
        if not self._awake:
            return
        if self._spin_s > 0:
            until = time.perf_counter() + self._spin_s
            while time.perf_counter() < until:
                for connection in self._awake:
                    if connection.reader.pending():
                        self._read_rings(events)
                        return
                os.sched_yield()  # whom we wait for may need this core
        self._awake = {connection for connection in self._awake if not connection.reader.fall_asleep()}
        self._read_rings(events)

    def _serve_sockets(self, timeout: float, events: list[Event]) -> bool:
        """Waits for sockets and serves them. Answers whether ``wake`` has been called."""
        woken = False
        if self._guests or self._accept_again_at:
            timeout = min(timeout, _DEADLINE_CHECK_S)
        for fd, _ in self._epoll.poll(timeout):
            connection = self._connections.get(fd)
            if connection is not None:
                self._serve_connection(connection, events)
            elif fd == self._wake_fd:
                os.eventfd_read(fd)
                woken = True
            elif (guest := self._guests.get(fd)) is not None:
                self._serve_guest(guest, events)
            else:
                self._accept()
        if self._guests or self._accept_again_at:
            self._enforce_deadlines()
        return woken

    def _serve_connection(self, connection: ShmConnection, events: list[Event]) -> None:
        try:
            bells = connection.sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            bells = b""
        if connection.waiting and bells:
            connection.waiting = False
            events.append(Connected(connection))
            self._awake.add(connection)
        elif bells and connection not in self._awake:
            connection.reader.wake_up()
            self._awake.add(connection)
        # What the peer sent before it hung up still counts.
        reason = _read_ring(connection, events)
        if reason or not bells:
            refused = "the peer ended before it accepted the connection" if connection.waiting else "the peer hung up"
            self._end(connection, reason or refused, events)

    def _end(self, connection: ShmConnection, reason: str, events: list[Event]) -> None:
        self._remove(connection)
        events.append(Lost(connection, reason))

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of file descriptors: the guests wait in the backlog, and poll must not spin over them.
            _log.warning("cannot accept a peer, trying again in %s s: %s", _ACCEPT_PAUSE_S, error.strerror)
            self._epoll.unregister(self._listener.socket)
            self._accept_again_at = time.monotonic() + _ACCEPT_PAUSE_S
            return
        sock.setblocking(False)
        self._guests[sock.fileno()] = Guest(sock, time.monotonic() + _GREETING_TIMEOUT_S)
        self._epoll.register(sock, select.EPOLLIN)

    def _serve_guest(self, guest: Guest, events: list[Event]) -> None:
        try:
            rings = guest.receive()
        except PeerLostError as error:
            self._dismiss(guest, str(error))
            return
        if rings is None:
            return
        with contextlib.suppress(OSError):  # gone already; what it has sent still counts
            guest.sock.send(BELL)
        self._epoll.unregister(guest.sock)
        del self._guests[guest.sock.fileno()]
        guest.close_memory()
        connection = ShmConnection(
            self, guest.sock, rings, peer=f"{self.scheme}:{_process_of(guest.sock)}", connecting=False
        )
        self._adopt(connection)
        self._awake.add(connection)
        events.append(Accepted(connection, rings.hello()))
        reason = _read_ring(connection, events)
        if reason:
            self._end(connection, reason, events)

    def _dismiss(self, guest: Guest, reason: str) -> None:
        _log.warning("turned away a guest: %s", reason)
        self._epoll.unregister(guest.sock)
        del self._guests[guest.sock.fileno()]
        guest.close_memory()
        guest.sock.close()

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for guest in [guest for guest in self._guests.values() if guest.deadline < now]:
            self._dismiss(guest, f"no greeting within {_GREETING_TIMEOUT_S} s")
        if self._accept_again_at and self._accept_again_at < now and self._listener is not None:
            self._accept_again_at = 0.0
            self._epoll.register(self._listener.socket, select.EPOLLIN)


def _read_ring(connection: ShmConnection, events: list[Event]) -> str:
    """Takes what has arrived. Answers why the connection must end, or nothing."""
    reader = connection.reader
    try:
        while (message := reader.read()) is not None:
            events.append(Received(connection, message))
    except PeerLostError as error:
        return str(error)
    return ""


def _process_of(sock: socket.socket) -> str:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # pid, uid, gid
    return f"pid-{int.from_bytes(credentials[:4], 'little')}"
