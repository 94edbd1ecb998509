"""Heartbeats to a real gManager that is killed, stopped and replaced."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from gateway_rig import CLUSTER, service, until
from signals import send_signal

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.errors import ResyncRequiredError, UnavailableError
from services.core.placement import BlockCount, InstanceSnapshot
from services.core.timings import StepTiming
from services.gateway.cluster import ClusterState, InstanceView
from services.gateway.gmanager_client import GManagerClient
from services.rmanager.gmanager_locator import GManagerLocator
from services.rmanager.heartbeat import HeartbeatSender
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.membership import Member, Membership

pytestmark = pytest.mark.cluster


class Observer:
    """An instance that sends heartbeats, and a gateway's client that looks at what arrives."""

    def __init__(self, gmanager: GManagerClient, locator: GManagerLocator) -> None:
        self.gmanager = gmanager
        self.locator = locator
        self.placement: dict[str, dict[str, BlockCount]] = {}

    def snapshot(self) -> InstanceSnapshot:
        return InstanceSnapshot(len(self.placement), 0, self.placement)

    async def state(self) -> ClusterState | None:
        try:
            return await self.gmanager.cluster_state(timeout_s=1.0)
        except UnavailableError:
            return None

    async def sees(self, *request_ids: str) -> None:
        async def seen() -> bool:
            state = await self.state()
            return state is not None and {request.request_id for request in state.requests} == set(request_ids)

        await until(seen, f"the gManager knows {request_ids}", timeout_s=40)


@asynccontextmanager
async def observer(
    etcd_endpoint: str,
    on_instances: Callable[[tuple[InstanceView, ...]], None] = lambda views: None,
    timings: Callable[[], tuple[StepTiming, ...]] = lambda: (),
) -> AsyncIterator[Observer]:
    etcd = EtcdClient([etcd_endpoint])
    membership = Membership(etcd, CLUSTER)
    registration = await membership.register(Member("instance", "a", "127.0.0.1:9", epoch=1))
    daemon = await membership.register(Member("kvdaemon", "k", "127.0.0.1:9", epoch=1))
    locator = GManagerLocator(membership)
    gmanager = GManagerClient(locator, on_instances)
    watcher = Observer(gmanager, locator)
    sender = HeartbeatSender("instance/a", locator, watcher.snapshot, 0.05, timings, send_timeout_s=2.0)
    sender.start()
    try:
        yield watcher
    finally:
        await sender.close()
        await gmanager.close()
        await locator.close()
        await registration.close()
        await daemon.close()
        await etcd.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_gmanager_that_is_replaced_learns_everything(etcd_endpoint: str, tmp_path: Path, how: signal.Signals) -> None:
    async def scenario() -> None:
        async with observer(etcd_endpoint) as watcher:
            keys = {"listen": "127.0.0.1:0", "etcd": [etcd_endpoint], "lease_ttl_s": 2}
            with service("gmanager", tmp_path, **keys) as first:
                watcher.placement["r"] = {"k": BlockCount(3, True)}
                await watcher.sees("r")
                send_signal(first.pid, how)
                watcher.placement["s"] = {"k": BlockCount(4, True)}
                await asyncio.sleep(0.3)
                with service("gmanager", tmp_path, **keys):
                    await watcher.sees("r", "s")
                    del watcher.placement["r"]
                    await watcher.sees("s")

    asyncio.run(scenario())


def test_a_gmanager_that_stood_still_goes_on(etcd_endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with observer(etcd_endpoint) as watcher:
            with service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_endpoint]) as process:
                watcher.placement["r"] = {"k": BlockCount(3, True)}
                await watcher.sees("r")
                send_signal(process.pid, signal.SIGSTOP)
                for number in range(20):
                    watcher.placement[f"s{number}"] = {"k": BlockCount(4, True)}
                    await asyncio.sleep(0.1)
                watcher.placement.clear()
                watcher.placement["t"] = {"k": BlockCount(5, True)}
                os.kill(process.pid, signal.SIGCONT)
                await watcher.sees("t")

    asyncio.run(scenario())


def test_instances_are_streamed_at_once_and_after_changes(etcd_endpoint: str, tmp_path: Path) -> None:
    seen: list[tuple[InstanceView, ...]] = []

    async def scenario() -> None:
        with service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_endpoint]):
            async with observer(etcd_endpoint, seen.append) as watcher:
                await until(lambda: seen and [view.instance_id for view in seen[-1]] == ["a"], "the instance is listed")
                watcher.placement["r"] = {"k": BlockCount(3, True)}
                await until(lambda: seen[-1][0].running == 1, "its load is listed")

                async def old() -> bool:
                    state = await watcher.state()
                    return state is not None and state.instances[0].heartbeat_age_s < 1.5

                # Nothing changes, and the member still counts as alive.
                await asyncio.sleep(1.6)
                assert await old()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "second",
    [
        gmanager_pb2.HeartbeatRequest(member="instance/a", sequence=2, instance=gmanager_pb2.InstanceReport()),
        gmanager_pb2.HeartbeatRequest(member="instance/b", sequence=1, instance=gmanager_pb2.InstanceReport()),
        None,
    ],
)
def test_streams_with_a_gap_are_ended(
    etcd_endpoint: str, tmp_path: Path, second: gmanager_pb2.HeartbeatRequest | None
) -> None:
    async def scenario() -> None:
        etcd = EtcdClient([etcd_endpoint])
        locator = GManagerLocator(Membership(etcd, CLUSTER))
        with service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_endpoint]):
            await until(locator.address, "the gManager is registered")
            async with make_channel(await locator.address()) as channel:
                call = gmanager_pb2_grpc.GManagerServiceStub(channel).Heartbeat(timeout=20)
                report = gmanager_pb2.InstanceReport()
                full = second is not None  # without, the first one is not full already
                await call.write(gmanager_pb2.HeartbeatRequest(member="instance/a", full=full, instance=report))
                if second is not None:
                    await call.write(second)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                if second is None or second.sequence == 2:
                    assert isinstance(error_from_rpc(caught.value), ResyncRequiredError)
        await locator.close()
        await etcd.close()

    asyncio.run(scenario())


def test_timings_travel_with_whatever_is_sent_and_cause_no_messages(etcd_endpoint: str, tmp_path: Path) -> None:
    """An instance whose steps are told as 40 ms each: the gManager learns that, and is not asked more often for it."""
    asked: list[float] = []

    def timings() -> tuple[StepTiming, ...]:
        asked.append(asyncio.get_running_loop().time())
        return (StepTiming(1, 0, 640, 0.04, 0.01, 0.01, steps=5),)

    async def scenario() -> None:
        with service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_endpoint], plan_interval_s=0.1):
            async with observer(etcd_endpoint, timings=timings) as watcher:
                watcher.placement["r"] = {"k": BlockCount(3, True)}
                await watcher.sees("r")

                async def learned() -> bool:
                    async with make_channel(await watcher.locator.address()) as channel:
                        stub = gmanager_pb2_grpc.GManagerServiceStub(channel)
                        view = await stub.GetClusterView(gmanager_pb2.GetClusterViewRequest(), timeout=10)
                    (told,) = view.instances
                    return told.HasField("step_error") and told.step_error < 0.2

                await until(learned, "the step's time is predicted", timeout_s=40)
        pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
        assert sorted(pauses)[len(pauses) // 2] > 0.5  # nothing but timings changed: a keep-alive carries them

    asyncio.run(scenario())
