"""Where the gManager is, kept up by watching membership; the last known address stays in use while etcd is away."""

from __future__ import annotations

import asyncio
import contextlib

from services.runtime.membership import Membership


class GManagerLocator:
    """Answers the gManager's address without asking anybody at that moment."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._address: str | None = None
        self._task = asyncio.create_task(self._watch(), name="gmanager locator")

    async def address(self) -> str | None:
        """host:port of the gManager, or None where none was ever seen."""
        return self._address

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _watch(self) -> None:
        async for members in self._membership.watch("gmanager"):
            if members:  # several may stand by; any of them is a start
                self._address = members[min(members)].address
