"""Emulates a slower link under any transport between processes of one machine, for tests and benchmarks.

Each direction of each connection is a link of its own: a message leaves when the message before it has left, takes its
bytes' time at the link's bandwidth, and arrives one latency later:

    leaves = max(sent, when the one before has left) + bytes / bandwidth
    due    = leaves + latency

**The receiving side alone delays**, so that nothing counts twice; both sides must be configured. The sending side only
writes the time into a prefix of 64 bytes (which keeps messages aligned): the clock is the machine's, the same in all
its processes. So a message that nobody looked for while it was under way is not late, as on a real link. A message that
is not due yet lies in the receive window, as it would on the wire. Compiled code does the same for the queries that it
asks and answers (``kernels/cpu/src/channel.h``).
"""

from __future__ import annotations

import os
import struct
import time
from collections import deque
from collections.abc import Sequence
from ctypes import addressof

from kernels.cpu.answering import CompiledQueries
from kernels.cpu.asking import CompiledAsker
from kernels.cpu.library import Channel, EmulatedLinkState
from services.dataplane.link_spec import LinkSpec
from services.dataplane.transport import (
    SMALLEST_CHARGE_BYTES,
    Accepted,
    Buffer,
    Connected,
    Connection,
    Event,
    Limits,
    Lost,
    Received,
    Transport,
    message_bytes,
)

_STAMP = struct.Struct("<8sd48x")  # magic, time.monotonic of the sender
_MAGIC = b"IFLLMLK1"
# Waits are in milliseconds, rounded up: the last part of a wait for a due message is spent looking.
_COARSE_S = 2e-3


def stamped_limits(limits: Limits) -> Limits:
    """The limits of the connection below: as many messages fit, each with its stamp."""
    stamps = limits.window_bytes // SMALLEST_CHARGE_BYTES + 1
    return Limits(limits.max_message_bytes + _STAMP.size, limits.window_bytes + stamps * _STAMP.size)


def unstamped_limits(limits: Limits) -> Limits:
    """The inverse of ``stamped_limits``."""
    stamps = (limits.window_bytes - _STAMP.size) // (SMALLEST_CHARGE_BYTES + _STAMP.size) + 1
    return Limits(limits.max_message_bytes - _STAMP.size, limits.window_bytes - stamps * _STAMP.size)


class EmulatedConnection(Connection):
    """A connection whose messages carry the time they were sent at."""

    def __init__(self, link: EmulatedLink, inner: Connection, limits: Limits) -> None:
        self.limits = limits
        self.peer = inner.peer
        self.inner = inner
        self.waiting: deque[tuple[float, Received | Lost]] = deque()  # with the time they are due, ascending
        self._link = link
        self._state = EmulatedLinkState(link.spec.bytes_per_s, link.spec.latency_s, 0.0)
        self.can_ask, self.can_answer = inner.can_ask, inner.can_answer

    @property
    def free_at(self) -> float:
        """When the last message that has arrived had left the sender."""
        at: float = self._state.free_at
        return at

    def send(self, parts: Sequence[Buffer]) -> None:
        message_bytes(parts, self.limits, self.peer)
        self.inner.send([_STAMP.pack(_MAGIC, time.monotonic()), *parts])

    # What is held back has not been released, and compiled code looks at nothing behind what is held.

    def answer_with(self, queries: CompiledQueries | None) -> None:
        if queries is not None:
            self._bind(queries.channel)
        self.inner.answer_with(queries)

    def ask_with(self, asker: CompiledAsker) -> None:
        self._bind(asker.channel)
        self.inner.ask_with(asker)

    def ask(self, asker: CompiledAsker, sequence: int) -> int:
        return self.inner.ask(asker, sequence)

    def take_answer(self, asker: CompiledAsker) -> bool:
        return self.inner.take_answer(asker)

    def lend(self, asker: CompiledAsker) -> bool:
        return self.inner.lend(asker)

    def take_back(self, asker: CompiledAsker) -> None:
        self.inner.take_back(asker)

    def close(self) -> None:
        self.inner.close()
        self._link.forget(self)

    def _bind(self, channel: Channel) -> None:
        channel.link = addressof(self._state)

    def take(self, event: Received) -> str:
        """Holds a message back until it is due. Answers why it cannot be taken, or nothing."""
        message = event.message
        if len(message.data) < _STAMP.size or message.data[: len(_MAGIC)] != _MAGIC:
            return "the peer emulates no link: configure the same link for all processes"
        sent_at = min(_STAMP.unpack_from(message.data)[1], time.monotonic())
        message.data = message.data[_STAMP.size :]
        state = self._state
        state.free_at = max(sent_at, state.free_at) + len(message.data) / state.bytes_per_s
        self.waiting.append((state.free_at + state.latency_s, Received(self, message)))
        return ""

    def take_end(self, reason: str) -> None:
        """The connection has ended: known when everything that was sent before has arrived."""
        due = self.waiting[-1][0] if self.waiting else 0.0
        self.waiting.append((due, Lost(self, reason)))


class EmulatedLink(Transport):
    """A transport whose messages take as long as over the link ``spec``. It owns the transport below."""

    def __init__(self, inner: Transport, spec: LinkSpec) -> None:
        self.scheme = inner.scheme
        self._inner = inner
        self.spec = spec
        self._connections: dict[Connection, EmulatedConnection] = {}  # by the connection below
        self._woken = False

    @property
    def schemes(self) -> tuple[str, ...]:
        return self._inner.schemes

    def listen(self) -> str:
        return self._inner.listen()

    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        inner = self._inner.connect(address, hello, stamped_limits(limits))
        connection = EmulatedConnection(self, inner, limits)
        self._connections[inner] = connection
        return connection

    def poll(self, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        events: list[Event] = []
        wait = 0.0
        while True:
            for event in self._inner.poll(wait):
                self._take(event, events)
            now = time.monotonic()
            next_due = self._deliver(now, events)
            if events or self._woken or now >= deadline:
                self._woken = False
                return events
            wait = min(deadline, next_due) - now
            if next_due < deadline and wait > 0:
                wait -= _COARSE_S
                if wait <= 0:
                    wait = 0.0
                    os.sched_yield()  # whom we wait for may need this core

    def wake(self) -> None:
        self._woken = True
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()
        self._connections.clear()

    def forget(self, connection: EmulatedConnection) -> None:
        """The connection has been closed: nothing of it is delivered any more."""
        connection.waiting.clear()
        self._connections.pop(connection.inner, None)

    def _take(self, event: Event, events: list[Event]) -> None:
        match event:
            case Accepted(inner, hello):
                connection = EmulatedConnection(self, inner, unstamped_limits(inner.limits))
                self._connections[inner] = connection
                events.append(Accepted(connection, hello))
            case Connected(inner):
                events.append(Connected(self._connections[inner]))
            case Received(inner, message):
                reason = self._connections[inner].take(event)
                if reason:
                    message.release()
                    inner.close()  # which makes what still waits invalid
                    self._connections[inner].waiting.clear()
                    self._connections[inner].take_end(reason)
            case Lost(inner, reason):
                self._connections[inner].take_end(reason)

    def _deliver(self, now: float, events: list[Event]) -> float:
        """Answers what is due, and when the next event will be."""
        next_due = float("inf")
        for connection in list(self._connections.values()):
            waiting = connection.waiting
            while waiting and waiting[0][0] <= now:
                event = waiting.popleft()[1]
                events.append(event)
                if isinstance(event, Lost):
                    self.forget(connection)
            if waiting:
                next_due = min(next_due, waiting[0][0])
        return next_due
