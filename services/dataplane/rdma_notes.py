"""What the two ends of an rdma connection tell each other: where they may be written, and what has been written.

Each end begins with an *introduction*, over the control connection:

    magic [8], max_message_bytes u64, window_bytes u64, token u64, address u64, agent's name [32],
    description_bytes u32, hello_bytes u32, description (NIXL's, of the memory at address), hello

A *note* follows each message, as NIXL's notification and as a message of the control connection; the receiver takes the
one that comes first. ``token`` is the receiver's own, from its introduction: one look serves all connections. A note
whose size is ``REPORT`` tells of no message.

    token u64, sequence u64, offset u64, size u64, freed u64

``freed`` counts the messages that its sender has received and freed, in order, since the connection began.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.transport import MAX_HELLO_BYTES, SMALLEST_CHARGE_BYTES, Limits

REPORT = (1 << 64) - 1
REPORT_PART = 4  # a report is due when this part of the window has been freed and not told
_MAGIC = b"IFLLMRD1"
_INTRODUCTION = struct.Struct("<8sQQQQ32sII")
_NOTE = struct.Struct("<QQQQQ")
_MOST_DESCRIPTION_BYTES = 60 << 10
_LINE = 64


def line_bytes(message_bytes: int) -> int:
    """What a message takes in the ring: whole cache lines, at least one."""
    return max(_LINE, (message_bytes + _LINE - 1) & -_LINE)


def charge_of(message_bytes: int) -> int:
    """What a message counts in the window."""
    return max(message_bytes, SMALLEST_CHARGE_BYTES)


def most_charged(limits: Limits) -> int:
    """What may have been sent and, as far as the sender knows, not been freed: the window and what is not told yet."""
    return limits.window_bytes + limits.window_bytes // REPORT_PART


def ring_bytes(limits: Limits) -> int:
    """Bytes of receive memory.

    Enough for ``most_charged``, in messages just longer than the smallest charge, whose lines waste most (less than a
    quarter), and for what the ring's end cuts off, which is shorter than the longest message.
    """
    most = most_charged(limits)
    return line_bytes(most + most // 4) + 2 * line_bytes(limits.max_message_bytes)


def control_limits(limits: Limits) -> Limits:
    """Of the control connection: an introduction, and a note for each message and report on its way."""
    longest = _INTRODUCTION.size + _MOST_DESCRIPTION_BYTES + MAX_HELLO_BYTES
    return Limits(longest, longest + 2 * most_charged(limits))


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who wants to be written where."""

    limits: Limits
    token: int
    address: int
    name: str
    description: bytes
    hello: bytes

    def pack(self) -> bytes:
        limits = self.limits
        assert len(self.description) <= _MOST_DESCRIPTION_BYTES, "NIXL describes one region in a few hundred bytes"
        return (
            _INTRODUCTION.pack(
                _MAGIC,
                limits.max_message_bytes,
                limits.window_bytes,
                self.token,
                self.address,
                self.name.encode(),
                len(self.description),
                len(self.hello),
            )
            + self.description
            + self.hello
        )


def unpack_introduction(data: memoryview) -> Introduction:
    """The inverse of ``Introduction.pack``.

    Raises:
        PeerLostError: this is no introduction.
    """
    head = _INTRODUCTION.size
    if len(data) < head or data[: len(_MAGIC)] != _MAGIC:
        raise PeerLostError("the peer does not speak this protocol's version of rdma")
    _, max_message, window, token, address, name, described, hello = _INTRODUCTION.unpack_from(data)
    if len(data) != head + described + hello or hello > MAX_HELLO_BYTES:
        raise PeerLostError("the peer introduced itself with impossible lengths")
    try:
        limits = Limits(max_message, window)
    except ConfigError as error:
        raise PeerLostError(f"the peer asks for impossible limits: {error}") from error
    description, said = bytes(data[head : head + described]), bytes(data[head + described :])
    return Introduction(limits, token, address, name.decode("ascii", "replace"), description, said)


@dataclass(frozen=True, slots=True)
class Note:
    token: int
    sequence: int
    offset: int
    size: int
    freed: int

    def pack(self) -> bytes:
        return _NOTE.pack(self.token, self.sequence, self.offset, self.size, self.freed)


def unpack_note(data: bytes | memoryview) -> Note:
    """The inverse of ``Note.pack``.

    Raises:
        PeerLostError: this is no note.
    """
    if len(data) != _NOTE.size:
        raise PeerLostError(f"the peer sent a note of {len(data)} bytes")
    return Note(*_NOTE.unpack(data))
