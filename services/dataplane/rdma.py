"""Transport that writes into its peers' memory, on NIXL: RDMA where there is hardware for it, else what UCX finds.

A message is a WRITE into the peer's receive memory, at a place that has been freed, and a note about it
(``rdma_notes``). Memory is registered once for each connection, requests are kept and posted again. One agent serves
all peers of a transport, which come and go: each is introduced over a *control connection*, plain TCP, whose end is the
end of the connection, so that a killed peer is noticed at once.

Notes come as NIXL's notifications, which only a look finds, and over the control connection, which also wakes who
sleeps. So a ``poll`` looks for a while (``Patience``) and then sleeps for as long as it likes; while a write of its own
is under way, which needs to be looked after, it sleeps a millisecond at a time.

Memory that a peer may write stays registered and mapped for a while after the connection's end: what is still on its
way lands where nobody reads it. Nothing here is encrypted, and NIXL trusts every peer with all of a process's
registered memory: without ``allow_insecure`` a transport listens on loopback only.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections import deque
from itertools import count

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.nixl import NixlAgent
from services.dataplane.patience import Patience
from services.dataplane.rdma_connection import RdmaConnection, RdmaOwner
from services.dataplane.rdma_notes import control_limits, unpack_introduction, unpack_note
from services.dataplane.socket_transport import DEADLINE_CHECK_S, WaitableTransport
from services.dataplane.tcp import TcpTransport
from services.dataplane.transport import (
    MAX_HELLO_BYTES,
    Accepted,
    Connected,
    Connection,
    Event,
    Limits,
    Lost,
    Received,
)

_log = logging.getLogger(__name__)
_HELLO = b"rdma"  # of the control connection: introductions follow
_NAP_S = 1e-3
_INTRODUCTION_S = 5.0  # that a guest has for it
_FAREWELL_S = 2.0  # in which a connection that this side has closed writes what was sent on it
_LAST_WRITES_S = 1.0  # the same, where the whole transport closes
_QUARANTINE_S = 10.0
_CONTENDED_S = 200e-6  # for which to offer the core away tells that others use it


class RdmaTransport(WaitableTransport, RdmaOwner):
    """Data plane over RDMA; addresses are ``rdma:HOST:PORT``, of the control connection, with a numeric host.

    Args:
        listen_at: host:port where ``listen`` listens, port 0 for any; None for a process that only connects.
        advertise: the host that ``listen`` answers, where it is another than that of ``listen_at``.
        allow_insecure: whether ``listen_at`` may be reachable from other hosts.
        peer_timeout_s: silence of a peer's host after which a connection ends.
        awake_s: how long ``poll`` looks for notifications before it sleeps: at least, and where they come soon.

    Raises:
        ConfigError: NIXL is not installed, or cannot start.
    """

    scheme = "rdma"

    def __init__(
        self,
        listen_at: str | None = None,
        advertise: str | None = None,
        allow_insecure: bool = False,
        peer_timeout_s: float = 10.0,
        awake_s: tuple[float, float] = (20e-6, 1e-3),
    ) -> None:
        self._agent = NixlAgent()
        self._control = TcpTransport(listen_at, advertise, allow_insecure, peer_timeout_s)
        self._patience = Patience(*awake_s)
        self._tokens = count(int.from_bytes(os.urandom(4), "little") << 16)  # no late note hits another transport's
        # Control connections without an introduction: whose they are, and until when they may take.
        self._guests: dict[Connection, tuple[str, float]] = {}
        self._by_control: dict[Connection, RdmaConnection] = {}
        self._by_token: dict[int, RdmaConnection] = {}
        self._leaving: dict[RdmaConnection, float] = {}  # closed by this side, until when they may write
        self._quarantine: deque[tuple[float, RdmaConnection]] = deque()  # ended, until when they keep their memory
        self._to_progress: set[RdmaConnection] = set()
        self._pending: list[Event] = []  # of calls between two polls
        self._woken = False
        self._closed = False

    # ------------------------------------------------------------ the interface

    def listen(self) -> str:
        return f"{self.scheme}:{self._control.listen().partition(':')[2]}"

    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        scheme, _, place = address.partition(":")
        if scheme != self.scheme or not place:
            raise ConfigError(f"{address!r} is no address of the rdma transport, which look like rdma:127.0.0.1:7000")
        if self._closed:
            raise PeerLostError("this transport is closed")
        if len(hello) > MAX_HELLO_BYTES:
            raise ValueError(f"a hello of {len(hello)} bytes to {address}: at most {MAX_HELLO_BYTES} are allowed")
        control = self._control.connect(f"{self._control.scheme}:{place}", _HELLO, control_limits(limits))
        try:
            connection = self._adopt(control, limits, address)
        except PeerLostError:
            control.close()
            raise
        connection.introduce(hello)
        return connection

    def fileno(self) -> int:
        return self._control.fileno()

    def arm(self, also: int) -> bool:
        if self._closed:
            return True
        if not self._pending:
            self._stay_awake(self._pending)
        if self._pending or self._woken:
            return False
        if self._to_progress:
            select.select([also] if also >= 0 else [], [], [], _NAP_S)
            return False
        return self._control.arm(also)

    def poll(self, timeout: float) -> list[Event]:
        if self._closed:
            return []
        events, self._pending = self._pending, []
        deadline = time.monotonic() + timeout
        self._look(0.0, events)
        while not events and not self._woken and (left := deadline - time.monotonic()) > 0:
            self._stay_awake(events)
            self._look(0.0 if events else min(left, self._longest_sleep()), events)
        self._woken = False
        return events

    def wake(self) -> None:
        self._woken = True
        self._control.wake()

    def close(self) -> None:
        if self._closed:
            return
        for connection in list(self._by_control.values()):
            connection.close()
        until = time.monotonic() + _LAST_WRITES_S
        while any(connection.writing for connection in self._leaving) and time.monotonic() < until:
            self._progress([])
            os.sched_yield()
        for connection in list(self._leaving):
            self._finish(connection)
        self._closed = True
        self._control.close()
        for _, connection in self._quarantine:
            connection.dispose()
        self._quarantine.clear()
        self._pending.clear()
        self._agent.close()

    # ------------------------------------------------------------ for connections

    def lose(self, connection: RdmaConnection, reason: str) -> None:
        self._end(connection, reason, self._pending)

    def forget(self, connection: RdmaConnection) -> None:
        self._pending = [event for event in self._pending if event.connection is not connection]
        if connection.ended:
            return
        connection.ended = True
        self._leaving[connection] = time.monotonic() + _FAREWELL_S
        if connection.all_written:
            self._finish(connection)

    def await_progress(self, connection: RdmaConnection) -> None:
        self._to_progress.add(connection)

    # ------------------------------------------------------------ looking

    def _look(self, timeout: float, events: list[Event]) -> None:
        for event in self._control.poll(timeout):
            self._take(event, events)
        self._take_notifications(events)
        self._progress(events)
        self._check_deadlines()

    def _longest_sleep(self) -> float:
        if self._to_progress:
            return _NAP_S
        return DEADLINE_CHECK_S if self._leaving or self._quarantine or self._guests else float("inf")

    def _stay_awake(self, events: list[Event]) -> None:
        """Looks for notifications for a while."""
        if not self._by_token:
            return
        until = time.perf_counter() + self._patience.awake_s()
        while not events and not self._woken and (now := time.perf_counter()) < until:
            os.sched_yield()  # whom we wait for may need this core
            if time.perf_counter() - now > _CONTENDED_S:
                self._patience.contended()
                return
            self._take_notifications(events)
            self._progress(events)

    def _take_notifications(self, events: list[Event]) -> None:
        if not self._by_token:
            return
        for notification in self._agent.notifications():
            try:
                note = unpack_note(notification)
            except PeerLostError:
                continue  # of nobody's that keeps to the protocol; who it is, its control connection would tell
            connection = self._by_token.get(note.token)
            if connection is not None:
                self._take_note(connection, notification, events)

    def _take(self, event: Event, events: list[Event]) -> None:
        """Something has come over a control connection."""
        match event:
            case Accepted(control, hello):
                if hello == _HELLO:
                    peer = f"{self.scheme}:{control.peer.partition(':')[2]}"
                    self._guests[control] = peer, time.monotonic() + _INTRODUCTION_S
                else:
                    control.close()
            case Received(control, message):
                if control in self._guests:
                    self._admit(control, message.data, events)
                elif (connection := self._by_control.get(control)) is not None:
                    if connection.met:
                        self._take_note(connection, message.data, events)
                    else:
                        self._meet(connection, message.data, events)
                message.release()
            case Lost(control, reason):
                self._guests.pop(control, None)
                connection = self._by_control.get(control)
                if connection is not None:
                    self._end(connection, reason, events)
            case Connected():
                pass  # the peer's introduction follows

    def _admit(self, control: Connection, data: memoryview, events: list[Event]) -> None:
        """A guest has introduced itself."""
        peer, _ = self._guests.pop(control)
        try:
            introduction = unpack_introduction(data)
            connection = self._adopt(control, introduction.limits, peer)
        except PeerLostError:
            control.close()
            return
        try:
            connection.meet(introduction)
            connection.introduce(b"")
        except PeerLostError:
            self._finish(connection)
            return
        events.append(Accepted(connection, introduction.hello))

    def _meet(self, connection: RdmaConnection, data: memoryview, events: list[Event]) -> None:
        try:
            connection.meet(unpack_introduction(data))
        except PeerLostError as error:
            self._end(connection, str(error), events)
            return
        if not connection.ended:
            events.append(Connected(connection))

    def _take_note(self, connection: RdmaConnection, data: bytes | memoryview, events: list[Event]) -> None:
        before = len(events)
        try:
            connection.take(unpack_note(data), events)
        except PeerLostError as error:
            self._end(connection, str(error), events)
        self._patience.arrived(len(events) - before)

    def _progress(self, events: list[Event]) -> None:
        for connection in list(self._to_progress):
            try:
                again = connection.progress()
            except PeerLostError as error:
                self._end(connection, str(error), events)
                continue
            if not again:
                self._to_progress.discard(connection)
            if connection in self._leaving and connection.all_written:
                self._finish(connection)

    def _check_deadlines(self) -> None:
        if not self._leaving and not self._quarantine and not self._guests:
            return
        now = time.monotonic()
        for control in [control for control, (_, until) in self._guests.items() if until < now]:
            peer, _ = self._guests.pop(control)
            _log.warning("turned away a guest: %s has not introduced itself within %g s", peer, _INTRODUCTION_S)
            control.close()
        for connection in [connection for connection, until in self._leaving.items() if until < now]:
            self._finish(connection)
        while self._quarantine and self._quarantine[0][0] < now:
            self._quarantine.popleft()[1].dispose()

    # ------------------------------------------------------------ beginning and end of connections

    def _adopt(self, control: Connection, limits: Limits, peer: str) -> RdmaConnection:
        connection = RdmaConnection(self, self._agent, control, limits, peer, next(self._tokens))
        self._by_control[control] = connection
        self._by_token[connection.token] = connection
        return connection

    def _end(self, connection: RdmaConnection, reason: str, events: list[Event]) -> None:
        if connection.control not in self._by_control:
            return
        if not connection.ended:
            connection.ended = True
            events.append(Lost(connection, reason))
        self._finish(connection)

    def _finish(self, connection: RdmaConnection) -> None:
        """Lets go of everything but the memory."""
        connection.ended = True
        connection.control.close()
        self._by_control.pop(connection.control, None)
        self._by_token.pop(connection.token, None)
        self._leaving.pop(connection, None)
        self._to_progress.discard(connection)
        self._quarantine.append((time.monotonic() + _QUARANTINE_S, connection))
