"""The gManager as the gateway sees it: a stream of instances, and the cluster's state on demand."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

import grpc.aio

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.errors import UnavailableError
from services.core.placement import AdmissionHint, PeerTransport, PlacementEntry, PoolStats
from services.gateway.cluster import ClusterState, GManagerView, InstanceView, KvDaemonView, RequestView
from services.rmanager.gmanager_locator import GManagerLocation
from services.runtime.cancelling import cancel
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.tls import MutualTls

logger = logging.getLogger(__name__)

RETRY_S = 0.5


class GManagerClient:
    """Follows the set of instances for as long as it lives; the last set stays valid while the gManager is away.

    Args:
        location: of the gManager; when it changes, the stream is opened anew there at once.
        on_instances: called with every new set.
        tls: the gateway's own identity.
    """

    def __init__(
        self,
        location: GManagerLocation,
        on_instances: Callable[[tuple[InstanceView, ...]], None],
        tls: MutualTls | None = None,
    ) -> None:
        self._location = location
        self._on_instances = on_instances
        self._tls = tls
        self._known = False
        self._away = False
        self._task = asyncio.create_task(self._follow(), name="watch instances")

    @property
    def known(self) -> bool:
        """A gManager has answered since this gateway started."""
        return self._known

    async def cluster_state(self, timeout_s: float = 2.0) -> ClusterState:
        """Everything the gManager knows. Raises UnavailableError where it does not answer in time."""
        address = await self._location.address()
        if address is None:
            raise UnavailableError("no gManager is known; is one running and registered in etcd?")
        try:
            async with make_channel(address, "gmanager", self._tls) as channel:
                stub = gmanager_pb2_grpc.GManagerServiceStub(channel)
                response = await stub.GetClusterView(gmanager_pb2.GetClusterViewRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            raise UnavailableError(f"the gManager at {address} does not answer: {error_from_rpc(exc)}") from exc
        return ClusterState(
            tuple(_instance(view) for view in response.instances),
            tuple(_kvdaemon(view) for view in response.kvdaemons),
            tuple(_request(view) for view in response.requests),
            tuple(GManagerView(view.gmanager_id, view.address, view.leads) for view in response.gmanagers),
        )

    async def close(self) -> None:
        await cancel([self._task])

    async def _follow(self) -> None:
        address: str | None = None
        while True:
            try:
                address = await self._location.address()
                if address is None:
                    raise UnavailableError("none is known")
                await self._watch_until_moved(address)
                continue  # to the new place, at once
            except (grpc.aio.AioRpcError, UnavailableError) as exc:
                if not self._away:
                    reason = str(error_from_rpc(exc)) if isinstance(exc, grpc.aio.AioRpcError) else str(exc)
                    logger.warning("gManager away, the last known instances stay in use: %s", reason)
                self._away = True
            except Exception:
                logger.exception("following the gManager failed")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S * random.uniform(0.5, 1.0)):
                    await self._location.moved_from(address)

    async def _watch_until_moved(self, address: str) -> None:
        """Returns when the gManager is elsewhere; a stream that ends before that raises."""
        watching = asyncio.create_task(self._watch(address))
        moved = asyncio.create_task(self._location.moved_from(address))
        try:
            await asyncio.wait([watching, moved], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            await cancel([watching, moved])

    async def _watch(self, address: str) -> None:
        async with make_channel(address, "gmanager", self._tls) as channel:
            stub = gmanager_pb2_grpc.GManagerServiceStub(channel)
            async for response in stub.WatchInstances(gmanager_pb2.WatchInstancesRequest()):
                if self._away or not self._known:
                    logger.info("gManager connected", extra={"address": address})
                self._known, self._away = True, False
                self._on_instances(tuple(_instance(view) for view in response.instances))
        raise UnavailableError("it ended the stream")


def _instance(view: gmanager_pb2.InstanceView) -> InstanceView:
    return InstanceView(
        instance_id=view.instance_id,
        address=view.address,
        max_model_len=view.max_model_len,
        local_kvdaemon_id=view.local_kvdaemon_id,
        running=view.running_requests,
        waiting=view.waiting_requests,
        local_free_blocks=view.local_free_blocks,
        heartbeat_age_s=view.heartbeat_age_s,
        hint=AdmissionHint(view.hint.room_tokens, view.hint.gain) if view.HasField("hint") else None,
        transports=tuple(PeerTransport(peer.kvdaemon_id, peer.transport) for peer in view.transports),
    )


def _kvdaemon(view: gmanager_pb2.KvDaemonView) -> KvDaemonView:
    stats = PoolStats(
        pool_bytes=view.stats.pool_bytes,
        block_bytes=view.stats.block_bytes,
        total=view.stats.total,
        free=view.stats.free,
        cached=view.stats.cached,
        workspace=view.stats.workspace,
        reserved=view.stats.reserved,
        in_use=view.stats.in_use,
    )
    return KvDaemonView(view.kvdaemon_id, view.address, stats, view.heartbeat_age_s)


def _request(view: gmanager_pb2.RequestView) -> RequestView:
    return RequestView(
        view.request_id,
        view.instance_id,
        tuple(
            PlacementEntry(view.request_id, entry.kvdaemon_id, entry.num_blocks, entry.local)
            for entry in view.placement
        ),
    )
