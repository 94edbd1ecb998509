"""Processes that are all connected with each other over one of the data plane's transports."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from services.dataplane.select import ListenOptions, Scheme, listening_transport
from services.dataplane.transport import Accepted, Buffer, Connected, Connection, Event, Limits, Lost, Message, Received

_TIMEOUT_S = 60.0


class Mesh:
    """One rank's connections to all the others. What it waits for has a deadline.

    Args:
        directory: for sockets of transports that need one.

    Attributes:
        sent_bytes: of all messages sent; frames around them are not counted.
    """

    def __init__(self, rank: int, scheme: Scheme, directory: Path) -> None:
        options = ListenOptions(directory / f"{scheme}-{rank}", "127.0.0.1:0", None, False)
        listening = listening_transport((scheme,), options, None)
        self.rank = rank
        self.address = listening.offers.addresses[0]
        self.sent_bytes = 0
        self._transport = listening.transport
        self._connections: dict[int, Connection] = {}
        self._ranks: dict[Connection, int] = {}
        self._messages: dict[int, deque[Message]] = {}

    def connect(self, addresses: Sequence[str], limits: Limits) -> None:
        """Connects to all lower ranks and waits for them and for the higher ones; addresses in the order of ranks."""
        for rank, address in enumerate(addresses[: self.rank]):
            self._know(rank, self._transport.connect(address, bytes([self.rank]), limits))
        connected: set[int] = set()

        def take(event: Event) -> None:
            if isinstance(event, Accepted):
                self._know(event.hello[0], event.connection)
            if isinstance(event, Accepted | Connected):
                connected.add(self._ranks[event.connection])

        while len(connected) < len(addresses) - 1:
            self.poll(_TIMEOUT_S, take)

    @property
    def others(self) -> list[int]:
        return sorted(self._connections)

    def send(self, rank: int, parts: Sequence[Buffer]) -> None:
        self.sent_bytes += sum(memoryview(part).nbytes for part in parts)
        self._connections[rank].send(parts)

    def receive(self, rank: int) -> Message:
        """The next message of a rank, which the caller releases."""
        while (message := self.take(rank)) is None:
            self.poll(_TIMEOUT_S)
        return message

    def take(self, rank: int) -> Message | None:
        """The same if it is there already."""
        messages = self._messages[rank]
        return messages.popleft() if messages else None

    def poll(self, timeout_s: float, also: Callable[[Event], None] = lambda _: None) -> None:
        """Lets messages come and go; waits until something has come, unless the timeout is 0.

        Raises:
            TimeoutError: nothing came.
        """
        until = time.monotonic() + timeout_s
        while not (events := self._transport.poll(timeout_s)) and timeout_s > 0:
            if time.monotonic() >= until:
                raise TimeoutError(f"nothing came to rank {self.rank} within {timeout_s:g} s")
        for event in events:
            if isinstance(event, Received):
                self._messages[self._ranks[event.connection]].append(event.message)
            elif isinstance(event, Lost):
                raise RuntimeError(f"rank {self.rank} lost a connection: {event.reason}")
            also(event)

    def _know(self, rank: int, connection: Connection) -> None:
        self._connections[rank] = connection
        self._ranks[connection] = rank
        self._messages[rank] = deque()
