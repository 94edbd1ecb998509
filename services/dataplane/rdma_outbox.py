"""The sending end of an rdma connection: a copy of the peer's receive memory, and writes from the one into the other.

A message is copied to the place here where it is to lie there, so one offset says both, and a request is an offset and
a length. The ring begins anew when it is empty: the messages of a decode step lie where those of the last one lay, and
the requests that wrote those are posted again.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence

from services.core.errors import PeerLostError
from services.dataplane.nixl import NixlAgent, Region, Request
from services.dataplane.rdma_notes import Introduction, Note, charge_of, line_bytes, most_charged, ring_bytes
from services.dataplane.transport import Buffer, Limits

_MOST_OUTSTANDING = 4  # windows that may seem to be outstanding before the sender calls the promise broken
_MOST_REQUESTS = 1024  # prepared and kept
_GLANCE_S = 50e-6

Key = tuple[int, int]  # offset and bytes of a request


class Outbox:
    """Messages in; writes out, each with its note.

    Raises:
        PeerLostError: there is not enough memory for these limits.
    """

    def __init__(self, agent: NixlAgent, limits: Limits) -> None:
        self.region: Region = agent.register(ring_bytes(limits))
        self._agent = agent
        self._limits = limits
        self._capacity = ring_bytes(limits)
        self._peer: Introduction | None = None
        self._requests: OrderedDict[Key, Request] = OrderedDict()  # not under way; the longest unused first
        self._under_way: dict[int, tuple[Key, Request, bytes]] = {}  # by sequence number, with the note
        self._waiting: deque[bytes] = deque()  # messages without room, or before the peer is known
        self._placed: deque[tuple[int, int]] = deque()  # not freed: where each ends in the ring, and its charge
        self._charged = 0  # by what is placed
        self._charged_waiting = 0
        self._head = 0  # bytes from the beginning of time: placed up to here
        self._tail = 0  # freed up to here
        self._sequence = 0
        self._freed = 0  # by the peer, as last told

    @property
    def writing(self) -> bool:
        """Whether ``progress`` has to be called again soon."""
        return bool(self._under_way)

    @property
    def empty(self) -> bool:
        """Whether everything has been written."""
        return not self._under_way and not self._waiting

    def meet(self, peer: Introduction) -> None:
        """From now on it is known where to write.

        Raises:
            PeerLostError: NIXL cannot reach the peer.
        """
        self._agent.meet(peer.name, peer.description)
        self._peer = peer

    def send(self, parts: Sequence[Buffer], size: int, freed: int) -> bytes:
        """Posts a message, or keeps it until it has room. Answers its note, if it has been written already.

        Args:
            freed: what to tell the peer.

        Raises:
            PeerLostError: the way to the peer is broken, or no delay explains what is outstanding.
        """
        charge = charge_of(size)
        outstanding = self._charged + self._charged_waiting + charge
        if outstanding > _MOST_OUTSTANDING * self._limits.window_bytes:
            raise PeerLostError(f"a message of {size} bytes does not fit the peer's window")
        offset = None if self._waiting else self._place(size)
        if offset is None:
            self._waiting.append(b"".join(parts))
            self._charged_waiting += charge
            return b""
        return self._post(offset, parts, size, freed)

    def progress(self, freed: int) -> list[bytes]:
        """Goes on with everything that has begun or waits. Answers the notes of what has been written.

        Raises:
            PeerLostError: the way to the peer is broken.
        """
        notes = []
        for sequence, (key, request, note) in list(self._under_way.items()):
            if self._agent.is_done(request):
                del self._under_way[sequence]
                self._keep(key, request)
                notes.append(note)
        while self._waiting and (offset := self._place(len(self._waiting[0]))) is not None:
            message = self._waiting.popleft()
            self._charged_waiting -= charge_of(len(message))
            if note := self._post(offset, [message], len(message), freed):
                notes.append(note)
        return notes

    def take_freed(self, freed: int) -> None:
        """The peer has freed so many messages since the connection began; an older count is ignored.

        Raises:
            PeerLostError: it has not been sent so many.
        """
        if freed > self._freed + len(self._placed):
            raise PeerLostError(f"the peer sent an impossible count of freed messages: {freed}")
        while self._freed < freed:
            self._tail, charge = self._placed.popleft()
            self._charged -= charge
            self._freed += 1
        if not self._placed:
            self._head = self._tail = 0

    def dispose(self) -> None:
        """Gives up all requests, and the peer."""
        for _, request, _ in self._under_way.values():
            self._agent.release(request)
        for request in self._requests.values():
            self._agent.release(request)
        self._under_way.clear()
        self._requests.clear()
        self._waiting.clear()
        if self._peer is not None:
            self._agent.part(self._peer.name)
            self._peer = None

    def _place(self, size: int) -> int | None:
        """Takes room for a message and answers its offset, or None."""
        charge = charge_of(size)
        if self._peer is None or (self._placed and self._charged + charge > most_charged(self._limits)):
            return None
        length = line_bytes(size)
        offset = self._head % self._capacity
        rest = self._capacity - offset
        end = self._head + length
        if length > rest:
            offset = 0
            end += rest
        if end - self._tail > self._capacity:
            return None
        self._head = end
        self._placed.append((end, charge))
        self._charged += charge
        return offset

    def _post(self, offset: int, parts: Sequence[Buffer], size: int, freed: int) -> bytes:
        assert self._peer is not None
        data, at = self.region.data, offset
        for part in parts:
            if type(part) is memoryview and (part.ndim != 1 or part.format != "B"):
                part = part.cast("B")
            data[at : (at := at + len(part))] = part
        note = Note(self._peer.token, self._sequence, offset, size, freed).pack()
        self._sequence += 1
        key = (offset, line_bytes(size))
        request = self._requests.pop(key, None) or self._prepare(key)
        if self._agent.post(request, note) or (not self._under_way and self._glance(request)):
            self._keep(key, request)
            return note
        self._under_way[self._sequence - 1] = key, request, note
        return b""

    def _glance(self, request: Request) -> bool:
        """Looks after a write for a moment: whoever has sent one message may compute for long before the next poll."""
        until = time.perf_counter() + _GLANCE_S
        while time.perf_counter() < until:
            if self._agent.is_done(request):
                return True
        return False

    def _prepare(self, key: Key) -> Request:
        assert self._peer is not None
        offset, length = key
        return self._agent.prepare(self.region.address + offset, self._peer.address + offset, length, self._peer.name)

    def _keep(self, key: Key, request: Request) -> None:
        """A request that is done waits for its next message."""
        if key in self._requests:
            self._agent.release(request)
            return
        self._requests[key] = request
        if len(self._requests) > _MOST_REQUESTS:
            self._agent.release(self._requests.popitem(last=False)[1])
