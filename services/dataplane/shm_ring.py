"""A byte ring in shared memory with one writer and one reader, both distrusting each other.

A ring has ``capacity`` bytes of data (a multiple of 64) and three counters, each on its own cache line and each written
by one side only. ``head`` and ``tail`` count bytes from the beginning of time, modulo nothing:

    head     writer: everything before it is published
    tail     reader: everything before it is released
    asleep   reader: odd while it sleeps and wants a doorbell, one value per sleep

A record is an 8-byte length, the message, and padding up to a multiple of 64. The data begin 8 bytes before a multiple
of 64, so every message lies aligned to 64 bytes and in one piece: where the rest of the ring is too short for a record
stands the length ``WRAP``, and the record begins anew at offset 0. The skipped rest is released with that record.

    offset 0                                                      capacity
    | length | message ...  pad | length | message ... pad | WRAP ~~~~~~~ |

Order: message and length, fence, head, fence, asleep. The second fence pairs with the reader's between asleep and head:
either the writer sees the reader asleep and rings, or the reader sees the new head and does not sleep.

Neither side reads its own counters back, and what the other side writes is checked before use; nothing that a peer
writes leads outside the ring. Counters are 8 bytes, aligned, read and written in one access (memoryview of format "Q").
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from ctypes import addressof, c_char, c_uint64
from dataclasses import dataclass

from kernels.cpu.library import RingView
from services.core.errors import PeerLostError
from services.dataplane.transport import SMALLEST_CHARGE_BYTES, Buffer, Limits, Message, ReleaseHook

WRAP = (1 << 64) - 1
_LINE = 64
_PAGE = 4096
# Words (8 bytes) in the control page: the counters of one ring 128 bytes apart, the rings 1024.
_HEAD, _TAIL, _ASLEEP = 0, 16, 32
_RING_WORDS = 128
_RELEASED = memoryview(b"")


def record_bytes(message_bytes: int) -> int:
    """Ring bytes that a message takes: with its length, rounded up to a cache line."""
    return (message_bytes + 8 + _LINE - 1) & -_LINE


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where things lie in the shared memory of one connection.

    Ring 0 carries what the connecting side sends, ring 1 what the accepting side sends:

        | control page | hello | ring 0's data | ring 1's data |
    """

    limits: Limits
    hello_bytes: int

    @property
    def capacity(self) -> int:
        """Bytes of one ring.

        Enough for the window in messages of the smallest charge, which waste most on their records, and for one longest
        record: what a wrap skips is shorter than the record that did not fit, and what is in use wraps at most once.
        """
        charge = SMALLEST_CHARGE_BYTES
        messages = -(-self.limits.window_bytes // charge) * record_bytes(charge)
        return messages + 2 * record_bytes(self.limits.max_message_bytes)

    @property
    def hello_at(self) -> int:
        return _PAGE

    def data_at(self, ring: int) -> int:
        """Offset of a ring's data: 8 bytes before a multiple of 64."""
        hello = (self.hello_bytes + _LINE - 1) & -_LINE
        return _PAGE + hello + ring * (self.capacity + _LINE) + _LINE - 8

    @property
    def total_bytes(self) -> int:
        return (self.data_at(2) + _PAGE - 1) & -_PAGE


class MemoryFence:
    """A full memory fence, which Python does not offer: a release and an acquire of one lock, in this order.

    Both are atomic operations on the same word; on x86-64 each is a fence by itself, on ARMv8 nothing before the
    release and nothing after the acquire crosses the pair. The lock is held between calls and never waited for.
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self) -> None:
        lock = threading.Lock()
        lock.acquire()
        self._acquire, self._release = lock.acquire, lock.release

    def __call__(self) -> None:
        self._release()
        self._acquire()


class RingWriter:
    """The sending end of a ring."""

    __slots__ = ("_asleep_seen", "_at", "_capacity", "_counters", "_data", "_fence", "_head", "_lengths", "_tail")

    def __init__(self, memory: mmap.mmap, layout: RingLayout, ring: int) -> None:
        self._counters, self._data, self._lengths = _views(memory, layout, ring)
        self._at = _Addresses(self._counters, self._data)
        self._capacity = layout.capacity
        self._fence = MemoryFence()
        self._head = 0
        self._tail = 0  # the reader's, as last seen
        self._asleep_seen = 0  # the sleep that a doorbell has been rung for

    def write(self, parts: Sequence[Buffer], size: int) -> bool:
        """Publishes one message and answers whether the reader sleeps and needs a doorbell.

        Args:
            parts: C-contiguous buffers of ``size`` bytes together.

        Raises:
            PeerLostError: the message does not fit, or the reader's counter is impossible.
        """
        record = (size + 71) & -64  # record_bytes, without the call
        head, data = self._head, self._data
        offset = head % self._capacity
        rest = self._capacity - offset
        end = head + record if record <= rest else head + rest + record
        if end - self._tail > self._capacity:
            self._make_room(end, size)
        if record > rest:
            self._lengths[offset >> 3] = WRAP
            offset = 0
        self._lengths[offset >> 3] = size
        at = offset + 8
        for part in parts:
            if type(part) is memoryview and (part.ndim != 1 or part.format != "B"):
                part = part.cast("B")
            data[at : (at := at + len(part))] = part
        self._head = end
        self._fence()
        self._counters[_HEAD] = end
        self._fence()
        asleep = self._counters[_ASLEEP]
        if not asleep & 1 or asleep == self._asleep_seen:
            return False
        self._asleep_seen = asleep
        return True

    def bind(self, view: RingView) -> None:
        """Says where the ring is."""
        self._at.put(view, self._capacity)

    def lend(self, view: RingView) -> None:
        """Compiled code writes now."""
        view.head, view.tail, view.at = self._head, self._tail, self._asleep_seen

    def take_back(self, view: RingView) -> None:
        """Compiled code has written."""
        self._head, self._tail, self._asleep_seen = view.head, view.tail, view.at

    def _make_room(self, end: int, size: int) -> None:
        tail = self._counters[_TAIL]
        if not self._tail <= tail <= self._head:
            raise PeerLostError(f"the peer wrote an impossible counter into the ring: released up to {tail}")
        self._tail = tail
        if end - tail > self._capacity:
            raise PeerLostError(f"a message of {size} bytes does not fit the peer's window")


class RingMessage(Message):
    """A message in the ring, with the counter value up to which its release frees the ring."""

    __slots__ = ("end", "released")

    def __init__(self, data: memoryview, release: ReleaseHook, end: int) -> None:
        super().__init__(data, release)
        self.end = end
        self.released = False


class RingReader(ReleaseHook):
    """The receiving end of a ring, and what takes its messages back."""

    __slots__ = (
        "_asleep",
        "_at",
        "_capacity",
        "_counters",
        "_data",
        "_fence",
        "_head",
        "_held",
        "_lengths",
        "_max_message",
        "_read",
        "_tail",
        "published",
    )

    def __init__(self, memory: mmap.mmap, layout: RingLayout, ring: int) -> None:
        self._counters, self._data, self._lengths = _views(memory, layout, ring)
        self._at = _Addresses(self._counters, self._data)
        self.published = c_uint64.from_buffer(self._counters, 8 * _HEAD)  # head, to be watched
        self._capacity = layout.capacity
        self._max_message = layout.limits.max_message_bytes
        self._fence = MemoryFence()
        self._held: deque[RingMessage] = deque()  # read and not freed, in order
        self._read = 0  # everything before it has been handed out
        self._head = 0  # the writer's, as last seen and checked
        self._tail = 0
        self._asleep = 0

    @property
    def held(self) -> int:
        """Messages that still take room."""
        return len(self._held)

    @property
    def taken(self) -> int:
        """What ``published`` is for as long as there is nothing to read."""
        return self._read

    def pending(self) -> bool:
        """Whether ``read`` has something to look at."""
        return self._counters[_HEAD] != self._read

    def read(self) -> RingMessage | None:
        """The next message, or None.

        Raises:
            PeerLostError: what the writer has left there is no message.
        """
        at = self._read
        if at == self._head:
            head = self._counters[_HEAD]
            if head == at:
                return None
            if not at < head <= self._tail + self._capacity or head & (_LINE - 1):
                raise PeerLostError(f"the peer wrote an impossible counter into the ring: published up to {head}")
            self._head = head
            self._fence()
        offset = at % self._capacity
        size = self._lengths[offset >> 3]
        if size == WRAP and offset:
            at += self._capacity - offset
            offset = 0
            if at >= self._head:
                raise PeerLostError("the peer wrote a wrap mark into the ring and no message behind it")
            size = self._lengths[0]
        end = at + ((size + 71) & -64)
        if size > self._max_message or end > self._head or offset + (end - at) > self._capacity:
            raise PeerLostError(f"the peer wrote an impossible length into the ring: {size} bytes")
        message = RingMessage(self._data[offset + 8 : offset + 8 + size], self, end)
        self._held.append(message)
        self._read = end
        return message

    def bind(self, view: RingView) -> None:
        """Says where the ring is."""
        self._at.put(view, self._capacity)

    def lend(self, view: RingView) -> None:
        """Compiled code reads now; no message is held."""
        view.head, view.tail, view.at = self._head, self._tail, self._read

    def take_back(self, view: RingView) -> None:
        """Compiled code has read."""
        self._head, self._tail, self._read = view.head, view.tail, view.at

    def __call__(self, message: Message) -> None:
        """Frees the ring up to the first message that is still held."""
        assert isinstance(message, RingMessage)
        message.data = _RELEASED
        message.released = True
        held = self._held
        if not held or held[0] is not message:  # held is empty after discard
            return
        while held and held[0].released:
            self._tail = held.popleft().end
        self._fence()  # the messages have been read before the writer may overwrite them
        self._counters[_TAIL] = self._tail

    def fall_asleep(self) -> bool:
        """Asks for a doorbell. Answers False, and stays awake, if there is something to read."""
        self._asleep += 1
        self._counters[_ASLEEP] = self._asleep
        self._fence()
        if self._counters[_HEAD] == self._read:
            return True
        self.wake_up()
        return False

    def wake_up(self) -> None:
        """Wants no more doorbells. The caller has been asleep and reads the ring now."""
        self._asleep += 1
        self._counters[_ASLEEP] = self._asleep

    def discard(self) -> None:
        """Invalidates all messages and lets go of the memory. Nothing but releases may follow."""
        for message in self._held:
            message.data = _RELEASED
        self._held.clear()
        self._at.forget()
        self.published = c_uint64()
        self._counters = self._data = self._lengths = _RELEASED


class _Addresses:
    """Where compiled code finds a ring."""

    __slots__ = ("_counters", "_data")

    def __init__(self, counters: memoryview, data: memoryview) -> None:
        self._counters, self._data = c_char.from_buffer(counters), c_char.from_buffer(data)

    def put(self, view: RingView, capacity: int) -> None:
        view.counters, view.data, view.capacity = addressof(self._counters), addressof(self._data), capacity

    def forget(self) -> None:
        self._counters = self._data = c_char()


def _views(memory: mmap.mmap, layout: RingLayout, ring: int) -> tuple[memoryview, memoryview, memoryview]:
    """A ring's counters (words), data (bytes) and the same data as words, for the lengths."""
    first = ring * _RING_WORDS * 8
    counters = memoryview(memory)[first : first + _RING_WORDS * 8].cast("Q")
    at = layout.data_at(ring)
    data = memoryview(memory)[at : at + layout.capacity]
    return counters, data, data.cast("Q")
