"""Transport inside one process, for tests: several transports, each owned by a thread, that meet in one hub.

It enforces the limits as strictly as the interface allows any backend to, so that a sender that is within them here is
within them everywhere.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.transport import (
    MAX_HELLO_BYTES,
    SMALLEST_CHARGE_BYTES,
    Accepted,
    Buffer,
    Connected,
    Connection,
    Event,
    Limits,
    Lost,
    Message,
    Received,
    ReleaseHook,
    Transport,
    message_bytes,
)

_RELEASED = memoryview(b"")


class LoopbackHub:
    """Where transports of one process find each other. One lock guards the whole hub."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.listening: dict[str, LoopbackTransport] = {}


class LoopbackMessage(Message):
    """A message with what it counts in the window."""

    __slots__ = ("charge", "released")

    def __init__(self, data: memoryview, release: ReleaseHook, charge: int) -> None:
        super().__init__(data, release)
        self.charge = charge
        self.released = False


class LoopbackConnection(Connection, ReleaseHook):
    """One end of a connection; as a hook it takes its own received messages back."""

    def __init__(self, transport: LoopbackTransport, limits: Limits, peer: str) -> None:
        self.limits = limits
        self.peer = peer
        self.transport = transport
        self.other: LoopbackConnection | None = None  # None once this end has ended
        self.closed = False
        self._lock = transport.hub.lock
        self._held: deque[LoopbackMessage] = deque()  # sent to this end and not freed, in order
        self._charged = 0

    def send(self, parts: Sequence[Buffer]) -> None:
        message_bytes(parts, self.limits, self.peer)
        data = bytearray().join(parts)
        with self._lock:
            if self.other is None:
                raise PeerLostError(f"the connection to {self.peer} has ended")
            if not self.other.deliver(data):
                reason = f"a message of {len(data)} bytes does not fit the peer's window"
                self.other.hang_up(reason)
                self.end()
                self.transport.post(Lost(self, reason))
                raise PeerLostError(reason)

    def deliver(self, data: bytearray) -> bool:
        """Takes a message from the other end; answers False if it does not fit the window."""
        if self.other is None:
            return True  # sent before the hang-up was noticed; nobody reads it
        charge = max(len(data), SMALLEST_CHARGE_BYTES)
        if self._held and self._charged + charge > self.limits.window_bytes:
            return False
        message = LoopbackMessage(memoryview(data), self, charge)
        self._held.append(message)
        self._charged += charge
        self.transport.post(Received(self, message))
        return True

    def hang_up(self, reason: str) -> None:
        """The other end is gone: this end's last event follows what has been sent before."""
        if self.other is not None:
            self.transport.post(Lost(self, reason))

    def end(self) -> None:
        """From now on nothing can be sent."""
        self.other = None

    def close(self) -> None:
        with self._lock:
            self.closed = True
            for message in self._held:
                message.data = _RELEASED
            self._held.clear()
            if self.other is not None:
                self.other.hang_up("the peer hung up")
                self.end()
            self.transport.forget(self)

    def __call__(self, message: Message) -> None:
        assert isinstance(message, LoopbackMessage)
        with self._lock:
            message.data = _RELEASED
            message.released = True
            while self._held and self._held[0].released:
                self._charged -= self._held.popleft().charge


class LoopbackTransport(Transport):
    """One of a hub's transports; its address is ``loopback:NAME``."""

    scheme = "loopback"

    def __init__(self, hub: LoopbackHub, name: str) -> None:
        self.hub = hub
        self.name = name
        self._changed = threading.Condition(hub.lock)
        self._events: deque[Event] = deque()
        self._connections: set[LoopbackConnection] = set()
        self._woken = False
        self._closed = False

    def listen(self) -> str:
        with self.hub.lock:
            if self.hub.listening.setdefault(self.name, self) is not self:
                raise ConfigError(f"another transport listens at loopback:{self.name}; choose another name")
        return f"{self.scheme}:{self.name}"

    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        scheme, _, name = address.partition(":")
        if scheme != self.scheme:
            raise ConfigError(f"{address!r} is no address of the loopback transport, which look like loopback:NAME")
        if len(hello) > MAX_HELLO_BYTES:
            raise ValueError(f"a hello of {len(hello)} bytes to {address}: at most {MAX_HELLO_BYTES} are allowed")
        with self.hub.lock:
            listener = self.hub.listening.get(name)
            if listener is None or self._closed:
                raise PeerLostError(f"nobody listens at {address}")
            near = LoopbackConnection(self, limits, peer=address)
            far = LoopbackConnection(listener, limits, peer=f"{self.scheme}:{self.name}")
            near.other, far.other = far, near
            self._connections.add(near)
            listener._connections.add(far)
            listener.post(Accepted(far, hello))
        return near

    def poll(self, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        with self.hub.lock:
            while True:
                posted, self._events = self._events, deque()
                events = [event for event in posted if self._happens(event)]
                left = deadline - time.monotonic()
                if events or self._woken or self._closed or left <= 0:
                    self._woken = False
                    return events
                self._changed.wait(left)

    def post(self, event: Event) -> None:
        """Queues an event for this transport's ``poll``. The caller holds the hub's lock."""
        self._events.append(event)
        self._changed.notify_all()

    def forget(self, connection: LoopbackConnection) -> None:
        """The connection has been closed. The caller holds the hub's lock."""
        self._connections.discard(connection)

    def wake(self) -> None:
        with self.hub.lock:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        with self.hub.lock:
            self._closed = True
            if self.hub.listening.get(self.name) is self:
                del self.hub.listening[self.name]
            for connection in list(self._connections):
                connection.close()
            self._events.clear()
            self._changed.notify_all()

    def _happens(self, event: Event) -> bool:
        """Applies an event to its connection. False for what came after ``close``."""
        connection = event.connection
        assert isinstance(connection, LoopbackConnection)
        if connection.closed:
            return False
        if isinstance(event, Lost):
            connection.end()
            self._connections.discard(connection)
        elif isinstance(event, Accepted) and connection.other is not None:
            connection.other.transport.post(Connected(connection.other))
        return True
