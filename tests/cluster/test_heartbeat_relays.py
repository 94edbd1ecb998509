"""Heartbeats by way of real KV daemons to real gManagers, each of which is killed, stopped and replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from gateway_rig import CLUSTER, service, until
from kvdaemon_client import KvDaemonProcess
from prometheus_client.parser import text_string_to_metric_families
from signals import send_signal

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.errors import InvalidRequestError, ResyncRequiredError, UnavailableError
from services.core.placement import BlockCount, InstanceSnapshot
from services.gateway.cluster import ClusterState
from services.gateway.gmanager_client import GManagerClient
from services.gmanager.planning import NoPlanning
from services.gmanager.reception import Reception
from services.gmanager.view import ClusterView
from services.launcher.ports import free_ports
from services.rmanager.gmanager_locator import GManagerLocator
from services.rmanager.heartbeat import HeartbeatSender
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.membership import Member, Membership

pytestmark = pytest.mark.cluster

INSTANCES = ("a", "b", "c", "d")


class Senders:
    """Instances that send heartbeats, all of one process, and a gateway's client that looks at what arrives."""

    def __init__(self, gmanager: GManagerClient, locator: GManagerLocator) -> None:
        self.gmanager = gmanager
        self.locator = locator
        self.placement: dict[str, dict[str, dict[str, BlockCount]]] = {name: {} for name in INSTANCES}

    def snapshot(self, name: str) -> InstanceSnapshot:
        return InstanceSnapshot(len(self.placement[name]), 0, self.placement[name])

    def say(self, request_id: str) -> None:
        """Every instance has one request more."""
        for name, placed in self.placement.items():
            placed[f"{request_id} of {name}"] = {"kv-0": BlockCount(3, False)}

    async def state(self) -> ClusterState | None:
        try:
            return await self.gmanager.cluster_state(timeout_s=1.0)
        except UnavailableError:
            return None

    async def are_seen(self) -> None:
        """The gManager knows all requests and no others."""
        said = {request for placed in self.placement.values() for request in placed}

        async def seen() -> bool:
            state = await self.state()
            return state is not None and {request.request_id for request in state.requests} == said

        await until(seen, f"the gManager knows {said}", timeout_s=40)


@asynccontextmanager
async def senders(etcd_endpoint: str) -> AsyncIterator[Senders]:
    async with contextlib.AsyncExitStack() as stack:
        etcd = EtcdClient([etcd_endpoint])
        stack.push_async_callback(etcd.close)
        membership = Membership(etcd, CLUSTER)
        locator = GManagerLocator(membership)
        stack.push_async_callback(locator.close)
        gmanager = GManagerClient(locator, lambda views: None)
        stack.push_async_callback(gmanager.close)
        rig = Senders(gmanager, locator)
        for name in INSTANCES:
            registration = await membership.register(Member("instance", name, "127.0.0.1:9", epoch=1))
            stack.push_async_callback(registration.close)
            sender = HeartbeatSender(f"instance/{name}", locator, lambda name=name: rig.snapshot(name), 0.05)
            stack.push_async_callback(sender.close)
            sender.start()
        yield rig


@pytest.fixture
def lenders(tmp_path: Path, etcd_endpoint: str) -> Iterator[dict[str, KvDaemonProcess]]:
    processes = {name: KvDaemonProcess(tmp_path, etcd_endpoint, name) for name in ("kv-0", "kv-1")}
    with contextlib.ExitStack() as stack:
        for process in processes.values():
            process.start()
            stack.callback(process.close)
        yield processes


