"""A peer that sends anything through a stream of frames."""

from __future__ import annotations

import contextlib
import random
import socket

from services.dataplane.tcp import TcpTransport
from services.dataplane.tcp_connection import TcpConnection
from services.dataplane.tcp_frames import HEADER, REPORT, FrameReader, charge_of, frame, report
from services.dataplane.transport import Limits, Lost, Received


class StreamScribbler:
    """The other end of a connection: sends messages, whole or in pieces, reports, and frames with a word written over.

    Args:
        payload_bytes: of a message that fits, behind its header of 64 bytes.
    """

    def __init__(self, choose: random.Random, limits: Limits, payload_bytes: int) -> None:
        self.transport = TcpTransport()
        ours, self._sock = socket.socketpair()
        for sock in (ours, self._sock):
            sock.setblocking(False)
        self.reader = FrameReader(limits)
        self.connection = TcpConnection(self.transport, ours, self.reader, limits, "scribbler", 0)
        self.transport._adopt(self.connection)
        self._choose, self._payload_bytes = choose, payload_bytes
        self._unsent = b""
        self.lost = False

    def act(self, header: bytes) -> None:
        """Sends one of these, or all but its end, which then goes before the next."""
        choose, size = self._choose, 64 + self._payload_bytes
        message = [header, choose.randbytes(self._payload_bytes)]
        freed = choose.choice([0] * 8 + [64, 256, 1 << 63, choose.randrange(1 << 64)])
        match choose.randrange(5):
            case 0 | 1:
                data = b"".join(frame(message, size, 0))
            case 2:
                data = b"".join(report(freed))
            case 3:
                wrong = choose.choice([0, 63, 64, size - 1, size + 1, 1 << 20, REPORT - 1, choose.randrange(1 << 64)])
                data = HEADER.pack(wrong, freed) + b"".join(frame(message, size, 0))[HEADER.size :]
            case _:  # a word of what the message says
                at = 8 * choose.randrange(8)
                data = b"".join(frame([header[:at], choose.randbytes(8), header[at + 8 :], message[1]], size, 0))
        data = self._unsent + data
        end = max(0, len(data) - choose.choice([0, 0, 0, 1, 16, 64, len(data) // 2]))
        try:
            end = self._sock.send(data[:end])
        except OSError:  # hung up, or nobody reads
            end = 0
        self._unsent = data[end:]
        with contextlib.suppress(OSError):
            self._sock.recv(1 << 20)

    def read_into(self, reader: FrameReader) -> None:
        """Takes what has been sent to it."""
        with contextlib.suppress(BlockingIOError):
            reader.receive(self._sock)

    def receive(self) -> int:
        """Takes and releases what compiled code has left; answers the charges of it."""
        charges = 0
        for event in self.transport.poll(0):
            self.lost = self.lost or isinstance(event, Lost)
            if isinstance(event, Received):
                charges += charge_of(len(event.message.data))
                event.message.release()
        return charges

    def margins(self) -> bytes:
        """What lies around the memory that frames are received into."""
        data = self.reader._data
        whole = memoryview(data.obj)  # type: ignore[arg-type]
        before = 64 - HEADER.size
        return bytes(whole[:before]) + bytes(whole[before + len(data) :])

    def close(self) -> None:
        self.transport.close()
        self._sock.close()
