"""One end of a collective connection: messages through two groups, and notices about them over tcp.

The tcp connection is the proof of life. Its end ends this one, once what had been announced before has arrived or
cannot arrive any more.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import torch

from services.core.errors import PeerLostError
from services.dataplane.collective_control import Notice, pack_notice, unpack_notice
from services.dataplane.collective_lane import Lane
from services.dataplane.collective_meeting import Meeting
from services.dataplane.tcp_frames import charge_of
from services.dataplane.transport import (
    Buffer,
    Connection,
    Event,
    Limits,
    Lost,
    Message,
    Received,
    ReleaseHook,
    message_bytes,
)

FAREWELL_S = 2.0  # for what was sent before the end, on both sides
_MOST_OUTSTANDING = 4  # windows that may seem to be outstanding before the sender calls the promise broken
_REPORT_PART = 4  # a report is due when this part of the window has been freed and not told
_RELEASED = memoryview(b"")


class CollectiveOwner(ABC):
    """What a connection asks of its transport."""

    @abstractmethod
    def new_lane(self, connection: CollectiveConnection, meeting: Meeting, is_send: bool) -> Lane:
        """A lane that has begun, and has ``advance`` called in a poll after each step."""

    @abstractmethod
    def post(self, event: Event) -> None:
        """Has an event answered by the next ``poll``."""

    @abstractmethod
    def await_report(self, connection: CollectiveConnection) -> None:
        """The connection has freed much. The next poll tells the peer, unless a message does so before."""

    @abstractmethod
    def forget(self, connection: CollectiveConnection) -> None:
        """The connection has ended."""

    @abstractmethod
    def drop_events(self, connection: CollectiveConnection) -> None:
        """Nothing that has been posted of it happens any more."""


class CollectiveMessage(Message):
    """A message with what it counts in the window. ``data`` is its tensor's memory, and nobody else's."""

    __slots__ = ("charge", "released")

    def __init__(self, data: memoryview, release: ReleaseHook, charge: int) -> None:
        super().__init__(data, release)
        self.charge = charge
        self.released = False


class CollectiveConnection(Connection, ReleaseHook):
    """Owned by the transport's thread, as everything but its two lanes.

    Args:
        side: the tcp connection.
        meeting: where its groups are formed.
    """

    def __init__(self, owner: CollectiveOwner, side: Connection, limits: Limits, peer: str, meeting: Meeting) -> None:
        self.limits = limits
        self.peer = peer
        self.side = side
        self._owner = owner
        self.ends_at = float("inf")  # when ``give_up`` is due (time.monotonic)
        self._hung_up = False  # nothing can be sent any more, but what has been announced may arrive
        self._over = False
        self._reason = ""  # why the connection ends, once it does
        self._arriving: deque[CollectiveMessage] = deque()  # announced and not handed out, in order
        self._arrived = 0  # messages handed out
        self._held: deque[CollectiveMessage] = deque()  # announced and not freed, in order
        self._charged = 0  # by what is held
        self._freed = 0  # charges freed, since the connection began
        self._reported = 0  # of those, what the peer has been told of
        self._sent = 0  # charges of all messages sent
        self._freed_by_peer = 0  # of those, as last told
        self._outgoing = owner.new_lane(self, meeting, is_send=True)
        self._incoming = owner.new_lane(self, meeting, is_send=False)

    def send(self, parts: Sequence[Buffer]) -> None:
        size = message_bytes(parts, self.limits, self.peer)
        if self._hung_up or self._over:
            raise PeerLostError(f"the connection to {self.peer} has ended")
        self._sent += charge_of(size)
        if self._sent - self._freed_by_peer > _MOST_OUTSTANDING * self.limits.window_bytes:
            reason = f"a message of {size} bytes does not fit the peer's window"
            self._outgoing.finish(FAREWELL_S)
            self._lose(reason)
            raise PeerLostError(reason)
        data = torch.empty(size, dtype=torch.uint8)
        view, at = _view(data), 0
        for part in parts:
            taken = memoryview(part).cast("B") if memoryview(part).nbytes else _RELEASED
            view[at : at + len(taken)] = taken
            at += len(taken)
        self._tell(size)
        self._outgoing.post(data)

    def close(self) -> None:
        if not self._over:
            if not self._hung_up:
                self._outgoing.finish(FAREWELL_S)
            self._end()
        self._owner.drop_events(self)
        for message in self._held:
            message.data = _RELEASED
        self._held.clear()
        self._arriving.clear()

    def report(self) -> None:
        """Tells the peer what has been freed, unless a message has done so."""
        if not self._hung_up and not self._over and self._freed > self._reported:
            with contextlib.suppress(PeerLostError):  # the tcp connection's end follows
                self._tell(None)

    def take_notice(self, data: memoryview) -> None:
        """The peer has told something."""
        if self._hung_up:
            return
        try:
            notice = unpack_notice(data)
            if not self._freed_by_peer <= notice.freed <= self._sent:
                raise PeerLostError(f"the peer sent an impossible count of freed bytes: {notice.freed}")
            self._freed_by_peer = notice.freed
            if notice.length is not None:
                self._expect(notice.length)
        except PeerLostError as error:
            self.hang_up(str(error))

    def hang_up(self, reason: str) -> None:
        """The peer is gone, or has broken its promise: what has been announced before may still arrive."""
        if self._hung_up:
            return
        self._hung_up = True
        self._outgoing.abort()
        self._incoming.finish(FAREWELL_S)
        self._reason, self.ends_at = reason, time.monotonic() + FAREWELL_S
        self.advance()

    def advance(self) -> None:
        """Hands out what the lanes have transferred, and ends the connection when nothing more can come."""
        if self._over:
            return
        failure = self._incoming.failure  # read first: nothing is transferred after it
        while self._arriving and self._arrived < self._incoming.transferred:
            self._arrived += 1
            self._owner.post(Received(self, self._arriving.popleft()))
        if self._hung_up:
            if failure or not self._arriving:
                self._lose(self._reason)
            return
        failure = failure or self._outgoing.failure
        if failure and not self._reason:
            # Most likely the peer is gone; the tcp connection says so, after what the peer has announced.
            self._reason, self.ends_at = f"the group broke: {failure}", time.monotonic() + FAREWELL_S

    def give_up(self) -> None:
        """``ends_at`` is over."""
        self._outgoing.abort()
        self._lose(self._reason)

    def __call__(self, message: Message) -> None:
        assert isinstance(message, CollectiveMessage)
        message.data = _RELEASED
        message.released = True
        held = self._held  # empty after close
        while held and held[0].released:
            charge = held.popleft().charge
            self._charged -= charge
            self._freed += charge
        if (self._freed - self._reported) * _REPORT_PART >= self.limits.window_bytes and not self._over:
            self._owner.await_report(self)

    def _expect(self, size: int) -> None:
        """A message has been announced."""
        if size > self.limits.max_message_bytes:
            raise PeerLostError(f"the peer sent an impossible length: {size} bytes")
        charge = charge_of(size)
        if self._held and self._charged + charge > self.limits.window_bytes:
            raise PeerLostError(f"the peer sent a message of {size} bytes that does not fit the window")
        try:
            data = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise PeerLostError(f"no memory for a message of {size} bytes") from error
        message = CollectiveMessage(_view(data), self, charge)
        self._held.append(message)
        self._charged += charge
        self._arriving.append(message)
        self._incoming.post(data)

    def _tell(self, length: int | None) -> None:
        self._reported = self._freed
        self.side.send([pack_notice(Notice(length, self._freed))])

    def _lose(self, reason: str) -> None:
        """Ends the connection with an event."""
        self._end()
        self._owner.post(Lost(self, reason))

    def _end(self) -> None:
        """Ends the connection but for what is on its way out."""
        self._over = True
        self._incoming.abort()
        self.side.close()
        self._owner.forget(self)


def _view(data: torch.Tensor) -> memoryview:
    """The bytes of a tensor [bytes] uint8, which they keep alive."""
    array: Buffer = data.numpy()  # type: ignore[assignment]  # a buffer, too
    return memoryview(array)
