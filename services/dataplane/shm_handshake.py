"""How two processes come to share the rings of one connection.

The connecting side creates the memory, writes its hello into it and sends a fixed greeting with the memfd over the Unix
socket; both are in flight at once and nothing waits. The accepting side checks the memory, maps it and answers with one
byte. Every later byte, either way, is a doorbell; the socket's hang-up is the end of the connection.

    greeting, little-endian: magic [8], max_message_bytes u64, window_bytes u64, hello_bytes u32
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from dataclasses import dataclass

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.memfd import create_memfd, map_foreign_memfd, map_memfd
from services.dataplane.reception import Guest
from services.dataplane.shm_ring import RingLayout
from services.dataplane.transport import MAX_HELLO_BYTES, Limits

BELL = b"\1"
_GREETING = struct.Struct("<8sQQI")
_MAGIC = b"IFLLMSH1"


@dataclass(frozen=True, slots=True)
class SharedRings:
    """The mapped memory of one connection and where things lie in it."""

    memory: mmap.mmap
    layout: RingLayout

    def hello(self) -> bytes:
        at = self.layout.hello_at
        return self.memory[at : at + self.layout.hello_bytes]


def offer(sock: socket.socket, hello: bytes, limits: Limits) -> SharedRings:
    """Creates the memory of a connection and sends it to the other side.

    Raises:
        ConfigError: there is not enough memory for ``limits``.
        PeerLostError: the other side has hung up already, or the memory cannot be mapped.
    """
    layout = RingLayout(limits, len(hello))
    fd = create_memfd("infinite-llm-rings", layout.total_bytes)
    try:
        memory = map_memfd(fd, layout.total_bytes)
        memory[layout.hello_at : layout.hello_at + len(hello)] = hello
        greeting = _GREETING.pack(_MAGIC, limits.max_message_bytes, limits.window_bytes, len(hello))
        # A fresh socket's buffer takes a few bytes whole.
        socket.send_fds(sock, [greeting], [fd])
    except OSError as error:
        raise PeerLostError(f"cannot share memory with the peer: {error.strerror}") from error
    finally:
        os.close(fd)
    return SharedRings(memory, layout)


class ShmGuest(Guest[socket.socket, SharedRings]):
    """Collects a greeting and the memfd that comes with it; answers the mapped memory."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._greeting = b""
        self._fd = -1

    def receive(self) -> SharedRings | None:
        wanted = _GREETING.size - len(self._greeting)
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, wanted, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerLostError(f"a guest hung up: {error.strerror}") from error
        for fd in fds:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = fd
        if not data:
            raise PeerLostError("a guest hung up before its greeting")
        self._greeting += data
        if len(self._greeting) < _GREETING.size:
            return None
        return self._map()

    def _map(self) -> SharedRings:
        magic, max_message_bytes, window_bytes, hello_bytes = _GREETING.unpack(self._greeting)
        if magic != _MAGIC or hello_bytes > MAX_HELLO_BYTES or self._fd < 0:
            raise PeerLostError("a guest sent something else than a greeting of this protocol's version")
        try:
            layout = RingLayout(Limits(max_message_bytes, window_bytes), hello_bytes)
        except ConfigError as error:
            raise PeerLostError(f"a guest asks for impossible limits: {error}") from error
        return SharedRings(map_foreign_memfd(self._fd, layout.total_bytes, map_memfd), layout)

    def discard(self) -> None:
        """Closes the memfd, which a mapping does not need."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
