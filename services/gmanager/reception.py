"""Where heartbeats come in, directly or by way of a relay: each stream's messages checked, in order, into the view."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

from infinitellm.internal.v1 import gmanager_pb2
from services.core.errors import InvalidRequestError, ResyncRequiredError
from services.gmanager.heartbeat_messages import heartbeat_from_proto
from services.gmanager.planning import Planning
from services.gmanager.relays import Relays
from services.gmanager.view import ClusterView

logger = logging.getLogger(__name__)


class Reception:
    """All heartbeat streams of one gManager.

    Args:
        clock: monotonic seconds, the ``now`` of the view.
        direct: streams that it wants to have itself; the others' senders are told of relays.
        per_relay: streams of one relay at most.
    """

    def __init__(
        self, view: ClusterView, planning: Planning, clock: Callable[[], float], direct: int = 256, per_relay: int = 128
    ) -> None:
        self.view = view
        self.planning = planning
        self.clock = clock
        self.relays = Relays(direct, per_relay, view.kvdaemon_address)
        self._numbers = itertools.count()

    def stream(self, relay: str | None = None) -> MemberStream:
        """A stream that has just been opened; ``relay``: by way of that daemon."""
        return MemberStream(self, next(self._numbers), relay)


class MemberStream:
    """One process's heartbeats.

    Attributes:
        member: "instance/<id>" or "kvdaemon/<id>"; empty before the first message.
    """

    def __init__(self, reception: Reception, number: int, relay: str | None) -> None:
        self._reception = reception
        self._number = number
        self._relay = relay
        self.member = ""

    def take(self, message: gmanager_pb2.HeartbeatRequest) -> str | None:
        """Takes in one message; answers the address of the relay that its sender should go to, if it should.

        Raises:
            ResyncRequiredError: the stream did not begin with a full report, or a message is missing.
            InvalidRequestError: a value that cannot be, or another process's heartbeat.
        """
        reception, now = self._reception, self._reception.clock()
        if not self.member:
            self._begin(message, now)
        elif message.member != self.member:
            raise InvalidRequestError(f"a heartbeat of {message.member!r} in the stream of {self.member!r}")
        heartbeat = heartbeat_from_proto(message)
        reception.view.apply(self._number, heartbeat, now)
        reception.planning.observe(heartbeat, now)
        return reception.relays.elsewhere(self.member, now) if self._relay is None else None

    def end(self) -> None:
        """No more messages will come."""
        if not self.member:
            return
        self._reception.view.stream_ended(self.member, self._number)
        if self._relay is None:
            self._reception.relays.closed(self._number, self.member)
        else:
            self._reception.relays.relay_closed(self._relay, self._number)
        logger.info("heartbeats end", extra={"reporter": self.member, "relay": self._relay})

    def _begin(self, message: gmanager_pb2.HeartbeatRequest, now: float) -> None:
        if message.WhichOneof("report") != message.member.partition("/")[0]:
            raise ResyncRequiredError(f"{message.member}: the first heartbeat must be a full report of its own kind")
        self.member = message.member
        relays = self._reception.relays
        if self._relay is None:
            relays.opened(self._number, self.member)
            if message.lost_relay_address:
                relays.failed(message.lost_relay_address, now)
        else:
            relays.relay_opened(self._relay, self._number, self.member)
        logger.info("heartbeats begin", extra={"reporter": self.member, "relay": self._relay})
