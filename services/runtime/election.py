"""Leader election in etcd: one leader at a time, and a fencing token that unmasks a former one.

Every candidate creates a key of its own under the election's prefix, on its own lease. The oldest key leads; when it
is deleted or its lease expires, the next oldest does. A key's create revision never repeats and grows from leader to
leader: it is the *fencing token*, sent with whatever the leader orders, so that who has obeyed a newer leader can
refuse an older one that does not know yet that it has been replaced.

    candidate A   key created at revision 7    leads, token 7     ... lease lost
    candidate B   key created at revision 9    waits              leads, token 9
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from services.core.errors import ConfigError, SessionRevokedError, UnavailableError
from services.runtime.cancelling import cancel
from services.runtime.etcd import Condition, Delete, EtcdClient, Put
from services.runtime.etcd_types import KeyValue
from services.runtime.lease import Lease

log = logging.getLogger(__name__)

RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads, as an observer sees it: what the leader proclaims of itself, and its fencing token."""

    value: bytes
    fencing_token: int


class Election:
    """One election of one cluster."""

    def __init__(self, etcd: EtcdClient, cluster: str, name: str) -> None:
        for part in (cluster, name):
            if not part or "/" in part:
                raise ConfigError(f"election: {part!r} must not be empty and must not contain a slash")
        self._etcd = etcd
        self._prefix = f"/infinite-llm/{cluster}/elections/{name}/"

    async def campaign(self, value: bytes, ttl_s: int) -> Leadership:
        """Stands for election and waits to be leader: as long as the others live, and as long as etcd is away.

        Cancelling it withdraws the candidate.
        """
        while True:
            try:
                lease = await Lease.grant(self._etcd, ttl_s)
            except UnavailableError as exc:
                log.warning("no candidate yet, trying again", extra={"election": self._prefix, "reason": str(exc)})
                await asyncio.sleep(RETRY_S)
                continue
            key = f"{self._prefix}{lease.lease_id:016x}"
            try:
                entry = await self._until_oldest(key, value, lease)
            except BaseException:
                await lease.close()
                raise
            if entry is not None:
                log.info("leader", extra={"election": self._prefix, "fencing_token": entry.create_revision})
                return Leadership(self._etcd, lease, key, entry.create_revision)
            await lease.close()

    async def observe(self) -> AsyncIterator[Leader | None]:
        """The leader: at once, and again whenever it or its value changes. None while there is no candidate."""
        last: Leader | None = None
        first = True
        async for entries in self._etcd.watch(self._prefix):
            oldest = _oldest(entries)
            leader = None if oldest is None else Leader(oldest.value, oldest.create_revision)
            if first or leader != last:
                yield leader
            first, last = False, leader

    async def remove(self, unwanted: Callable[[bytes], bool]) -> None:
        """Removes the candidates whose value is ``unwanted``, as if their leases had expired.

        Raises:
            UnavailableError: etcd did not answer; some may have been removed all the same. Safe to try again.
        """
        for entry in (await self._etcd.range(self._prefix)).entries:
            if unwanted(entry.value):
                same = Condition(entry.key, "create", entry.create_revision)
                await self._etcd.transaction([same], [Delete(entry.key)])

    async def _until_oldest(self, key: str, value: bytes, lease: Lease) -> KeyValue | None:
        """The candidate's own entry once it is the oldest; None if its lease is lost before that."""
        won = asyncio.create_task(self._wait_oldest(key, value, lease))
        lost = asyncio.create_task(lease.lost.wait())
        try:
            await asyncio.wait([won, lost], return_when=asyncio.FIRST_COMPLETED)
            return won.result() if won.done() and not lease.lost.is_set() else None
        finally:
            await cancel([won, lost])

    async def _wait_oldest(self, key: str, value: bytes, lease: Lease) -> KeyValue:
        create = Put(key, value, lease.lease_id)
        while True:
            # The lease is ours alone, so that an entry under its name is ours, by whichever attempt it came.
            try:
                await self._etcd.transaction([Condition(key, "create", 0)], [create])
                break
            except UnavailableError as exc:
                log.warning("candidate not entered, trying again", extra={"key": key, "reason": str(exc)})
                await asyncio.sleep(RETRY_S)
        async for entries in self._etcd.watch(self._prefix):
            oldest = _oldest(entries)
            if oldest is not None and oldest.key == key:
                return oldest
        raise AssertionError("a watch never ends")


class Leadership:
    """Being leader, until ``resign`` or until ``lost`` is set. From then on there may be another."""

    def __init__(self, etcd: EtcdClient, lease: Lease, key: str, fencing_token: int) -> None:
        self.fencing_token = fencing_token
        self._etcd = etcd
        self._lease = lease
        self._key = key

    @property
    def lost(self) -> asyncio.Event:
        """Set when the lease is gone: by etcd's word, or by the own clock while etcd is silent."""
        return self._lease.lost

    @property
    def held(self) -> bool:
        """Whether nobody else can have been elected, by the clock. Asked before each act of a leader; see ``Lease``."""
        return self._lease.held

    async def proclaim(self, value: bytes) -> None:
        """Changes what observers see.

        Raises:
            SessionRevokedError: no longer the leader.
            UnavailableError: etcd did not answer; the value may have been set all the same. Safe to try again.
        """
        condition = Condition(self._key, "create", self.fencing_token)
        put = Put(self._key, value, self._lease.lease_id)
        if self.lost.is_set() or not (await self._etcd.transaction([condition], [put])).succeeded:
            raise SessionRevokedError(f"election {self._key}: no longer the leader, another may have been elected")

    async def resign(self) -> None:
        """Gives leadership up at once; if etcd is away, it passes on when the lease expires."""
        await self._lease.close()


def _oldest(entries: Mapping[str, KeyValue]) -> KeyValue | None:
    return min(entries.values(), key=lambda entry: entry.create_revision, default=None)
