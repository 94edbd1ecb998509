"""Several transports as one, for a process whose peers come by different ways. An address's scheme says which is meant.

Each transport has an epoll of its own; the composite waits for all of these at once, and looks at every transport when
it wakes, so none of them waits for another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from services.core.errors import ConfigError
from services.dataplane.epoll_loop import EpollLoop
from services.dataplane.socket_transport import DEADLINE_CHECK_S, WaitableTransport
from services.dataplane.transport import Connection, Event, Limits, Transport


class CompositeTransport(Transport):
    """Owns the transports it is made of.

    Args:
        transports: of different schemes, best first; the first one's scheme and address are the composite's.
    """

    def __init__(self, transports: Sequence[WaitableTransport]) -> None:
        self.scheme = transports[0].scheme
        self._transports = {transport.scheme: transport for transport in transports}
        assert len(self._transports) == len(transports), "one transport for each scheme"
        self._loop = EpollLoop()
        for transport in transports:
            self._loop.watch(transport.fileno(), _ready)

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(self._transports)

    def listen(self) -> str:
        addresses = [transport.listen() for transport in self._transports.values()]
        return addresses[0]

    def connect(self, address: str, hello: bytes, limits: Limits) -> Connection:
        transport = self._transports.get(address.partition(":")[0])
        if transport is None:
            raise ConfigError(f"{address!r} is of none of the transports {', '.join(self._transports)}")
        return transport.connect(address, hello, limits)

    def poll(self, timeout: float) -> list[Event]:
        if self._loop.closed:
            return []
        events = self._look()
        deadline = time.monotonic() + timeout
        left, woken = timeout, False
        while not events and not woken and left > 0:
            idle = all(transport.arm(self._loop.fileno()) for transport in self._transports.values())
            # A transport's deadlines make no descriptor ready: they are looked after in between.
            woken = self._loop.serve(min(left, DEADLINE_CHECK_S) if idle else 0.0, events)
            events = self._look()
            left = deadline - time.monotonic()
        return events

    def wake(self) -> None:
        self._loop.wake()

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        self._loop.close()

    def _look(self) -> list[Event]:
        events: list[Event] = []
        for transport in self._transports.values():
            events += transport.poll(0)
        return events


def _ready(_mask: int, _events: list[Event]) -> None:
    """A transport has something to do: all are looked at anyway."""
