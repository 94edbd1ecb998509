"""Frames of the tcp transport, and the memory that a connection receives into.

A frame is a header, the message, and padding up to a multiple of 64 bytes:

    | length u64, freed u64 | message ... pad |

``freed`` counts what the sender of the frame has freed of the messages it has received, each with its charge, since the
connection began. So every answer also says how much of the window is free again. A frame of the length ``REPORT`` has
64 bytes and carries nothing else; it is sent where much has been freed and no message goes the other way.

The socket's bytes go straight into a ring, and ``Message.data`` is a view of it. The ring's data begin 16 bytes before
a multiple of 64, so every message lies aligned to 64 bytes, and in one piece: a frame that the end of the ring has cut
is moved to the ring's beginning, as much of it as has arrived, and goes on there. An empty ring begins anew, so that a
connection which is never far behind touches only the first pages of its memory.
"""

from __future__ import annotations

import mmap
import struct
from collections import deque
from collections.abc import Sequence
from ctypes import addressof, c_char

from kernels.cpu.library import StreamView
from services.core.errors import ConfigError, PeerLostError
from services.dataplane.memfd import available_bytes
from services.dataplane.stream import Stream
from services.dataplane.transport import SMALLEST_CHARGE_BYTES, Buffer, Limits, Message, ReleaseHook

HEADER = struct.Struct("<QQ")  # length, freed
REPORT = (1 << 64) - 1
_LINE = 64
_PADDING = bytes(_LINE)
_READ_BYTES = 1 << 20  # of one connection in one turn, so that a long message holds up nobody
_RELEASED = memoryview(b"")


def frame_bytes(message_bytes: int) -> int:
    """What a message takes on the wire and in the ring."""
    return (message_bytes + HEADER.size + _LINE - 1) & -_LINE


def charge_of(message_bytes: int) -> int:
    """What a message counts in the window."""
    return max(message_bytes, SMALLEST_CHARGE_BYTES)


def frame(parts: Sequence[Buffer], size: int, freed: int) -> list[Buffer]:
    """The buffers of a frame around a message of ``size`` bytes."""
    return [HEADER.pack(size, freed), *parts, _PADDING[: -(size + HEADER.size) % _LINE]]


def report(freed: int) -> list[Buffer]:
    """The buffers of a frame without a message."""
    return [HEADER.pack(REPORT, freed), _PADDING[HEADER.size :]]


class FrameMessage(Message):
    """A message in the ring, with its charge and the count up to which its release frees the ring."""

    __slots__ = ("charge", "end", "released")

    def __init__(self, data: memoryview, release: ReleaseHook, charge: int, end: int) -> None:
        super().__init__(data, release)
        self.charge = charge
        self.end = end
        self.released = False


