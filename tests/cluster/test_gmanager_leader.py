"""Two gManagers, one of which leads: killed, stopped, continued, ended, and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import grpc
import pytest
from gateway_rig import CLUSTER, service, until
from signals import send_signal
from test_gmanager_heartbeats import Observer, observer

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.errors import NotLeaderError
from services.core.placement import BlockCount
from services.runtime.election import Leader
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.membership import Membership, decode_member

pytestmark = pytest.mark.cluster

LEASE_S = 4


@contextmanager
def gmanager(name: str, etcd: str, directory: Path, lease_s: int = LEASE_S) -> Iterator[subprocess.Popen[bytes]]:
    (directory / name).mkdir(exist_ok=True)
    keys = {"member_id": name, "listen": "127.0.0.1:0", "etcd": [etcd], "lease_ttl_s": lease_s}
    with service("gmanager", directory / name, **keys) as process:
        yield process


class Observed:
    """Who leads, by etcd's word."""

    def __init__(self) -> None:
        self.leader: Leader | None = None

    @property
    def name(self) -> str | None:
        member = None if self.leader is None else decode_member("", self.leader.value)
        return None if member is None else member.member_id

    @property
    def address(self) -> str:
        assert self.leader is not None
        member = decode_member("", self.leader.value)
        assert member is not None
        return member.address

    async def is_now(self, name: str) -> None:
        """It must lead within two lease times."""
        await until(lambda: self.name == name, f"{name} leads", timeout_s=2 * LEASE_S)


@asynccontextmanager
async def observed_election(etcd_endpoint: str) -> AsyncIterator[Observed]:
    etcd, seen = EtcdClient([etcd_endpoint]), Observed()

    async def follow() -> None:
        async for leader in Membership(etcd, CLUSTER).gmanager_election().observe():
            seen.leader = leader

    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.wait([task])
        await etcd.close()


async def leads_in_view(watcher: Observer) -> list[str]:
    state = await watcher.state()
    return [] if state is None else [view.gmanager_id for view in state.gmanagers if view.leads]


async def refuses(address: str) -> bool:
    async with make_channel(address) as channel:
        stub = gmanager_pb2_grpc.GManagerServiceStub(channel)
        try:
            await stub.GetClusterView(gmanager_pb2.GetClusterViewRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return isinstance(error_from_rpc(error), NotLeaderError)
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_standby_takes_over(etcd_endpoint: str, tmp_path: Path, how: signal.Signals) -> None:
    async def scenario() -> None:
        async with observed_election(etcd_endpoint) as election, observer(etcd_endpoint) as watcher:
            with gmanager("first", etcd_endpoint, tmp_path) as first:
                watcher.placement["r"] = {"k": BlockCount(3, True)}
                await watcher.sees("r")
                with gmanager("second", etcd_endpoint, tmp_path):
                    await until(lambda: _both_known(watcher), "both are known")
                    assert await leads_in_view(watcher) == ["first"]
                    old = election.address
                    token = election.leader.fencing_token  # type: ignore[union-attr]
                    send_signal(first.pid, how)
                    watcher.placement["s"] = {"k": BlockCount(4, True)}
                    await election.is_now("second")
                    await watcher.sees("r", "s")
                    assert election.leader.fencing_token > token  # type: ignore[union-attr]
                    await until(lambda: _leader_is(watcher, "second"), "it says so")
                    if how is signal.SIGSTOP:
                        os.kill(first.pid, signal.SIGCONT)
                        await until(lambda: refuses(old), "the continued one refuses")
                        del watcher.placement["r"]
                        await watcher.sees("s")
                        assert await leads_in_view(watcher) == ["second"]

    asyncio.run(scenario())


async def _both_known(watcher: Observer) -> bool:
    state = await watcher.state()
    return state is not None and len(state.gmanagers) == 2


async def _leader_is(watcher: Observer, name: str) -> bool:
    return await leads_in_view(watcher) == [name]


def test_a_leader_that_ends_hands_over_at_once(etcd_endpoint: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with observed_election(etcd_endpoint) as election, observer(etcd_endpoint) as watcher:
            with gmanager("first", etcd_endpoint, tmp_path, lease_s=300) as first:
                await election.is_now("first")
                with gmanager("second", etcd_endpoint, tmp_path):
                    watcher.placement["r"] = {"k": BlockCount(3, True)}
                    await watcher.sees("r")
                    await until(lambda: _both_known(watcher), "both are known")
                    first.terminate()
                    await until(lambda: election.name == "second", "no lease has to expire")
                    await watcher.sees("r")

    asyncio.run(scenario())


def test_a_killed_gmanager_that_is_started_again_leads_at_once(etcd_endpoint: str, tmp_path: Path) -> None:
    """Its predecessor's lease need not expire: the later start of the same member removes that candidate."""

    async def scenario() -> None:
        async with observed_election(etcd_endpoint) as election, observer(etcd_endpoint) as watcher:
            with gmanager("only", etcd_endpoint, tmp_path, lease_s=300) as first:
                await election.is_now("only")
                token = election.leader.fencing_token  # type: ignore[union-attr]
                send_signal(first.pid, signal.SIGSTOP)  # worse than dead: it still has its lease for a while
                with gmanager("only", etcd_endpoint, tmp_path):

                    def newer() -> bool:
                        return election.leader is not None and election.leader.fencing_token > token

                    await until(newer, "the later start leads")
                    watcher.placement["r"] = {"k": BlockCount(3, True)}
                    await watcher.sees("r")

    asyncio.run(scenario())
