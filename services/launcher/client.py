"""A client of the gateway's public gRPC API, for the launcher's own commands."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from grpc import aio

from infinitellm.v1 import cluster_pb2, inference_pb2
from infinitellm.v1.cluster_pb2_grpc import ClusterServiceStub
from infinitellm.v1.inference_pb2_grpc import InferenceServiceStub
from services.runtime.grpc_channel import error_from_rpc, make_channel


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """Fields as in infinitellm.v1.InstanceStatus."""

    instance_id: str
    address: str
    local_kvdaemon_id: str
    running_requests: int
    waiting_requests: int
    heartbeat_age_s: float


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Fields as in infinitellm.v1.PoolUse, in rBlocks."""

    total: int
    free: int
    cached: int
    workspace: int
    reserved: int
    in_use: int


@dataclass(frozen=True, slots=True)
class KvDaemonStatus:
    """Fields as in infinitellm.v1.KvDaemonStatus."""

    kvdaemon_id: str
    address: str
    pool_bytes: int
    block_bytes: int
    use: PoolUse
    heartbeat_age_s: float


@dataclass(frozen=True, slots=True)
class BlockPlacement:
    """Fields as in infinitellm.v1.BlockPlacement."""

    kvdaemon_id: str
    num_blocks: int
    local: bool


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """Fields as in infinitellm.v1.RequestStatus."""

    request_id: str
    instance_id: str
    placement: tuple[BlockPlacement, ...]


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """Fields as in infinitellm.v1.GetClusterStatusResponse."""

    instances: tuple[InstanceStatus, ...]
    kvdaemons: tuple[KvDaemonStatus, ...]
    requests: tuple[RequestStatus, ...]
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """So much of the prompt has been computed."""

    request_id: str
    computed_tokens: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of the stream.

    Attributes:
        stopped: at the model's end-of-sequence token, not at max_tokens.
        cached_tokens: of the prompt, whose KV was found in the cluster and not computed.
    """

    request_id: str
    stopped: bool
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class GatewayClient:
    """One channel to one gateway."""

    def __init__(self, address: str) -> None:
        self._channel = make_channel(address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def status(self, timeout_s: float) -> ClusterStatus:
        """The state of the cluster.

        Raises:
            InfiniteLLMError: the gateway does not answer, or has no gManager.
        """
        try:
            response = await ClusterServiceStub(self._channel).GetClusterStatus(
                cluster_pb2.GetClusterStatusRequest(), timeout=timeout_s
            )
        except aio.AioRpcError as exc:
            raise error_from_rpc(exc) from exc
        return _cluster_status(response)

    async def generate(
        self, text: str, max_tokens: int, timeout_s: float
    ) -> AsyncIterator[Progress | Tokens | Finished]:
        """Streams the greedy continuation of a text, with progress of the prefill.

        Raises:
            InfiniteLLMError: what the gateway answered instead.
        """
        request = inference_pb2.GenerateRequest(
            text=text, sampling=inference_pb2.SamplingParams(max_tokens=max_tokens), progress=True
        )
        try:
            async for response in InferenceServiceStub(self._channel).Generate(request, timeout=timeout_s):
                event = _event(response)
                if event is not None:
                    yield event
        except aio.AioRpcError as exc:
            raise error_from_rpc(exc) from exc


def _cluster_status(response: cluster_pb2.GetClusterStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        instances=tuple(
            InstanceStatus(
                i.instance_id,
                i.address,
                i.local_kvdaemon_id,
                i.running_requests,
                i.waiting_requests,
                i.heartbeat_age_s,
            )
            for i in response.instances
        ),
        kvdaemons=tuple(
            KvDaemonStatus(d.kvdaemon_id, d.address, d.pool_bytes, d.block_bytes, _pool_use(d.use), d.heartbeat_age_s)
            for d in response.kvdaemons
        ),
        requests=tuple(
            RequestStatus(
                r.request_id,
                r.instance_id,
                tuple(BlockPlacement(p.kvdaemon_id, p.num_blocks, p.local) for p in r.placement),
            )
            for r in response.requests
        ),
        models=tuple(response.models),
    )


def _pool_use(use: cluster_pb2.PoolUse) -> PoolUse:
    return PoolUse(use.total, use.free, use.cached, use.workspace, use.reserved, use.in_use)


def _event(response: inference_pb2.GenerateResponse) -> Progress | Tokens | Finished | None:
    request_id, kind = response.request_id, response.WhichOneof("event")
    if kind == "progress":
        return Progress(request_id, response.progress.computed_tokens, response.progress.prompt_tokens)
    if kind == "tokens":
        return Tokens(request_id, tuple(response.tokens.ids), response.tokens.text)
    if kind == "finished":
        end = response.finished
        stopped = end.reason == inference_pb2.FINISH_REASON_STOP
        return Finished(request_id, stopped, end.prompt_tokens, end.completion_tokens, end.cached_tokens)
    return None
