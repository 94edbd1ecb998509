"""The probes' port, asked as kubelet asks it."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.core.errors import ConfigError
from services.runtime.health import HealthPort

DEADLINE_S = 20.0


async def ask(address: str, service: str) -> str:
    async with aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def test_live_and_ready_are_two_questions() -> None:
    state = {"live": True, "ready": False}

    async def scenario() -> None:
        port = HealthPort("127.0.0.1:0", lambda: state["live"], lambda: state["ready"])
        await port.start()
        assert [await ask(port.address, name) for name in state] == ["SERVING", "NOT_SERVING"]
        state.update(live=False, ready=True)
        assert [await ask(port.address, name) for name in state] == ["NOT_SERVING", "SERVING"]
        with pytest.raises(aio.AioRpcError) as unknown:
            await ask(port.address, "started")
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        await port.close()
        with pytest.raises(aio.AioRpcError) as closed:
            await ask(port.address, "live")
        assert closed.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_no_port_unless_asked_for() -> None:
    async def scenario() -> None:
        port = HealthPort(None, lambda: True, lambda: True)
        await port.start()
        assert port.address == ""
        await port.close()
        with pytest.raises(ConfigError, match="host:port"):
            HealthPort("8081", lambda: True, lambda: True)

    asyncio.run(scenario())
