"""An instance as its gManager sees it: the rManager that is told to move blocks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc.aio
from opentelemetry.trace import NoOpTracer, SpanKind, Tracer

from infinitellm.internal.v1 import instance_pb2, instance_pb2_grpc
from services.core.trace_context import parse_traceparent
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.tls import MutualTls
from services.runtime.tracing import under


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """Sealed blocks of a request are to move.

    Attributes:
        fencing_token: of the leadership under which the order is given.
        destination_address: control address of the destination daemon.
    """

    move_id: str
    fencing_token: int
    request_id: str
    source_kvdaemon_id: str
    destination_kvdaemon_id: str
    destination_address: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class MoveAnswer:
    """``accepted_blocks`` are on their way; 0 with the reason of the refusal."""

    accepted_blocks: int
    refusal: str


class InstanceClients:
    """Channels to instances, kept from order to order."""

    def __init__(self, tls: MutualTls | None = None, tracer: Tracer | None = None) -> None:
        self._tls = tls
        self._tracer = tracer or NoOpTracer()
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def move_blocks(self, address: str, order: MoveOrder, timeout_s: float) -> MoveAnswer:
        """Gives the order to the rManager at ``address``.

        Raises:
            InfiniteLLMError: it cannot be reached, or does not answer in time; it may have the order all the same.
        """
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = make_channel(address, "instance", self._tls)
        request = instance_pb2.MoveBlocksRequest(
            move_id=order.move_id,
            fencing_token=order.fencing_token,
            request_id=order.request_id,
            source_kvdaemon_id=order.source_kvdaemon_id,
            destination_kvdaemon_id=order.destination_kvdaemon_id,
            destination_address=order.destination_address,
            num_blocks=order.num_blocks,
        )
        begun = time.time_ns()
        try:
            response = await instance_pb2_grpc.InstanceServiceStub(channel).MoveBlocks(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as exc:
            await self._drop(address)
            raise error_from_rpc(exc) from exc
        self._trace(order, response, begun)
        return MoveAnswer(response.accepted_blocks, response.refusal)

    async def keep(self, addresses: frozenset[str]) -> None:
        """Closes the channels to everybody else."""
        for address in self._channels.keys() - addresses:
            await self._drop(address)

    async def close(self) -> None:
        await self.keep(frozenset())

    def _trace(self, order: MoveOrder, response: instance_pb2.MoveBlocksResponse, begun: int) -> None:
        """The order's span. Which trace the request belongs to, its instance knows and says in its answer."""
        request = parse_traceparent(response.traceparent)
        if request is None:
            return
        attributes: dict[str, str | int] = {
            "infinite_llm.move.id": order.move_id,
            "infinite_llm.move.source": order.source_kvdaemon_id,
            "infinite_llm.move.destination": order.destination_kvdaemon_id,
            "infinite_llm.move.accepted_blocks": response.accepted_blocks,
            "infinite_llm.move.refusal": response.refusal,
        }
        span = self._tracer.start_span(
            "order move", under(request), kind=SpanKind.CLIENT, attributes=attributes, start_time=begun
        )
        span.end()

    async def _drop(self, address: str) -> None:
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()
