"""A place in an answer, and how a client names the last event that it has."""

from __future__ import annotations

import re
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from services.core.errors import InvalidRequestError

_PLACE = re.compile(r"([0-9]{1,10})-([0-9a-f]{8})(?:-([0-9]{1,3}))?")


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
class Place:
    """How much of one choice's stream a client has.

    Attributes:
        position: behind the tokens that it has.
        last_chunks: how many it has of the chunks behind the choice's last token: its end, and what ends the stream.
    """

    position: Position = START
    last_chunks: int = 0

    def __str__(self) -> str:
        end = f"-{self.last_chunks}" if self.last_chunks else ""
        return f"{self.position.count}-{self.position.checksum:08x}{end}"


@dataclass(frozen=True, slots=True)
class EventId:
    """The ``id`` of a server-sent event: for each choice "COUNT-CHECKSUM", or "COUNT-CHECKSUM-N" behind its last token.

    Attributes:
        places: of each choice, joined by dots in the id; none of them at the beginning.
    """

    places: tuple[Place, ...] = ()

    def __str__(self) -> str:
        return ".".join(map(str, self.places))

    @property
    def of_first(self) -> Place:
        """The place in the first choice."""
        return self.places[0] if self.places else Place()

    def of_choices(self, count: int) -> tuple[Place, ...]:
        """The places in a stream of so many choices. Raises InvalidRequestError where it is an id of another stream."""
        if self.places and len(self.places) != count:
            raise _not_of_this_stream()
        return self.places or (Place(),) * count

    @classmethod
    def parse(cls, text: str) -> EventId:
        """``text`` "" is the beginning. Raises InvalidRequestError."""
        return cls(tuple(map(_place, text.split(".")))) if text else cls()


def _place(text: str) -> Place:
    match = _PLACE.fullmatch(text)
    if match is None:
        raise _not_of_this_stream()
    return Place(Position(int(match[1]), int(match[2], 16)), int(match[3] or 0))


def _not_of_this_stream() -> InvalidRequestError:
    return InvalidRequestError(
        "Last-Event-ID: must be the id of an event of this stream, as it was sent, or left out to begin anew"
    )


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
