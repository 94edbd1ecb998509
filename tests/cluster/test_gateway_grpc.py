"""The public gRPC API of a real gateway, and the cluster's state through a real gManager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from etcd_process import EtcdProcess
from gateway_rig import (
    BYTES,
    CLUSTER,
    PlayedInstance,
    Script,
    expected_tokens,
    gateway,
    service,
    until,
    write_checkpoint,
)

from infinitellm.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.core.blocks import PoolGeometry
from services.core.errors import ContextTooLongError, InvalidRequestError, ModelNotFoundError, UnavailableError
from services.core.placement import BlockCount, InstanceSnapshot, KvDaemonSnapshot, PoolStats, Room, RoomView
from services.rmanager.gmanager_client import GManagerClient
from services.rmanager.gmanager_locator import GManagerLocator
from services.rmanager.heartbeat import HeartbeatSender
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.membership import Member, Membership

pytestmark = pytest.mark.cluster
GEOMETRY = PoolGeometry(layers=2, kv_heads=2, block_tokens=64, head_dim=32, dtype="float32")


class Rig:
    def __init__(self, etcd: str, directory: Path, http: str, grpc_address: str, log: Path) -> None:
        self.etcd, self.directory, self.http, self.grpc, self.log = etcd, directory, http, grpc_address, log


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    root = tmp_path_factory.mktemp("grpc")
    etcd = EtcdProcess(root)
    etcd.start()
    try:
        with gateway(root, etcd.endpoint, write_checkpoint(root / "tiny")) as running:
            yield Rig(etcd.endpoint, root, running.http, running.grpc, running.log)
    finally:
        etcd.kill()


@asynccontextmanager
async def ready(rig: Rig, script: Script) -> AsyncIterator[tuple[PlayedInstance, grpc.aio.Channel]]:
    etcd = EtcdClient([rig.etcd])
    played = PlayedInstance("instance-0", script)
    with service("gmanager", rig.directory, listen="127.0.0.1:0", etcd=[rig.etcd]):
        await played.start(etcd)
        async with httpx.AsyncClient(base_url=rig.http, timeout=20) as client, make_channel(rig.grpc) as channel:

            async def healthy() -> bool:
                return (await client.get("/health")).status_code == 200

            try:
                await until(healthy, "the gateway is ready")
                yield played, channel
            finally:
                await played.close()
                await etcd.close()


def test_generate(rig: Rig) -> None:
    async def scenario() -> None:
        async with ready(rig, Script(progress=2)) as (played, channel):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GenerateRequest(
                text="hello", sampling=inference_pb2.SamplingParams(max_tokens=14, logprobs=2), progress=True
            )
            responses = [response async for response in stub.Generate(request, timeout=20)]
            kinds = [response.WhichOneof("event") for response in responses]
            # 14 bytes end within a character: what was held back comes as a last event of its own.
            assert kinds == ["progress"] * 2 + ["tokens"] * 15 + ["finished"]
            assert {response.request_id for response in responses} == {played.submitted[0].request_id}
            assert [response.progress.computed_tokens for response in responses[:2]] == [2, 5]
            tokens = [response.tokens for response in responses[2:-1]]
            assert [token for part in tokens for token in part.ids] == expected_tokens(14)
            assert "".join(part.text for part in tokens) == BYTES[:14].decode(errors="replace")
            assert list(tokens[0].logprobs[0].top_ids) == [ord("n"), ord("o")]
            finished = responses[-1].finished
            assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
            assert (finished.prompt_tokens, finished.completion_tokens, finished.cached_tokens) == (5, 14, 2)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (inference_pb2.GenerateRequest(sampling=inference_pb2.SamplingParams(max_tokens=1)), InvalidRequestError),
        (inference_pb2.GenerateRequest(text="a"), InvalidRequestError),
        (
            inference_pb2.GenerateRequest(
                text="a", sampling=inference_pb2.SamplingParams(max_tokens=1, temperature=float("nan"))
            ),
            InvalidRequestError,
        ),
        (
            inference_pb2.GenerateRequest(text="a", sampling=inference_pb2.SamplingParams(max_tokens=2**31)),
            ContextTooLongError,
        ),
        (
            inference_pb2.GenerateRequest(text="a", model="other", sampling=inference_pb2.SamplingParams(max_tokens=1)),
            ModelNotFoundError,
        ),
    ],
)
def test_refusals(rig: Rig, request_: inference_pb2.GenerateRequest, error: type[Exception]) -> None:
    async def scenario() -> None:
        async with make_channel(rig.grpc) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Generate(request_, timeout=20):
                    pass
            assert type(error_from_rpc(caught.value)) is error

    asyncio.run(scenario())


def test_cancelling_ends_the_request(rig: Rig) -> None:
    async def scenario() -> None:
        async with ready(rig, Script(delay_s=0.05)) as (played, channel):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            sampling = inference_pb2.SamplingParams(max_tokens=5000)
            call = stub.Generate(inference_pb2.GenerateRequest(text="a", sampling=sampling), timeout=60)
            async for _ in call:
                call.cancel()
                break
            await until(lambda: played.aborted, "the request is aborted")
            assert played.aborted == [played.submitted[0].request_id]

    asyncio.run(scenario())


def test_cluster_status(rig: Rig) -> None:
    async def scenario() -> None:
        async with make_channel(rig.grpc) as channel:
            status = cluster_pb2_grpc.ClusterServiceStub(channel).GetClusterStatus
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await status(cluster_pb2.GetClusterStatusRequest(), timeout=20)
            assert isinstance(error_from_rpc(caught.value), UnavailableError)
        async with ready(rig, Script()) as (_, channel):
            status = cluster_pb2_grpc.ClusterServiceStub(channel).GetClusterStatus
            etcd = EtcdClient([rig.etcd])
            membership = Membership(etcd, CLUSTER)
            locator = GManagerLocator(membership)
            registration = await membership.register(Member("kvdaemon", "kv-0", "127.0.0.1:9", epoch=1))
            placement = {"cmpl-1": {"kv-0": BlockCount(4, True)}}
            stats = PoolStats(20 * GEOMETRY.block_bytes, GEOMETRY.block_bytes, 20, free=10, cached=6, in_use=4)
            senders = [
                HeartbeatSender("instance/instance-0", locator, lambda: InstanceSnapshot(1, 2, placement)),
                HeartbeatSender("kvdaemon/kv-0", locator, lambda: KvDaemonSnapshot(stats, GEOMETRY)),
            ]
            for sender in senders:
                sender.start()

            async def complete() -> bool:
                answer = await status(cluster_pb2.GetClusterStatusRequest(), timeout=20)
                return bool(answer.requests and answer.kvdaemons and answer.kvdaemons[0].use.total)

            await until(complete, "both have reported")
            answer = await status(cluster_pb2.GetClusterStatusRequest(), timeout=20)
            assert list(answer.models) == ["tiny"]
            (instance,) = answer.instances
            assert (instance.instance_id, instance.running_requests, instance.waiting_requests) == ("instance-0", 1, 2)
            (daemon,) = answer.kvdaemons
            assert (daemon.use.total, daemon.use.free, daemon.use.cached, daemon.use.in_use) == (20, 10, 6, 4)
            (request,) = answer.requests
            assert (request.request_id, request.instance_id) == ("cmpl-1", "instance-0")
            (place,) = request.placement
            assert (place.kvdaemon_id, place.num_blocks, place.local) == ("kv-0", 4, True)

            rooms = GManagerClient(locator.address)
            (room,) = (await rooms.find_room(GEOMETRY)).rooms
            assert room == Room("kv-0", "127.0.0.1:9", free_blocks=16, total_blocks=20)
            assert await rooms.find_room(GEOMETRY, exclude=("kv-0",)) == RoomView()

            # Changes follow, and a request that ended is gone.
            placement["cmpl-1"] = {"kv-0": BlockCount(7, True)}

            async def changed() -> bool:
                answer = await status(cluster_pb2.GetClusterStatusRequest(), timeout=20)
                return [entry.num_blocks for one in answer.requests for entry in one.placement] == [7]

            await until(changed, "the change has come")
            placement.clear()

            async def ended() -> bool:
                return not (await status(cluster_pb2.GetClusterStatusRequest(), timeout=20)).requests

            await until(ended, "the end has come")
            # A daemon whose membership and heartbeats end is not shown any more.
            await senders[1].close()
            await registration.close()

            async def gone() -> bool:
                return not (await status(cluster_pb2.GetClusterStatusRequest(), timeout=20)).kvdaemons

            await until(gone, "the daemon is gone")
            for sender in senders:
                await sender.close()
            await rooms.close()
            await locator.close()
            await etcd.close()

    asyncio.run(scenario())
