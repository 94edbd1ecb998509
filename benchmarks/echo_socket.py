"""The yardsticks of ``python -m benchmarks.dataplane``: a bare blocking TCP socket within the host, and memcpy."""

from __future__ import annotations

import socket
import struct
import time
from multiprocessing.connection import Connection

from benchmarks.echo_line import ACCEPT, RECEIPT, WINDOW, Exchange, Line, marks_of

_TIMEOUT = struct.pack("@ll", 30, 0)  # of one system call, s and us; Python's own would add a poll to each


class SocketLine(Line):
    """To a process that runs ``answer_on_socket`` and accepts now; there are no frames, as both know the size."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = _tuned(socket.create_connection(address))
        self._received = memoryview(b"")

    def send(self, message: bytearray) -> None:
        self._socket.sendall(message)

    def await_echo(self, size: int) -> tuple[bytes, bytes]:
        if len(self._received) != size:
            self._received = memoryview(bytearray(size))
        _receive(self._socket, self._received)
        return marks_of(self._received)

    def await_receipt(self) -> None:
        if self._socket.recv(len(RECEIPT), socket.MSG_WAITALL) != RECEIPT:
            raise RuntimeError("the bare socket's other end is gone")

    def close(self) -> None:
        self._socket.close()


def answer_on_socket(pipe: Connection) -> None:
    """Sends the address that it listens at, then serves ``ACCEPT`` and ``Exchange``."""
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname())
    sock: socket.socket | None = None
    while True:
        exchange: Exchange | None = pipe.recv()
        if exchange is ACCEPT:
            sock = _tuned(listener.accept()[0])
            continue
        assert sock is not None
        block = memoryview(bytearray(exchange.size))
        for _ in range(exchange.count):
            _receive(sock, block)
            sock.sendall(block if exchange.kind == "echo" else RECEIPT)


class Memcpy:
    """What copying takes in one process: there and back for an echo, into the receiver's block for a stream."""

    def measure(self, exchange: Exchange) -> float:
        message = memoryview(bytes(exchange.size))
        blocks = [memoryview(bytearray(exchange.size)) for _ in range(WINDOW)]
        copies = 2 if exchange.kind == "echo" else 1
        started = time.perf_counter()
        for number in range(copies * exchange.count):
            blocks[number % WINDOW][:] = message
        return (time.perf_counter() - started) / exchange.count


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, _TIMEOUT)
    return sock


def _receive(sock: socket.socket, into: memoryview) -> None:
    """Fills ``into``."""
    while into:
        got = sock.recv_into(into)
        if not got:
            raise RuntimeError("the bare socket's other end is gone")
        into = into[got:]
