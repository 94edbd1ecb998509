"""The gManager as the gateway sees it: a stream of instances, and the cluster's state on demand."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import grpc.aio

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.errors import UnavailableError
from services.core.placement import PlacementEntry, PoolStats
from services.gateway.cluster import ClusterState, InstanceView, KvDaemonView, RequestView
from services.runtime.grpc_channel import error_from_rpc, make_channel

logger = logging.getLogger(__name__)

RETRY_S = 0.5


class GManagerClient:
    """Follows the set of instances for as long as it lives; the last set stays valid while the gManager is away.

    Args:
        address_of_gmanager: answers host:port, or None where none is known.
        on_instances: called with every new set.
    """

    def __init__(
        self,
        address_of_gmanager: Callable[[], Awaitable[str | None]],
        on_instances: Callable[[tuple[InstanceView, ...]], None],
    ) -> None:
        self._address_of_gmanager = address_of_gmanager
        self._on_instances = on_instances
        self._known = False
        self._task = asyncio.create_task(self._follow(), name="watch instances")

    @property
    def known(self) -> bool:
        """A gManager has answered since this gateway started."""
        return self._known

    async def cluster_state(self, timeout_s: float = 2.0) -> ClusterState:
        """Everything the gManager knows. Raises UnavailableError where it does not answer in time."""
        address = await self._address_of_gmanager()
        if address is None:
            raise UnavailableError("no gManager is known; is one running and registered in etcd?")
        try:
            async with make_channel(address) as channel:
                stub = gmanager_pb2_grpc.GManagerServiceStub(channel)
                response = await stub.GetClusterView(gmanager_pb2.GetClusterViewRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            raise UnavailableError(f"the gManager at {address} does not answer: {error_from_rpc(exc)}") from exc
        return ClusterState(
            tuple(_instance(view) for view in response.instances),
            tuple(_kvdaemon(view) for view in response.kvdaemons),
            tuple(_request(view) for view in response.requests),
        )

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _follow(self) -> None:
        away = False
        while True:
            try:
                address = await self._address_of_gmanager()
                if address is None:
                    raise UnavailableError("none is known")
                async with make_channel(address) as channel:
                    stub = gmanager_pb2_grpc.GManagerServiceStub(channel)
                    async for response in stub.WatchInstances(gmanager_pb2.WatchInstancesRequest()):
                        if away or not self._known:
                            logger.info("gManager connected", extra={"address": address})
                        self._known, away = True, False
                        self._on_instances(tuple(_instance(view) for view in response.instances))
                raise UnavailableError("it ended the stream")
            except (grpc.aio.AioRpcError, UnavailableError) as exc:
                if not away:
                    reason = str(error_from_rpc(exc)) if isinstance(exc, grpc.aio.AioRpcError) else str(exc)
                    logger.warning("gManager away, the last known instances stay in use: %s", reason)
                away = True
            except Exception:
                logger.exception("following the gManager failed")
            await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.0))


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