class FrameReader:
    """The receiving end of a connection: bytes in, messages out, and the sender's promise checked.

    ``tail <= read <= filled <= tail + capacity`` count bytes of the ring since it was last empty: released up to tail,
    handed out up to read, received up to filled. What lies between read and filled is one piece, without the ring's
    end.

    The capacity suffices for any sender that keeps within the window: for the window in messages of the smallest
    charge, which waste most on their frames, for what the ring's end has cut (shorter than the longest frame, and what
    is in use passes the end at most once), and for the header of one frame more.

    Raises:
        PeerLostError: there is not enough memory for these limits. It is touched only as it is used.
    """

    def __init__(self, limits: Limits) -> None:
        messages = -(-limits.window_bytes // SMALLEST_CHARGE_BYTES) * frame_bytes(SMALLEST_CHARGE_BYTES)
        self._capacity = messages + 2 * frame_bytes(limits.max_message_bytes)
        self._limits = limits
        self._data = frame_memory(self._capacity)
        self._held: deque[FrameMessage] = deque()  # handed out and not freed, in order
        self._charged = 0  # by what is held
        self._tail = 0
        self._read = 0
        self._filled = 0
        self.freed = 0  # charges freed, since the connection began
        self.freed_by_peer = 0  # the same, of the peer, as last told

    @property
    def held(self) -> int:
        """Messages that still take room."""
        return len(self._held)

    def receive(self, sock: Stream) -> int:
        """Takes what has arrived, up to a bound; answers 0 if the peer has hung up. ``next`` must have answered None.

        Raises:
            OSError: nothing has arrived, or the connection is broken.
        """
        if self._read == self._filled and not self._held:
            self._tail = self._read = self._filled = 0
        at = self._filled % self._capacity
        room = min(self._capacity - at, self._tail + self._capacity - self._filled, _READ_BYTES)
        assert room > 0, "the ring is large enough for all that the window allows"
        got = sock.recv_into(self._data[at : at + room])
        self._filled += got
        return got

    def next(self, hook: ReleaseHook) -> FrameMessage | None:
        """The next message that is complete, or None.

        Raises:
            PeerLostError: this is no frame, or the sender does not keep within the window.
        """
        while (have := self._filled - self._read) >= HEADER.size:
            offset = self._read % self._capacity
            size, freed = HEADER.unpack_from(self._data, offset)
            if freed < self.freed_by_peer:
                raise PeerLostError(f"the peer sent an impossible count of freed bytes: {freed}")
            self.freed_by_peer = freed
            if size == REPORT:
                if have < _LINE:
                    return None
                # It takes no room in the ring, or any number of them could lie between two messages that are held.
                self._data[offset : offset + have - _LINE] = self._data[offset + _LINE : offset + have]
                self._filled -= _LINE
                continue
            self._check(size)
            length = frame_bytes(size)
            rest = self._capacity - offset
            if length > rest:
                self._data[:have] = self._data[offset : offset + have]
                self._read += rest
                self._filled += rest
                offset = 0
            if have < length:
                return None
            self._read += length
            at = offset + HEADER.size
            message = FrameMessage(self._data[at : at + size], hook, charge_of(size), self._read)
            self._held.append(message)
            self._charged += message.charge
            return message
        return None

    def free(self, message: FrameMessage) -> None:
        """Takes the room of a released message back, as far as all messages before it are released."""
        message.data = _RELEASED
        message.released = True
        held = self._held  # empty after discard
        while held and held[0].released:
            first = held.popleft()
            self._tail = first.end
            self._charged -= first.charge
            self.freed += first.charge

    def bind(self, view: StreamView) -> None:
        """Says where the ring is."""
        view.in_, view.capacity = addressof(c_char.from_buffer(self._data)), self._capacity

    def lend(self, view: StreamView) -> None:
        """Compiled code receives now; nothing may be held."""
        have = self._filled - self._read
        offset = self._read % self._capacity
        if have and offset:
            self._data[:have] = self._data[offset : offset + have]
        view.at, view.filled = 0, have

    def take_back(self, view: StreamView) -> None:
        """Compiled code has received; ``next`` answers what it has left."""
        self._tail = self._read = view.at
        self._filled = view.filled
        self.freed, self.freed_by_peer = view.freed, view.freed_by_peer

    def discard(self) -> None:
        """Invalidates all messages and lets go of the memory. Nothing but releases may follow."""
        for message in self._held:
            message.data = _RELEASED
        self._held.clear()
        self._data = _RELEASED

    def _check(self, size: int) -> None:
        if size > self._limits.max_message_bytes:
            raise PeerLostError(f"the peer sent an impossible length: {size} bytes")
        if self._held and self._charged + charge_of(size) > self._limits.window_bytes:
            raise PeerLostError(f"the peer sent a message of {size} bytes that does not fit the window")


def frame_memory(size: int) -> memoryview:
    """Zeroed pages for frames: what lies behind a header at its beginning is aligned. Never unmapped by hand: views and
    tensors keep it alive.

    Raises:
        PeerLostError: there is not enough memory.
    """
    try:
        available = available_bytes()
        if size + _LINE <= available:
            return memoryview(mmap.mmap(-1, size + _LINE))[_LINE - HEADER.size :][:size]
    except (ConfigError, OSError, ValueError) as error:
        raise PeerLostError(f"no memory for messages: {error}") from error
    raise PeerLostError(
        f"no memory for messages: {size >> 20} MiB are needed, {available >> 20} MiB of memory are available"
    )
