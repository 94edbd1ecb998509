"""One end of an rdma connection: an inbox, an outbox, and the control connection over which both ends learn of them.

``RdmaTransport`` says when something has come.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from services.core.errors import PeerLostError
from services.dataplane.nixl import NixlAgent
from services.dataplane.rdma_inbox import Inbox, WrittenMessage
from services.dataplane.rdma_notes import REPORT, Introduction, Note
from services.dataplane.rdma_outbox import Outbox
from services.dataplane.transport import (
    Buffer,
    Connection,
    Event,
    Limits,
    Message,
    Received,
    ReleaseHook,
    message_bytes,
)


class RdmaOwner(ABC):
    """What a connection asks of its transport."""

    @abstractmethod
    def lose(self, connection: RdmaConnection, reason: str) -> None:
        """Ends it with an event, which the next ``poll`` answers."""

    @abstractmethod
    def forget(self, connection: RdmaConnection) -> None:
        """Ends it without an event, if it has not ended before."""

    @abstractmethod
    def await_progress(self, connection: RdmaConnection) -> None:
        """The connection has something that ``progress`` goes on with."""


class RdmaConnection(Connection, ReleaseHook):
    """One end of an rdma connection; as a hook it takes its own received messages back.

    Args:
        control: the control connection; the transport polls and closes it.
        token: what the peer's notes begin with.

    Raises:
        PeerLostError: there is not enough memory for these limits, or it cannot be registered.
    """

    def __init__(
        self, owner: RdmaOwner, agent: NixlAgent, control: Connection, limits: Limits, peer: str, token: int
    ) -> None:
        self.limits = limits
        self.peer = peer
        self.control = control
        self.token = token
        self.met = False  # whether the peer has introduced itself
        self.ended = False
        self._owner = owner
        self._agent = agent
        self._inbox = Inbox(agent, limits)
        try:
            self._outbox = Outbox(agent, limits)
        except PeerLostError:
            agent.deregister(self._inbox.region)
            raise

    @property
    def writing(self) -> bool:
        """Whether a write is under way."""
        return self._outbox.writing

    @property
    def all_written(self) -> bool:
        return self._outbox.empty

    def introduce(self, hello: bytes) -> None:
        """Tells the peer where to write.

        Raises:
            PeerLostError: the control connection has ended.
        """
        region = self._inbox.region
        agent = self._agent
        introduction = Introduction(self.limits, self.token, region.address, agent.name, agent.describe(region), hello)
        self.control.send([introduction.pack()])

    def meet(self, peer: Introduction) -> None:
        """The peer has told where to write.

        Raises:
            PeerLostError: NIXL cannot reach it, or it has other limits.
        """
        if peer.limits != self.limits:
            raise PeerLostError(f"the peer answered other limits: {peer.limits}")
        self._outbox.meet(peer)
        self.met = True
        self._owner.await_progress(self)

    def send(self, parts: Sequence[Buffer]) -> None:
        size = message_bytes(parts, self.limits, self.peer)
        if self.ended:
            raise PeerLostError(f"the connection to {self.peer} has ended")
        try:
            note = self._outbox.send(parts, size, self._inbox.freed)
            if note:
                self._tell(note)
            else:
                self._owner.await_progress(self)
        except PeerLostError as error:
            self._owner.lose(self, str(error))
            raise

    def progress(self) -> bool:
        """Goes on with what is to be written and told. Answers whether it must be called again.

        Raises:
            PeerLostError: the way to the peer is broken.
        """
        if not self.met:
            return False
        for note in self._outbox.progress(self._inbox.freed):
            self._tell(note)
        if self._inbox.report_is_due:
            self._tell(Note(0, 0, 0, REPORT, self._inbox.freed).pack())
        return self._outbox.writing

    def take(self, note: Note, events: list[Event]) -> None:
        """The peer has written or freed something.

        Raises:
            PeerLostError: it does not keep to the protocol.
        """
        self._outbox.take_freed(note.freed)
        if not self._outbox.empty:
            self._owner.await_progress(self)
        if note.size != REPORT and not self.ended:
            self._inbox.take(note)
            while (message := self._inbox.next(self)) is not None:
                events.append(Received(self, message))

    def discard(self) -> None:
        """Invalidates the messages that are held."""
        self._inbox.discard()

    def dispose(self) -> None:
        """Gives up the registered memory: nothing of the peer's can be on its way any more."""
        self._outbox.dispose()
        self._agent.deregister(self._outbox.region)
        self._agent.deregister(self._inbox.region)

    def close(self) -> None:
        self._owner.forget(self)
        self.discard()

    def __call__(self, message: Message) -> None:
        assert isinstance(message, WrittenMessage)
        self._inbox.free(message)
        if self._inbox.report_is_due and not self.ended:
            self._owner.await_progress(self)

    def _tell(self, note: bytes) -> None:
        self._inbox.reported()
        self.control.send([note])
