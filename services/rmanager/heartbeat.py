"""Heartbeats: an instance or a KV daemon tells the gManager where blocks lie, changed entries only.

A gManager that is away costs a log line and a reconnection now and then, nothing else: the sender runs beside the
service and never blocks it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable

from services.core.errors import InfiniteLLMError, UnavailableError
from services.core.placement import Snapshot
from services.rmanager.gmanager_client import AddressSource, HeartbeatStream
from services.rmanager.report_diff import ReportDiff

logger = logging.getLogger(__name__)

SnapshotSource = Callable[[], Snapshot]


class HeartbeatSender:
    """Sends the heartbeats of one process from its asyncio thread.

    Args:
        member: "instance/<id>" or "kvdaemon/<id>".
        address_of_gmanager: answers the gManager's current address, or None where there is none.
        snapshot: answers the process's present state; called on the event loop every ``interval_s``.
        interval_s: pace at which changes are looked for and sent.
        keep_alive_s: silence after which a heartbeat without changes is sent.
    """

    def __init__(
        self,
        member: str,
        address_of_gmanager: AddressSource,
        snapshot: SnapshotSource,
        interval_s: float = 0.25,
        keep_alive_s: float = 1.0,
        send_timeout_s: float = 5.0,
        max_backoff_s: float = 2.0,
    ) -> None:
        assert member.startswith(("instance/", "kvdaemon/")), member
        self._member = member
        self._address_of_gmanager = address_of_gmanager
        self._snapshot = snapshot
        self._interval_s = interval_s
        self._keep_alive_s = keep_alive_s
        self._send_timeout_s = send_timeout_s
        self._max_backoff_s = max_backoff_s
        self._backoff_s = interval_s
        self._away = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts sending. Call once, on the event loop."""
        assert self._task is None
        self._task = asyncio.create_task(self._run(), name="heartbeat")

    async def close(self) -> None:
        """Stops sending; the gManager forgets the member when its membership key goes."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        while True:
            try:
                await self._send_until_lost()
            except InfiniteLLMError as exc:
                if not self._away:
                    logger.warning("heartbeats interrupted, trying again: %s", exc)
                self._away = True
            except Exception:
                # The snapshot source or the address source failed: a bug or an outage there must not end heartbeats.
                logger.exception("heartbeats interrupted, trying again")
            await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1.0))
            self._backoff_s = min(2 * self._backoff_s, self._max_backoff_s)

    async def _send_until_lost(self) -> None:
        """One stream, from the full report on; ends with the error that ended the stream."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._send_timeout_s):
                address = await self._address_of_gmanager()
        except TimeoutError as exc:
            raise UnavailableError("where the gManager is was not answered in time") from exc
        if address is None:
            raise UnavailableError("no gManager is registered")
        stream = HeartbeatStream(address)
        try:
            diff = ReportDiff(self._member)
            last_sent = -math.inf
            while True:
                heartbeat = diff.next(self._snapshot())
                if heartbeat is None and loop.time() - last_sent >= self._keep_alive_s:
                    heartbeat = diff.keep_alive()
                if heartbeat is not None:
                    await stream.send(heartbeat, self._send_timeout_s)
                    last_sent = loop.time()
                    if heartbeat.sequence == 1:
                        # The second one got through as well, so the stream works.
                        self._backoff_s = self._interval_s
                        self._away = False
                await asyncio.sleep(self._interval_s)
        finally:
            await stream.close()