class GManager:
    """A gManager that takes the heartbeats of two instances, and of two daemons, itself; of everybody if it is "g1"."""

    def __init__(self, directory: Path, etcd_endpoint: str, name: str = "g0") -> None:
        self._stack = contextlib.ExitStack()
        (directory / name).mkdir()
        (port,) = free_ports(1)
        self._metrics = f"127.0.0.1:{port}"
        keys = {"listen": "127.0.0.1:0", "etcd": [etcd_endpoint], "lease_ttl_s": 2, "metrics_listen": self._metrics}
        keys |= {"direct_heartbeats": 4 if name == "g0" else 100, "heartbeats_per_relay": 5}
        started = service("gmanager", directory / name, **keys, member_id=name)
        self.process: subprocess.Popen[bytes] = self._stack.enter_context(started)

    def __enter__(self) -> GManager:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def streams(self) -> dict[str, float]:
        async with httpx.AsyncClient() as http:
            try:
                text = (await http.get(f"http://{self._metrics}/metrics", timeout=5)).text
            except httpx.TransportError:
                return {}
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return {s.labels["way"]: s.value for s in families["infinite_llm_heartbeat_streams"].samples}

    async def has(self, direct: int, relayed: int) -> None:
        async def so() -> bool:
            return await self.streams() == {"direct": direct, "relayed": relayed}

        await until(so, f"{direct} direct streams and {relayed} relayed ones", timeout_s=40)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_who_loses_its_relay_is_heard_all_the_same(
    etcd_endpoint: str, tmp_path: Path, lenders: dict[str, KvDaemonProcess], how: signal.Signals
) -> None:
    async def scenario() -> None:
        with GManager(tmp_path, etcd_endpoint) as gmanager:
            await gmanager.has(direct=2, relayed=0)
            async with senders(etcd_endpoint) as rig:
                rig.say("one")
                await gmanager.has(direct=4, relayed=2)  # one each
                await rig.are_seen()
                rig.say("two")
                await rig.are_seen()
                # Alive and without news, by way of a relay: told every second, passed on a moment later.
                await asyncio.sleep(2.0)
                state = await rig.state()
                assert state is not None
                assert max(instance.heartbeat_age_s for instance in state.instances) < 1.8
                send_signal(lenders["kv-0"].process.pid, how)
                rig.say("three")
                await rig.are_seen()
                await gmanager.has(direct=3, relayed=2)  # both at the other one
                send_signal(lenders["kv-1"].process.pid, how)
                rig.say("four")
                await rig.are_seen()
                await gmanager.has(direct=4, relayed=0)
                if how == signal.SIGSTOP:
                    for process in lenders.values():
                        os.kill(process.process.pid, signal.SIGCONT)
                rig.placement["a"].clear()
                rig.placement["d"].clear()
                await rig.are_seen()

    asyncio.run(scenario())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_another_gmanager_hears_of_everybody(
    etcd_endpoint: str, tmp_path: Path, lenders: dict[str, KvDaemonProcess], how: signal.Signals
) -> None:
    async def scenario() -> None:
        with GManager(tmp_path, etcd_endpoint) as first:
            async with senders(etcd_endpoint) as rig:
                rig.say("one")
                await first.has(direct=4, relayed=2)
                await rig.are_seen()
                with GManager(tmp_path, etcd_endpoint, "g1") as second:
                    send_signal(first.process.pid, how)
                    rig.say("two")
                    await second.has(direct=4, relayed=2)  # who has a relay stays with it
                    await rig.are_seen()
                    rig.say("three")
                    await rig.are_seen()

    asyncio.run(scenario())


def test_a_relay_that_ends_is_left_and_its_members_are_forgotten_by_nobody(
    etcd_endpoint: str, tmp_path: Path, lenders: dict[str, KvDaemonProcess]
) -> None:
    async def scenario() -> None:
        with GManager(tmp_path, etcd_endpoint) as gmanager:
            async with senders(etcd_endpoint) as rig:
                rig.say("one")
                await gmanager.has(direct=4, relayed=2)
                lenders["kv-0"].process.send_signal(signal.SIGTERM)
                lenders["kv-1"].process.send_signal(signal.SIGTERM)
                for _ in range(20):
                    state = await rig.state()
                    assert state is not None
                    assert len(state.instances) == len(INSTANCES)
                    await asyncio.sleep(0.1)
                rig.say("two")
                await rig.are_seen()
                await gmanager.has(direct=4, relayed=0)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("second", "error"),
    [
        (gmanager_pb2.HeartbeatRequest(member="instance/x", sequence=2), ResyncRequiredError),
        (gmanager_pb2.HeartbeatRequest(member="instance/y", sequence=1), InvalidRequestError),
    ],
)
def test_streams_with_a_gap_are_ended_by_way_of_the_relay(
    etcd_endpoint: str,
    tmp_path: Path,
    lenders: dict[str, KvDaemonProcess],
    second: gmanager_pb2.HeartbeatRequest,
    error: type[Exception],
) -> None:
    async def scenario() -> None:
        with GManager(tmp_path, etcd_endpoint) as gmanager:
            async with senders(etcd_endpoint) as rig, make_channel(lenders["kv-0"].address) as channel:
                await gmanager.has(direct=4, relayed=2)
                call = gmanager_pb2_grpc.HeartbeatRelayServiceStub(channel).Heartbeat(timeout=20)
                report = gmanager_pb2.InstanceReport()
                await call.write(gmanager_pb2.HeartbeatRequest(member="instance/x", full=True, instance=report))
                await gmanager.has(direct=4, relayed=3)
                for _ in range(40):
                    await call.write(second)
                    await asyncio.sleep(0.1)
                    if call.done():
                        break
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert isinstance(error_from_rpc(caught.value), error)
                await gmanager.has(direct=4, relayed=2)  # the others go on
                rig.say("one")
                await rig.are_seen()

    asyncio.run(scenario())


def test_a_relay_without_a_gmanager_says_so(
    etcd_endpoint: str, tmp_path: Path, lenders: dict[str, KvDaemonProcess]
) -> None:
    async def scenario() -> None:
        async with make_channel(lenders["kv-0"].address) as channel:
            call = gmanager_pb2_grpc.HeartbeatRelayServiceStub(channel).Heartbeat(timeout=20)
            for _ in range(40):
                if call.done():
                    break
                await call.write(gmanager_pb2.HeartbeatRequest(member="instance/x", full=True))
                await asyncio.sleep(0.1)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert isinstance(error_from_rpc(caught.value), UnavailableError)

    asyncio.run(scenario())


def test_a_stream_begins_with_a_full_report_of_its_own_kind() -> None:
    stream = Reception(ClusterView(), NoPlanning(), lambda: 0.0).stream()
    with pytest.raises(ResyncRequiredError):
        stream.take(gmanager_pb2.HeartbeatRequest(member="instance/a", full=True))
    with pytest.raises(ResyncRequiredError):
        stream.take(gmanager_pb2.HeartbeatRequest(member="kvdaemon/a", full=True, instance={}))
    assert stream.member == ""
