"""A lease that is kept alive: the proof, in etcd and by the own clock, that its holder is well.

Both sides count. etcd deletes the lease's keys when it has not been renewed for ``ttl_s``; the holder, by its own
clock, counts ``ttl_s`` from *before* it sent the last renewal that was answered, and so knows of the loss no later
than anybody else, even if etcd hangs and says nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from types import TracebackType
from typing import Self

from services.core.errors import UnavailableError
from services.runtime.cancelling import cancel
from services.runtime.etcd import EtcdClient

log = logging.getLogger(__name__)

REVOKE_TIMEOUT_S = 2.0


class Lease:
    """One lease and the task that renews it. ``lost`` is set once and stays set."""

    def __init__(self, etcd: EtcdClient, lease_id: int, ttl_s: int, granted_at: float) -> None:
        self.lease_id = lease_id
        self.lost = asyncio.Event()
        self._etcd = etcd
        self._ttl_s = ttl_s
        self._expires_at = granted_at + ttl_s
        self._task = asyncio.create_task(self._renew(), name=f"lease-{lease_id:x}")

    @property
    def held(self) -> bool:
        """Whether the lease is valid, asked of the clock: right also in the moment after the process stood still, when
        ``lost`` is not set yet. The machine's own standstill it does not see."""
        return not self.lost.is_set() and time.monotonic() < self._expires_at

    @classmethod
    async def grant(cls, etcd: EtcdClient, ttl_s: int) -> Self:
        """A new lease, kept alive from now on.

        Raises:
            UnavailableError: etcd does not answer.
        """
        granted_at = time.monotonic()
        return cls(etcd, await etcd.lease_grant(ttl_s), ttl_s, granted_at)

    async def close(self) -> None:
        """Ends the lease and with it its keys; if etcd is away, they go when the lease expires."""
        await cancel([self._task])
        if not self.lost.is_set():
            self.lost.set()
            with contextlib.suppress(UnavailableError):
                await self._etcd.lease_revoke(self.lease_id, timeout_s=REVOKE_TIMEOUT_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _renew(self) -> None:
        interval_s = self._ttl_s / 4
        pause_s = interval_s
        while (remaining := self._expires_at - time.monotonic()) > 0:
            await asyncio.sleep(min(pause_s, remaining))
            sent_at = time.monotonic()
            remaining = self._expires_at - sent_at
            if remaining <= 0:
                break
            try:
                left = await self._etcd.lease_keepalive(self.lease_id, timeout_s=min(remaining, interval_s))
            except UnavailableError as exc:
                log.warning("lease not renewed, trying again", extra={"lease": self.lease_id, "reason": str(exc)})
                pause_s = interval_s / 4
                continue
            if left <= 0:
                break
            self._expires_at = sent_at + left
            pause_s = interval_s
        log.warning("lease lost", extra={"lease": self.lease_id})
        self.lost.set()
