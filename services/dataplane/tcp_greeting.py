"""How a tcp connection begins.

The connecting side sends a greeting, and may send frames right behind it; the accepting side answers with 8 bytes once
its ``poll`` has taken the connection, and frames follow. With TLS, a process that may not connect gets 8 other bytes.

    greeting, little-endian: magic [8], max_message_bytes u64, window_bytes u64, hello_bytes u32, hello
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.reception import Guest
from services.dataplane.stream import Stream
from services.dataplane.tcp_frames import FrameReader
from services.dataplane.transport import MAX_HELLO_BYTES, Limits

# They differ, so that a socket which TCP has connected to itself (on a port nobody listens on) is not taken for a peer.
_MAGIC = b"IFLLMTC1"
ANSWER = b"IFLLMTA1"
REFUSAL = b"IFLLMTR1"
# The first bytes of a TLS handshake, and of TLS' answer to something else.
_TLS_HANDSHAKE, _TLS_ALERT = b"\x16\x03", b"\x15\x03"
_GREETING = struct.Struct("<8sQQI")


@dataclass(frozen=True, slots=True)
class TcpGreeting:
    """A greeting and the memory that its connection receives into."""

    limits: Limits
    hello: bytes
    reader: FrameReader


def pack_greeting(hello: bytes, limits: Limits) -> bytes:
    return _GREETING.pack(_MAGIC, limits.max_message_bytes, limits.window_bytes, len(hello)) + hello


def why_no_answer(received: bytes) -> str:
    """What was wrong where the other side's first bytes are not the answer's."""
    if received == REFUSAL:
        return "the peer does not let in the role that this process's certificate says"
    if received.startswith(_TLS_ALERT):
        return "the peer speaks TLS, and this process has none configured"
    return "the peer does not speak this protocol's version"


class TcpGuest(Guest[Stream, TcpGreeting]):
    """Collects a greeting, to the byte: what comes behind it belongs to the connection."""

    def __init__(self, sock: Stream) -> None:
        super().__init__(sock)
        self._received = bytearray()
        self._wanted = _GREETING.size
        self._limits: Limits | None = None  # once the fixed part has arrived

    def receive(self) -> TcpGreeting | None:
        try:
            while len(self._received) < self._wanted:
                data = self.sock.recv(self._wanted - len(self._received))
                if not data:
                    raise PeerLostError("a guest hung up before its greeting")
                self._received += data
                if self._limits is None and len(self._received) == self._wanted:
                    self._limits = self._check()
        except BlockingIOError:
            return None
        except OSError as error:
            raise PeerLostError(f"a guest hung up: {error.strerror}") from error
        assert self._limits is not None
        return TcpGreeting(self._limits, bytes(self._received[_GREETING.size :]), FrameReader(self._limits))

    def _check(self) -> Limits:
        magic, max_message_bytes, window_bytes, hello_bytes = _GREETING.unpack(self._received)
        if magic.startswith(_TLS_HANDSHAKE):
            raise PeerLostError("a guest speaks TLS, and this process has none configured")
        if magic != _MAGIC or hello_bytes > MAX_HELLO_BYTES:
            raise PeerLostError("a guest sent something else than a greeting of this protocol's version")
        self._wanted += hello_bytes
        try:
            return Limits(max_message_bytes, window_bytes)
        except ConfigError as error:
            raise PeerLostError(f"a guest asks for impossible limits: {error}") from error
