"""Messages to a process that echoes them or takes them in, whatever carries them."""

from __future__ import annotations

import statistics
import struct
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

MARK = struct.Struct("<Q")  # at both ends of a message: its number
RECEIPT = b"received"
ACCEPT = None  # tells the answering process to accept a new connection, on which the next exchanges go
WINDOW = 8  # messages of a stream that are sent and not answered


@dataclass(frozen=True, slots=True)
class Exchange:
    """What both sides do next.

    Attributes:
        kind: ``echo``: each message is answered with itself, and the next one follows. ``stream``: each is put into a
            block of the receiver's and answered with ``RECEIPT``; up to ``WINDOW`` have no answer yet.
        size: bytes of a message, at least two marks.
    """

    kind: Literal["echo", "stream"]
    size: int
    count: int


class Line(ABC):
    """The benchmark's end of a connection to the process that answers. Whatever it waits for has a deadline."""

    def measure(self, exchange: Exchange) -> float:
        """Seconds: the median round trip of an echo, or one message of a stream on the average."""
        if exchange.kind == "echo":
            message = bytearray(exchange.size)
            return statistics.median(self._round_trip(message, number) for number in range(exchange.count))
        return self._stream(exchange) / exchange.count

    @abstractmethod
    def send(self, message: bytearray) -> None: ...

    @abstractmethod
    def await_echo(self, size: int) -> tuple[bytes, bytes]:
        """Waits for a message of this size; answers the marks at its ends, when it can be read as a whole."""

    @abstractmethod
    def await_receipt(self) -> None: ...

    def _round_trip(self, message: bytearray, number: int) -> float:
        mark = MARK.pack(number)
        message[: MARK.size] = message[-MARK.size :] = mark
        started = time.perf_counter()
        self.send(message)
        marks = self.await_echo(len(message))
        seconds = time.perf_counter() - started
        if marks != (mark, mark):
            raise RuntimeError(f"the echo of message {number} is another message: it is marked {marks}")
        return seconds

    def _stream(self, exchange: Exchange) -> float:
        message = bytearray(exchange.size)
        started = time.perf_counter()
        for number in range(exchange.count):
            if number >= WINDOW:
                self.await_receipt()
            self.send(message)
        for _ in range(min(WINDOW, exchange.count)):
            self.await_receipt()
        return time.perf_counter() - started


def marks_of(message: memoryview) -> tuple[bytes, bytes]:
    return bytes(message[: MARK.size]), bytes(message[-MARK.size :])
