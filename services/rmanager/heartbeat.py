"""Heartbeats: an instance or a KV daemon tells the gManager where blocks lie, changed entries only.

A gManager that is away costs a log line and a reconnection now and then, nothing else: the sender runs beside the
service and never blocks it. When another gManager leads, everything is told to that one at once.

A gManager that hears of many processes sends some to a relay, a KV daemon that takes their heartbeats to it together
with others'. Who loses its relay goes back to the gManager; who is told that the relay has lost the gManager stays, so
that a new leader is not met by everybody at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable

from services.core.errors import InfiniteLLMError, NotLeaderError, ResyncRequiredError, UnavailableError
from services.core.placement import Snapshot, Timings
from services.rmanager.gmanager_client import HeartbeatStream
from services.rmanager.gmanager_locator import GManagerLocation
from services.rmanager.report_diff import ReportDiff
from services.runtime.cancelling import cancel
from services.runtime.tls import MutualTls

logger = logging.getLogger(__name__)

_STEADY_S = 10.0  # a stream that has lasted so long worked
_PATIENCE_S = 30.0  # with a relay that has no gManager

SnapshotSource = Callable[[], Snapshot]
TimingSource = Callable[[], Timings]


class HeartbeatSender:
    """Sends the heartbeats of one process from its asyncio thread.

    Args:
        member: "instance/<id>" or "kvdaemon/<id>".
        location: of the gManager.
        snapshot: answers the process's present state; called on the event loop every ``interval_s``.
        interval_s: pace at which changes are looked for and sent.
        timings: answers what was measured since it was asked last. It travels with whatever is sent, so that steps
            alone cause no messages.
        keep_alive_s: silence after which a heartbeat without changes is sent.
        tls: the process's own identity.
    """

    def __init__(
        self,
        member: str,
        location: GManagerLocation,
        snapshot: SnapshotSource,
        interval_s: float = 0.25,
        timings: TimingSource = lambda: (),
        keep_alive_s: float = 1.0,
        send_timeout_s: float = 5.0,
        max_backoff_s: float = 2.0,
        tls: MutualTls | None = None,
    ) -> None:
        assert member.startswith(("instance/", "kvdaemon/")), member
        self._member = member
        self._location = location
        self._snapshot = snapshot
        self._tls = tls
        self._timings = timings
        self._interval_s = interval_s
        self._keep_alive_s = keep_alive_s
        self._send_timeout_s = send_timeout_s
        self._max_backoff_s = max_backoff_s
        self._backoff_s = interval_s
        self._away = False
        self._lost_relay: tuple[str, str | None] = ("", None)  # and the gManager that had named it
        self._relay_alone_since = math.inf
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts sending. Call once, on the event loop."""
        assert self._task is None
        self._task = asyncio.create_task(self._run(), name="heartbeat")

    async def close(self) -> None:
        """Stops sending; the gManager forgets the member when its membership key goes."""
        if self._task is not None:
            await cancel([self._task])
            self._task = None

    async def _run(self) -> None:
        address: str | None = None
        relay: str | None = None
        while True:
            opened = time.monotonic()
            try:
                address = await self._address()
                relay = await self._send_until_moved(address, relay)
                continue  # to the new place, at once
            except InfiniteLLMError as exc:
                if not self._away:
                    logger.warning("heartbeats interrupted, trying again: %s", exc, extra={"relay": relay})
                self._away = True
                if relay is not None and not self._stays(exc, time.monotonic() - opened):
                    self._lost_relay, relay = (relay, address), None
            except Exception:
                # The snapshot source or the location failed: a bug or an outage there must not end heartbeats.
                logger.exception("heartbeats interrupted, trying again")
            await self._pause(address)

    def _stays(self, error: InfiniteLLMError, lasted_s: float) -> bool:
        """Whether to go on with a relay whose stream has ended: it is not the relay that failed.

        Either the gManager wants everything anew, or the relay has lost it, not long ago.
        """
        if not isinstance(error, NotLeaderError):
            return isinstance(error, ResyncRequiredError)
        if lasted_s > _STEADY_S:
            self._relay_alone_since = math.inf
        self._relay_alone_since = min(self._relay_alone_since, time.monotonic())
        if time.monotonic() - self._relay_alone_since < _PATIENCE_S:
            return True
        self._relay_alone_since = math.inf
        return False

    async def _address(self) -> str:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                address = await self._location.address()
        except TimeoutError as exc:
            raise UnavailableError("where the gManager is was not answered in time") from exc
        if address is None:
            raise UnavailableError("no gManager is known")
        return address

    async def _pause(self, address: str | None) -> None:
        """Waits before the next attempt, but not for one at another address."""
        pause_s = self._backoff_s * random.uniform(0.5, 1.0)
        self._backoff_s = min(2 * self._backoff_s, self._max_backoff_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._location.moved_from(address)

    async def _send_until_moved(self, address: str, relay: str | None) -> str | None:
        """One stream, from the full report on, to the gManager or to a relay. Answers the relay that the next one is
        for: the same where it goes on and the gManager is elsewhere."""
        loop = asyncio.get_running_loop()
        stream = HeartbeatStream(relay or address, self._tls, relay is not None)
        try:
            diff = ReportDiff(self._member)
            last_sent = -math.inf
            while await self._location.address() == address:
                heartbeat = diff.next(self._snapshot())
                if heartbeat is None and loop.time() - last_sent >= self._keep_alive_s:
                    heartbeat = diff.keep_alive()
                if heartbeat is not None:
                    heartbeat = heartbeat._replace(timings=self._timings())
                    if heartbeat.full and relay is None:
                        lost_relay, named_by = self._lost_relay
                        # Another gManager is not told: the old one's end is why the relay was lost.
                        heartbeat = heartbeat._replace(lost_relay=lost_relay if named_by == address else "")
                    await stream.send(heartbeat, self._send_timeout_s)
                    last_sent = loop.time()
                sent_to = await stream.sent_to()
                if sent_to is not None:
                    return sent_to
                if heartbeat is not None and heartbeat.sequence == 1:
                    # The second one got through as well, so the stream works.
                    self._backoff_s = self._interval_s
                    self._away, self._lost_relay = False, ("", None)
                await asyncio.sleep(self._interval_s)
            return relay
        finally:
            await stream.close()
