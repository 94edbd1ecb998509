"""Both ends of a connection over one of the data plane's transports, for ``python -m benchmarks.dataplane``."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from benchmarks.echo_line import ACCEPT, RECEIPT, WINDOW, Exchange, Line, marks_of
from services.core.errors import ConfigError
from services.dataplane.select import ListenOptions, Scheme, connecting_transport, listening_transport
from services.dataplane.transport import (
    Accepted,
    Connected,
    Connection,
    Event,
    Limits,
    Lost,
    Message,
    Received,
    Transport,
)

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why a transport cannot be used here."""

    reason: str


class TransportEnd:
    """The newest connection of a transport, and the messages that have come over it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._connection: Connection | None = None
        self._messages: deque[Message] = deque()

    def establish(self) -> Connection:
        """Waits for a new connection."""
        self._connection = None
        while self._connection is None:
            self._poll()
        return self._connection

    def receive(self) -> Message:
        """The next message, which the caller releases."""
        while not self._messages:
            self._poll()
        return self._messages.popleft()

    def _poll(self) -> None:
        until = time.monotonic() + _TIMEOUT_S
        while not (events := self._transport.poll(_TIMEOUT_S)):
            if time.monotonic() >= until:
                raise TimeoutError(f"nothing came over {self._transport.scheme} within {_TIMEOUT_S:g} s")
        for event in events:
            self._take(event)

    def _take(self, event: Event) -> None:
        match event:
            case Received(message=message):
                self._messages.append(message)
            case Accepted(connection=connection) | Connected(connection=connection):
                self._connection = connection
            case Lost(connection=connection, reason=reason) if connection is self._connection:
                raise RuntimeError(f"the connection over {self._transport.scheme} ended: {reason}")


class TransportLine(Line):
    """To a process that runs ``answer_on_transport`` and accepts now; with room for messages of ``size``."""

    def __init__(self, scheme: Scheme, address: str, size: int) -> None:
        self._transport = connecting_transport(scheme, None)
        self._end = TransportEnd(self._transport)
        self._transport.connect(address, b"", Limits(size, (WINDOW + 1) * size))
        self._connection = self._end.establish()

    def send(self, message: bytearray) -> None:
        self._connection.send([message])

    def await_echo(self, size: int) -> tuple[bytes, bytes]:
        message = self._end.receive()
        if len(message.data) != size:
            raise RuntimeError(f"a message of {len(message.data)} bytes came, not of {size}")
        marks = marks_of(message.data)
        message.release()
        return marks

    def await_receipt(self) -> None:
        message = self._end.receive()
        if message.data != RECEIPT:
            raise RuntimeError("a stream's message was not answered with a receipt")
        message.release()

    def close(self) -> None:
        self._transport.close()


def answer_on_transport(pipe: Pipe, scheme: Scheme, directory: Path) -> None:
    """Sends the address that it listens at, or ``Unavailable``; then serves ``ACCEPT`` and ``Exchange``."""
    try:
        options = ListenOptions(directory / scheme, "127.0.0.1:0", None, False)
        listening = listening_transport((scheme,), options, None)
    except (ImportError, ConfigError) as error:
        pipe.send(Unavailable(str(error)))
        return
    pipe.send(listening.offers.addresses[0])
    end = TransportEnd(listening.transport)
    connection: Connection | None = None
    while True:
        exchange: Exchange | None = pipe.recv()
        if exchange is ACCEPT:
            connection = end.establish()
            continue
        assert connection is not None
        block = memoryview(bytearray(exchange.size))
        for _ in range(exchange.count):
            message = end.receive()
            if exchange.kind == "echo":
                connection.send([message.data])
            else:
                block[:] = message.data
                connection.send([RECEIPT])
            message.release()
