"""Who is there: every process of a cluster registers under its kind and id, as long as its lease lives.

    /infinite-llm/{cluster}/members/{kind}/{member_id}  -> the Member as JSON
    /infinite-llm/{cluster}/elections/gmanager/{lease}  -> likewise: gManagers that stand for election, the oldest leads

Membership says where a process can be reached, nothing else. That an entry is gone does not mean that the process is
dead, and requests go on while etcd is away.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from services.core.errors import ConfigError, UnavailableError
from services.runtime.cancelling import cancel
from services.runtime.config import parse_config
from services.runtime.election import Election
from services.runtime.etcd import Condition, EtcdClient, Put
from services.runtime.etcd_types import KeyValue
from services.runtime.lease import Lease

log = logging.getLogger(__name__)

Kind = Literal["instance", "kvdaemon", "gmanager", "gateway"]
DEFAULT_TTL_S = 10
RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class Member:
    """One process of the cluster.

    Attributes:
        kind: what it is.
        member_id: unique among its kind; the same after a restart.
        address: host:port of its control server.
        model: name of the model an instance serves.
        max_model_len: tokens an instance's sequence can have at most.
        local_kvdaemon_id: the daemon whose pool an instance maps.
        epoch: grows with every start of the same member; the larger epoch keeps the entry.
        metrics_address: host:port that serves its metrics; empty where none does.
    """

    kind: Kind
    member_id: str
    address: str
    model: str = ""
    max_model_len: int = 0
    local_kvdaemon_id: str = ""
    epoch: int = 0
    metrics_address: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"member kind {self.kind!r} is not one of {', '.join(get_args(Kind))}")
        if not self.member_id or "/" in self.member_id:
            raise ConfigError(f"member_id {self.member_id!r} must not be empty and must not contain a slash")


class Membership:
    """The register of one cluster."""

    def __init__(self, etcd: EtcdClient, cluster: str) -> None:
        if not cluster or "/" in cluster:
            raise ConfigError(f"cluster name {cluster!r} must not be empty and must not contain a slash")
        self._etcd = etcd
        self._cluster = cluster
        self._prefix = f"/infinite-llm/{cluster}/members/"

    async def register(self, member: Member, ttl_s: int = DEFAULT_TTL_S) -> Registration:
        """Enters the member, and keeps it entered until ``Registration.close``.

        Answers after the first attempt. If etcd was away then, the attempts go on in the background.
        """
        registration = Registration(self._etcd, f"{self._prefix}{member.kind}/{member.member_id}", member, ttl_s)
        await registration.start()
        return registration

    async def watch(self, kind: Kind) -> AsyncIterator[Mapping[str, Member]]:
        """All members of a kind by id: at once, and again after every change. While etcd is away nothing changes."""
        async for entries in self._etcd.watch(f"{self._prefix}{kind}/"):
            yield _members(entries.values())

    async def list(self, kind: Kind, timeout_s: float) -> Mapping[str, Member]:
        """All members of a kind by id, now.

        Raises:
            UnavailableError: etcd did not answer within ``timeout_s``.
        """
        return _members((await self._etcd.range(f"{self._prefix}{kind}/", timeout_s)).entries)

    def gmanager_election(self) -> Election:
        """Who is the gManager of all that are members; the candidates' values are their Members (``encode_member``)."""
        return Election(self._etcd, self._cluster, "gmanager")


class Registration:
    """One member's entry. If its lease is lost, because etcd or this process hung too long, it is entered again."""

    def __init__(self, etcd: EtcdClient, key: str, member: Member, ttl_s: int) -> None:
        self._etcd = etcd
        self._key = key
        self._member = member
        self._ttl_s = ttl_s
        self._lease: Lease | None = None
        self._task: asyncio.Task[None] | None = None
        self._entered = False

    @property
    def entered(self) -> bool:
        """Whether the entry stands in etcd, as far as this process can tell."""
        return self._entered and self._lease is not None and not self._lease.lost.is_set()

    async def start(self) -> None:
        """Makes the first attempt and leaves the rest to the background. Called once, by ``Membership.register``."""
        superseded = await self._attempt()
        if not superseded:
            self._task = asyncio.create_task(self._keep_entered(), name=f"registration {self._key}")

    async def close(self) -> None:
        """Deletes the entry. Only this registration's own: it goes with its lease."""
        if self._task is not None:
            await cancel([self._task])
        await self._drop_lease()

    async def _keep_entered(self) -> None:
        superseded = False
        while not superseded:
            if self._lease is None:
                await asyncio.sleep(RETRY_S)
            else:
                await self._lease.lost.wait()
                await self._drop_lease()
            superseded = await self._attempt()

    async def _attempt(self) -> bool:
        """One lease, one entry. Answers True if a later start of the same member has taken the entry over."""
        try:
            self._lease = await Lease.grant(self._etcd, self._ttl_s)
            entered = await self._enter(self._lease)
        except UnavailableError as exc:
            log.warning("not registered, trying again", extra={"key": self._key, "reason": str(exc)})
            await self._drop_lease()
            return False
        if not entered:
            log.error("another process has registered as this member with a later epoch", extra={"key": self._key})
            await self._drop_lease()
            return True
        self._entered = True
        log.info("registered", extra={"key": self._key, "address": self._member.address})
        return False

    async def _enter(self, lease: Lease) -> bool:
        """Writes the entry by compare-and-swap until it is ours. False: one of a later epoch stands there.

        A swap that timed out raises, and the whole attempt is made again with a new lease. Should the old swap be
        applied after all, either its condition is broken by then, or the new attempt reads it and replaces it.
        """
        value = encode_member(self._member)
        while True:
            current = await self._etcd.get(self._key)
            other = None if current is None else decode_member(current.key, current.value)
            if other is not None and other.epoch > self._member.epoch:
                return False
            condition = Condition(self._key, "mod", 0 if current is None else current.mod_revision)
            put = Put(self._key, value, lease.lease_id)
            if (await self._etcd.transaction([condition], [put])).succeeded:
                return True

    async def _drop_lease(self) -> None:
        self._entered = False
        if self._lease is not None:
            lease, self._lease = self._lease, None
            await lease.close()


def encode_member(member: Member) -> bytes:
    return json.dumps(dataclasses.asdict(member)).encode()


def decode_member(key: str, value: bytes) -> Member | None:
    """None for a value that is no Member of this version; one odd entry must not hide the others."""
    try:
        return parse_config(Member, json.loads(value))
    except (ConfigError, ValueError) as exc:
        log.error("membership entry not understood", extra={"key": key, "reason": str(exc)})
        return None


def _members(entries: Iterable[KeyValue]) -> dict[str, Member]:
    members = (decode_member(entry.key, entry.value) for entry in entries)
    return {member.member_id: member for member in members if member is not None}
