"""What the two sides of a collective connection tell each other over their tcp connection.

The connecting side's first message says what the connection can hold and where the groups meet; after it, each message
of the connection is announced here with its length, and then sent through the group. So the receiving side posts a
receive only for what is on its way, and of the right size.

    terms: magic [8], backend [8], max_message_bytes u64, window_bytes u64, generation u64, store port u16
    after them: length u64 (REPORT for none), freed u64; all little-endian

``freed`` counts what the sender of the message has freed of the messages that it has received, each with its charge.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from services.core.errors import ConfigError, PeerLostError
from services.dataplane.transport import SMALLEST_CHARGE_BYTES, Limits

_MAGIC = b"IFLLMNC1"
_TERMS = struct.Struct("<8s8sQQQH")
_NOTICE = struct.Struct("<QQ")
REPORT = (1 << 64) - 1
_SPARE = 64  # messages that announce nothing; a report follows from a part of a window, so there are few


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a connection.

    Attributes:
        backend: name of the backend of torch.distributed.
        limits: of both directions.
        generation: tells the connections of a store apart; none is used twice.
        store_port: of the store, at the address that the connection comes from.
    """

    backend: str
    limits: Limits
    generation: int
    store_port: int


@dataclass(frozen=True, slots=True)
class Notice:
    """A message is on its way, or ``length`` is None; and how much its sender has freed."""

    length: int | None
    freed: int


def control_limits(limits: Limits) -> Limits:
    """The limits of the tcp connection: as many announcements as the window has messages, and reports besides."""
    messages = -(-limits.window_bytes // SMALLEST_CHARGE_BYTES) + _SPARE
    return Limits(_TERMS.size, messages * SMALLEST_CHARGE_BYTES)


def pack_terms(terms: Terms) -> bytes:
    return _TERMS.pack(
        _MAGIC,
        terms.backend.encode(),
        terms.limits.max_message_bytes,
        terms.limits.window_bytes,
        terms.generation,
        terms.store_port,
    )


def unpack_terms(data: memoryview, backend: str) -> Terms:
    """The terms of a peer that uses this backend.

    Raises:
        PeerLostError: it uses another one, or these are no terms.
    """
    if len(data) != _TERMS.size:
        raise PeerLostError("a guest sent something else than the terms of a connection")
    magic, name, max_message_bytes, window_bytes, generation, port = _TERMS.unpack(data)
    if magic != _MAGIC:
        raise PeerLostError("a guest sent something else than the terms of a connection of this protocol's version")
    theirs = name.rstrip(b"\0").decode("ascii", "replace")
    if theirs != backend:
        raise PeerLostError(f"a guest uses the backend {theirs!r} and this process {backend!r}: configure the same one")
    try:
        limits = Limits(max_message_bytes, window_bytes)
    except ConfigError as error:
        raise PeerLostError(f"a guest asks for impossible limits: {error}") from error
    return Terms(theirs, limits, generation, port)


def pack_notice(notice: Notice) -> bytes:
    return _NOTICE.pack(REPORT if notice.length is None else notice.length, notice.freed)


def unpack_notice(data: memoryview) -> Notice:
    """What the peer has told.

    Raises:
        PeerLostError: this is no notice.
    """
    if len(data) != _NOTICE.size:
        raise PeerLostError(f"the peer sent a notice of {len(data)} bytes, and they have {_NOTICE.size}")
    length, freed = _NOTICE.unpack(data)
    return Notice(None if length == REPORT else length, freed)
