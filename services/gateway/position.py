"""A place in an answer, and how a client names the last event that it has."""

from __future__ import annotations

import re
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from services.core.errors import InvalidRequestError

_EVENT_ID = re.compile(r"([0-9]{1,10})-([0-9a-f]{8})(?:-([0-9]{1,3}))?")


@dataclass(frozen=True, slots=True)
class Position:
    """Behind ``count`` tokens; ``checksum`` is the CRC-32 of their ids, each as uint32 little-endian."""

    count: int = 0
    checksum: int = 0

    def after(self, ids: Sequence[int]) -> Position:
        """The position behind these tokens, which follow."""
        return Position(self.count + len(ids), zlib.crc32(pack_ids(ids), self.checksum))


START = Position()


@dataclass(frozen=True, slots=True)
class EventId:
    """The ``id`` of a server-sent event: "COUNT-CHECKSUM", and "-N" behind the N-th of the chunks that end a stream.

    Attributes:
        position: behind the event's tokens.
        last_chunks: how many of the chunks behind the last token the client has with this event.
    """

    position: Position = START
    last_chunks: int = 0

    def __str__(self) -> str:
        end = f"-{self.last_chunks}" if self.last_chunks else ""
        return f"{self.position.count}-{self.position.checksum:08x}{end}"

    @classmethod
    def parse(cls, text: str) -> EventId:
        """``text`` "" is the beginning. Raises InvalidRequestError."""
        if not text:
            return cls()
        match = _EVENT_ID.fullmatch(text)
        if match is None:
            raise InvalidRequestError(
                "Last-Event-ID: must be the id of an event of this stream, as it was sent, or left out to begin anew"
            )
        return cls(Position(int(match[1]), int(match[2], 16)), int(match[3] or 0))


def pack_ids(ids: Sequence[int]) -> bytes:
    """uint32 little-endian."""
    return _little_endian(array("I", ids)).tobytes()


def unpack_ids(packed: bytes) -> Sequence[int]:
    """The other way round."""
    ids = array("I")
    ids.frombytes(packed)
    return _little_endian(ids)


def _little_endian(ids: array[int]) -> array[int]:
    if sys.byteorder == "big":
        ids.byteswap()
    return ids
