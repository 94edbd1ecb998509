"""The receiving end of an rdma connection: memory that the peer writes, and the messages in it.

Where a message lies the sender says; it keeps away from what it has not been told to be free. One that does not only
spoils its own messages: nothing that it says leads outside the memory, and the window is checked by count.
"""

from __future__ import annotations

from collections import deque

from services.core.errors import PeerLostError
from services.dataplane.nixl import NixlAgent, Region
from services.dataplane.rdma_notes import REPORT_PART, Note, charge_of, most_charged, ring_bytes
from services.dataplane.transport import SMALLEST_CHARGE_BYTES, Limits, Message, ReleaseHook

_RELEASED = memoryview(b"")


class WrittenMessage(Message):
    """A message where the peer has written it."""

    __slots__ = ("charge", "released")

    def __init__(self, data: memoryview, release: ReleaseHook, charge: int) -> None:
        super().__init__(data, release)
        self.charge = charge
        self.released = False


class Inbox:
    """Notes in, in any order and some twice; messages out, in order and once.

    Raises:
        PeerLostError: there is not enough memory for these limits.
    """

    def __init__(self, agent: NixlAgent, limits: Limits) -> None:
        self.region: Region = agent.register(ring_bytes(limits))
        self.freed = 0  # messages freed, in order, since the connection began
        self._limits = limits
        self._data = self.region.data[: ring_bytes(limits)]
        self._most_early = most_charged(limits) // SMALLEST_CHARGE_BYTES
        self._early: dict[int, Note] = {}  # by sequence number: not handed out yet
        self._next = 0  # sequence number of the next message to hand out
        self._held: deque[WrittenMessage] = deque()  # handed out and not freed, in order
        self._charged = 0  # by what is held
        self._unreported = 0  # charges freed that the peer has not been told of

    @property
    def report_is_due(self) -> bool:
        return self._unreported * REPORT_PART >= self._limits.window_bytes

    def reported(self) -> None:
        """The peer is told of ``freed`` now."""
        self._unreported = 0

    def take(self, note: Note) -> None:
        """A message has been written; ``next`` answers it when all before it have been.

        Raises:
            PeerLostError: there can be no such message.
        """
        if note.sequence < self._next or note.sequence in self._early:
            return  # the note has come the other way
        if note.size > self._limits.max_message_bytes or note.offset + note.size > len(self._data):
            raise PeerLostError(f"the peer wrote an impossible message: {note.size} bytes at {note.offset}")
        if note.sequence - self._next > self._most_early:
            raise PeerLostError("the peer sent more messages than fit the window")
        self._early[note.sequence] = note

    def next(self, hook: ReleaseHook) -> WrittenMessage | None:
        """The next message, or None.

        Raises:
            PeerLostError: the sender does not keep within the window.
        """
        note = self._early.pop(self._next, None)
        if note is None:
            return None
        charge = charge_of(note.size)
        if self._held and self._charged + charge > self._limits.window_bytes:
            raise PeerLostError(f"the peer sent a message of {note.size} bytes that does not fit the window")
        self._next += 1
        message = WrittenMessage(self._data[note.offset : note.offset + note.size], hook, charge)
        self._held.append(message)
        self._charged += charge
        return message

    def free(self, message: WrittenMessage) -> None:
        """Takes the room of a released message back, as far as all messages before it are released."""
        message.data = _RELEASED
        message.released = True
        held = self._held  # empty after discard
        while held and held[0].released:
            first = held.popleft()
            self._charged -= first.charge
            self._unreported += first.charge
            self.freed += 1

    def discard(self) -> None:
        """Invalidates all messages. Nothing but releases may follow."""
        for message in self._held:
            message.data = _RELEASED
        self._held.clear()
