"""A KV cache filled without prefill: sealed rBlocks of random keys and values, put where the benchmark wants them.

To the cluster they are a cached prefix. A request whose prompt begins with these tokens attaches to them wherever they
lie and computes only what follows, so its steps are those of a long request whose prefill nobody had to wait for. The
answers mean nothing; the work of a step is real.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Self

import torch

from infinitellm.types import KvDaemonStatus
from services.core.blocks import BlockHandle, PoolGeometry
from services.core.errors import PeerLostError, PoolExhaustedError
from services.dataplane.peers import PeerSet
from services.dataplane.select import Scheme, connecting_transport
from services.dataplane.transport import Limits
from services.rmanager.daemon_client import DaemonSession

_AT_ONCE = 256  # blocks reserved by one call
_TIMEOUT_S = 120.0
_LIMITS = Limits(32 << 20, 32 << 20)


class CacheFiller:
    """Sessions with a cluster's daemons. What it has filled stays held, and so in the pools, until ``close``.

    Args:
        daemons: what the cluster's status says of them.
        geometry: of the cluster's pools.
        link: that the daemons emulate, if they do.
        transport: that they offer.
    """

    def __init__(
        self,
        daemons: Sequence[KvDaemonStatus],
        geometry: PoolGeometry,
        link: str | None,
        transport: Scheme = "shm",
    ) -> None:
        self._geometry = geometry
        self._transport = transport
        self._peers = PeerSet(connecting_transport(transport, link), _LIMITS, query_room=0)
        self._sessions = {
            daemon.kvdaemon_id: DaemonSession(
                daemon.kvdaemon_id,
                daemon.address,
                instance_id="cache-filler",
                epoch=time.time_ns(),
                geometry=geometry,
                mapped=False,
                on_lost=lambda *_: None,  # whatever is called next says so
            )
            for daemon in daemons
        }

    async def __aenter__(self) -> Self:
        for kvdaemon_id, session in self._sessions.items():
            opened = await session.open()
            address = opened.offers.address(self._transport)
            assert address is not None, f"the cluster was told to offer {self._transport}"
            self._peers.connect(kvdaemon_id, address, opened.session_id)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._peers.close()
        for session in self._sessions.values():
            await session.close()

    async def fill(self, kvdaemon_id: str, keys: Sequence[bytes]) -> None:
        """Puts sealed blocks with these keys into one daemon's pool.

        Raises:
            PoolExhaustedError: it has no room for all of them.
            PeerLostError: the daemon went away, or stood still for minutes.
        """
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            handles = await self._sessions[kvdaemon_id].reserve(len(some), len(some))
            if len(handles) < len(some):
                raise PoolExhaustedError(f"{kvdaemon_id} has no room for {len(keys)} blocks")
            await asyncio.to_thread(self._write, kvdaemon_id, handles, some)

    async def take_all(self, kvdaemon_id: str) -> list[BlockHandle]:
        """Reserves all that is free in a pool: whoever asks its daemon now gets nothing."""
        taken: list[BlockHandle] = []
        while some := await self._sessions[kvdaemon_id].reserve(_AT_ONCE, 1):
            taken += some
        return taken

    async def give_back(self, kvdaemon_id: str, handles: Sequence[BlockHandle]) -> None:
        await self._sessions[kvdaemon_id].release(handles)

    def _write(self, kvdaemon_id: str, handles: Sequence[BlockHandle], keys: Sequence[bytes]) -> None:
        generator = torch.Generator().manual_seed(handles[0].block)
        values = torch.randn(self._geometry.block_shape, generator=generator)
        content = values.to(getattr(torch, self._geometry.dtype)).view(-1).view(torch.uint8).numpy().data
        deadline = time.monotonic() + _TIMEOUT_S
        waiting = list(enumerate(zip(handles, keys, strict=True)))[::-1]
        unsealed = len(waiting)
        while unsealed:
            while waiting and self._peers.get(kvdaemon_id).has_room_to_write(len(content) + len(keys[0])):
                tag, (handle, key) = waiting.pop()
                self._peers.write_block(kvdaemon_id, tag, handle, key, content)
            self._peers.poll(0.1)
            unsealed -= len(self._peers.take_sealed())
            lost = self._peers.take_lost()
            if lost or time.monotonic() > deadline:
                raise PeerLostError(f"filling {kvdaemon_id}: {lost[0].reason if lost else 'it does not answer'}")
