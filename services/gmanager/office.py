"""The office of the gManager: several stand for election, one holds it.

    standby   another one leads, or nobody yet: answers nobody, takes no heartbeats; membership it knows
    leader    its lease is held: answers, takes heartbeats, gives orders, each with its fencing token
    former    its lease is lost, and no successor is known, because etcd is away: answers, gives no orders

Everybody follows the leader's key, so a standby has no heartbeats to begin with: they come, in full, as soon as it
leads. That halves the traffic, and costs a new leader less than a second until it knows everything again. A former
leader goes on answering since its view is a cache and nobody else can be elected while etcd is away. Orders need the
lease: ``fencing_token`` asks the clock each time, so a process that stood still gives none before it knows where it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from services.core.errors import NotLeaderError, UnavailableError
from services.runtime.election import Election, Leader
from services.runtime.membership import Member, decode_member, encode_member

logger = logging.getLogger(__name__)

RETRY_S = 0.5


class Reign(Protocol):
    """What of a ``Leadership`` the office needs."""

    @property
    def fencing_token(self) -> int: ...
    @property
    def held(self) -> bool: ...


class Office:
    """Which of the three this process is.

    Args:
        member: this process, as it stands for election.
        stepped_down: called when another one leads from now on.

    Attributes:
        leader_changes: times that a leader was observed that led after the one before.
    """

    def __init__(self, member: Member, stepped_down: Callable[[], None]) -> None:
        self.member = member
        self._value = encode_member(member)
        self._stepped_down = stepped_down
        self._reign: Reign | None = None
        self._leader: Leader | None = None  # as observed last
        self._latest_token = 0  # of all leaders observed
        self.leader_changes = 0

    @property
    def serving(self) -> bool:
        """Leader or former leader."""
        return self._reign is not None

    @property
    def fencing_token(self) -> int | None:
        """To be sent with an order that is given now; None forbids giving one."""
        return self._reign.fencing_token if self._reign is not None and self._reign.held else None

    def require(self) -> None:
        """
        Raises:
            NotLeaderError: this process answers nobody.
        """
        if not self.serving:
            leader = None if self._leader is None else decode_member("election", self._leader.value)
            who = "nobody yet" if leader is None else f"{leader.member_id} at {leader.address}"
            raise NotLeaderError(f"this gManager stands by; the leader is {who}")

    def elected(self, reign: Reign) -> None:
        """This process leads."""
        self._reign = reign
        logger.info("leading", extra={"fencing_token": reign.fencing_token})

    def observed(self, leader: Leader | None) -> None:
        """Who leads, by etcd's word, which may come late: one that led before us is no reason to step down."""
        self._leader = leader
        if leader is not None and leader.fencing_token > self._latest_token:
            self.leader_changes += self._latest_token > 0
            self._latest_token = leader.fencing_token
        if self._reign is None or leader is None or leader.value == self._value:
            return
        if leader.fencing_token > self._reign.fencing_token or not self._reign.held:
            tokens = {"fencing_token": leader.fencing_token, "own_token": self._reign.fencing_token}
            logger.warning("another gManager leads", extra=tokens)
            self._reign = None
            self._stepped_down()


async def hold_office(office: Office, election: Election, ttl_s: int) -> None:
    """Stands for election, again and again, until cancelled; resigns then.

    Args:
        ttl_s: another one leads about this long after this process has died or stood still.
    """
    deposed = asyncio.Event()

    async def observe() -> None:
        async for leader in election.observe():
            office.observed(leader)
            if not office.serving:
                deposed.set()

    async def stand() -> None:
        while True:
            await _retire_predecessors(election, office.member)
            leadership = await election.campaign(encode_member(office.member), ttl_s)
            deposed.clear()
            office.elected(leadership)
            try:
                await _first(leadership.lost, deposed)
            finally:
                await leadership.resign()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(observe())
        tasks.create_task(stand())


async def _retire_predecessors(election: Election, member: Member) -> None:
    """Candidates that this process, or an earlier start of it, has left behind: nobody need wait for their leases."""

    def is_predecessor(value: bytes) -> bool:
        other = decode_member("election", value)
        return other is not None and other.member_id == member.member_id and other.epoch <= member.epoch

    while True:
        try:
            return await election.remove(is_predecessor)
        except UnavailableError as exc:
            logger.warning("no candidate yet, trying again: %s", exc)
            await asyncio.sleep(RETRY_S)


async def _first(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
