"""Where the gManager is: the leader of those that stand for election; who led last stays in use while etcd is away."""

from __future__ import annotations

import asyncio
from typing import Protocol

from services.runtime.cancelling import cancel
from services.runtime.membership import Membership, decode_member


class GManagerLocation(Protocol):
    """Answers where the gManager is, and says when it is elsewhere."""

    async def address(self) -> str | None:
        """host:port of the gManager, or None where none was ever seen."""

    async def moved_from(self, address: str | None) -> None:
        """Returns as soon as ``address()`` answers something else."""


class GManagerLocator:
    """Follows the election; answers without asking anybody at that moment.

    Attributes:
        fencing_token: of the newest leader that it has heard of; 0 before any.
    """

    def __init__(self, membership: Membership) -> None:
        self._election = membership.gmanager_election()
        self.fencing_token = 0
        self._address: str | None = None
        self._moved = asyncio.Event()
        self._task = asyncio.create_task(self._watch(), name="gmanager locator")

    async def address(self) -> str | None:
        """host:port of the gManager, or None where none was ever seen."""
        return self._address

    async def moved_from(self, address: str | None) -> None:
        """Returns as soon as ``address()`` answers something else."""
        while self._address == address:
            await self._moved.wait()

    async def close(self) -> None:
        await cancel([self._task])

    async def _watch(self) -> None:
        async for leader in self._election.observe():
            if leader is None:
                continue
            self.fencing_token = max(self.fencing_token, leader.fencing_token)
            member = decode_member("the gManager's election", leader.value)
            if member is not None and member.address != self._address:
                self._address = member.address
                self._moved.set()
                self._moved = asyncio.Event()
