"""Transport over torch.distributed: between GPUs with NCCL, between CPUs with gloo.

A connection is two groups of two members, one for each direction (``collective_meeting``), and a tcp connection beside
them, by which the peers meet, announce messages, tell what they have freed, and notice each other's end
(``collective_control``). Threads of their own join groups and wait for transfers (``collective_lane``): the
owner's thread never waits for a peer. A connection that ends takes its groups with it and nothing else.

Each message is received into memory of its own. Nothing is encrypted, and nobody proves who he is: without
``allow_insecure`` a transport listens on loopback only.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import time
from collections import deque
from dataclasses import dataclass
from functools import partial

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.collective_connection import CollectiveConnection, CollectiveOwner
from services.dataplane.collective_control import Terms, control_limits, pack_terms, unpack_terms
from services.dataplane.collective_group import PairBackend
from services.dataplane.collective_lane import Lane, Lanes
from services.dataplane.collective_meeting import Meeting
from services.dataplane.socket_transport import WaitableTransport
from services.dataplane.tcp import TcpTransport
from services.dataplane.transport import Accepted, Connected, Connection, Event, Limits, Lost, Message, Received
from services.runtime.addresses import split_address

_log = logging.getLogger(__name__)
_TERMS_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Guest:
    """A peer that has connected and not said its terms."""

    hello: bytes
    until: float  # time.monotonic


class CollectiveTransport(WaitableTransport, CollectiveOwner):
    """Data plane over torch.distributed; addresses are ``nccl:HOST:PORT`` or ``gloo:HOST:PORT`` with a numeric host.

    Args:
        backend: makes the groups, and is the scheme; all peers use the same one.
        listen_at: host:port where ``listen`` listens, port 0 for any; None for a process that only connects.
        advertise: the host that ``listen`` answers, where it is another than that of ``listen_at``.
        allow_insecure: whether ``listen_at`` may be reachable from other hosts.
        peer_timeout_s: silence of a peer's host after which a connection ends.
    """

    def __init__(
        self,
        backend: PairBackend,
        listen_at: str | None = None,
        advertise: str | None = None,
        allow_insecure: bool = False,
        peer_timeout_s: float = 10.0,
    ) -> None:
        self.scheme = backend.name
        self._backend = backend
        self._side = TcpTransport(listen_at, advertise, allow_insecure, peer_timeout_s)
        self._guests: dict[Connection, _Guest] = {}  # by their tcp connection
        self._connections: dict[Connection, CollectiveConnection] = {}  # likewise
        self._generations = itertools.count(1)
        self._pending: list[Event] = []
        self._to_report: set[CollectiveConnection] = set()
        self._advanced: deque[CollectiveConnection] = deque()  # by their lanes' threads
        self._woken = False
        self._closed = False
        self._lanes = Lanes()
        atexit.register(self._lanes.end)

    def listen(self) -> str:
        return self.scheme + self._side.listen().removeprefix(self._side.scheme)

    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        scheme, _, place = address.partition(":")
        if scheme != self.scheme or not place:
            raise ConfigError(
                f"{address!r} is no address of the {self.scheme} transport, "
                f"which look like {self.scheme}:127.0.0.1:7000"
            )
        side = self._side.connect(f"{self._side.scheme}:{place}", hello, control_limits(limits))
        host, port = split_address(place)
        try:
            meeting = Meeting.called(host.strip("[]"), port, next(self._generations))
        except OSError as error:
            side.close()
            raise PeerLostError(f"cannot listen to meet {address}: {error.strerror}") from error
        connection = CollectiveConnection(self, side, limits, address, meeting)
        self._connections[side] = connection
        side.send([pack_terms(Terms(self._backend.name, limits, meeting.generation, meeting.port))])
        return connection

    def poll(self, timeout: float) -> list[Event]:
        deadline = time.monotonic() + timeout
        wait = 0.0
        while not self._closed:
            while self._to_report:
                self._to_report.pop().report()
            for event in self._side.poll(wait):
                self._take(event)
            while self._advanced:  # after the tcp connections: a lane's end is explained by its connection's
                self._advanced.popleft().advance()
            now = time.monotonic()
            next_check = self._check_deadlines(now)
            if self._pending or self._woken or now >= deadline:
                self._woken = False
                events, self._pending = self._pending, []
                return events
            wait = max(0.0, min(deadline, next_check) - now)
        return []

    def fileno(self) -> int:
        return self._side.fileno()

    def arm(self, also: int) -> bool:
        return self._side.arm(also) and not (self._pending or self._advanced or self._woken)

    def wake(self) -> None:
        self._woken = True
        self._side.wake()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for connection in list(self._connections.values()):
            connection.close()
        self._side.close()
        self._guests.clear()
        self._pending.clear()

    # ------------------------------------------------------------ for connections

    def new_lane(self, connection: CollectiveConnection, meeting: Meeting, is_send: bool) -> Lane:
        lane = Lane(self._backend, meeting, is_send, partial(self._note_progress, connection))
        self._lanes.add(lane)
        lane.start()
        return lane

    def post(self, event: Event) -> None:
        self._pending.append(event)

    def await_report(self, connection: CollectiveConnection) -> None:
        self._to_report.add(connection)

    def forget(self, connection: CollectiveConnection) -> None:
        self._connections.pop(connection.side, None)
        self._to_report.discard(connection)

    def drop_events(self, connection: CollectiveConnection) -> None:
        self._pending = [event for event in self._pending if event.connection is not connection]

    # ------------------------------------------------------------ the tcp connections

    def _take(self, event: Event) -> None:
        connection = self._connections.get(event.connection)
        match event:
            case Accepted(side, hello):
                self._guests[side] = _Guest(hello, time.monotonic() + _TERMS_TIMEOUT_S)
            case Connected() if connection is not None:
                self.post(Connected(connection))
            case Received(side, message):
                if connection is not None:
                    connection.take_notice(message.data)
                elif side in self._guests:
                    self._admit(side, message)
                message.release()
            case Lost(side, reason):
                self._guests.pop(side, None)
                if connection is not None:
                    connection.hang_up(reason)

    def _admit(self, side: Connection, message: Message) -> None:
        guest = self._guests.pop(side)
        try:
            terms = unpack_terms(message.data, self._backend.name)
        except PeerLostError as error:
            self._dismiss(side, str(error))
            return
        place = side.peer.removeprefix(self._side.scheme)
        meeting = Meeting(1, place[1:].rpartition(":")[0], terms.store_port, terms.generation)
        connection = CollectiveConnection(self, side, terms.limits, self.scheme + place, meeting)
        self._connections[side] = connection
        self.post(Accepted(connection, guest.hello))

    def _dismiss(self, side: Connection, reason: str) -> None:
        _log.warning("turned away a guest: %s", reason)
        side.close()

    def _check_deadlines(self, now: float) -> float:
        """Does what is due, and answers when the next thing is."""
        for side in [side for side, guest in self._guests.items() if guest.until <= now]:
            del self._guests[side]
            self._dismiss(side, f"no terms within {_TERMS_TIMEOUT_S} s")
        for connection in [connection for connection in self._connections.values() if connection.ends_at <= now]:
            connection.give_up()
        guests = (guest.until for guest in self._guests.values())
        ending = (connection.ends_at for connection in self._connections.values())
        return min(itertools.chain(guests, ending), default=float("inf"))

    def _note_progress(self, connection: CollectiveConnection) -> None:
        """Called by a lane's thread."""
        self._advanced.append(connection)
        self._side.wake()
