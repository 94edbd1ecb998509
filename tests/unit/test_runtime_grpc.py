"""The error tree over real gRPC calls, and what a stopped server looks like."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc import aio
from signals import send_signal

from services.core.errors import (
    ConfigError,
    ContextTooLongError,
    InfiniteLLMError,
    PeerLostError,
    UnavailableError,
    all_errors,
)
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.grpc_server import bind, make_server

DEADLINE_S = 60.0


def raise_named(name: bytes) -> None:
    """Raises what the request asks for."""
    if name == b"BUG":
        raise ZeroDivisionError("secret detail")
    if name != b"NONE":
        raise all_errors()[name.decode()](f"asked for {name.decode()}")


async def unary_unary(request: bytes, context: object) -> bytes:
    raise_named(request)
    return b"ok"


async def unary_stream(request: bytes, context: object) -> AsyncIterator[bytes]:
    yield b"first"
    raise_named(request)
    if request == b"NONE":
        await asyncio.sleep(3600)


async def stream_unary(requests: AsyncIterator[bytes], context: object) -> bytes:
    async for request in requests:
        raise_named(request)
    return b"ok"


async def stream_stream(requests: AsyncIterator[bytes], context: aio.ServicerContext) -> None:
    # The other way to write a streaming handler: a coroutine that writes itself.
    async for request in requests:
        await context.write(b"first")
        raise_named(request)


async def aborting(request: bytes, context: aio.ServicerContext) -> bytes:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")


def make_test_server() -> aio.Server:
    server = make_server()
    methods = {
        "UU": grpc.unary_unary_rpc_method_handler(unary_unary),
        "US": grpc.unary_stream_rpc_method_handler(unary_stream),
        "SU": grpc.stream_unary_rpc_method_handler(stream_unary),
        "SS": grpc.stream_stream_rpc_method_handler(stream_stream),
        "Abort": grpc.unary_unary_rpc_method_handler(aborting),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", methods),))
    return server


async def call(channel: aio.Channel, kind: str, request: bytes) -> object:
    path = f"/test.Test/{kind}"
    if kind == "US":
        return [item async for item in channel.unary_stream(path)(request, timeout=DEADLINE_S)]
    if kind == "SU":
        return await channel.stream_unary(path)(iter([request]), timeout=DEADLINE_S)
    if kind == "SS":
        return [item async for item in channel.stream_stream(path)(iter([request]), timeout=DEADLINE_S)]
    return await channel.unary_unary(path)(request, timeout=DEADLINE_S)


@pytest.mark.parametrize("kind", ["UU", "US", "SU", "SS"])
def test_errors_arrive_as_what_they_were(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        server = make_test_server()
        address = bind(server, "127.0.0.1:0")
        await server.start()
        async with make_channel(address) as channel:
            for reason, cls in all_errors().items():
                with pytest.raises(aio.AioRpcError) as failed:
                    await call(channel, kind, reason.encode())
                error = error_from_rpc(failed.value)
                assert type(error) is cls
                assert str(error) == f"asked for {reason}"
                assert failed.value.code().name == cls.grpc_status
            assert "call failed" not in caplog.text
            with pytest.raises(aio.AioRpcError) as failed:
                await call(channel, kind, b"BUG")
            assert failed.value.code() == grpc.StatusCode.INTERNAL
            assert "secret" not in (failed.value.details() or "")
            assert type(error_from_rpc(failed.value)) is InfiniteLLMError
            assert "secret detail" in caplog.text
        await server.stop(0)

    asyncio.run(scenario())


def test_answers_and_own_aborts_pass_through() -> None:
    async def scenario() -> None:
        server = make_test_server()
        address = bind(server, "127.0.0.1:0")
        await server.start()
        async with make_channel(address) as channel:
            assert await call(channel, "UU", b"NONE") == b"ok"
            assert await call(channel, "SS", b"NONE") == [b"first"]
            with pytest.raises(aio.AioRpcError) as failed:
                await call(channel, "Abort", b"")
            assert failed.value.code() == grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(aio.AioRpcError) as failed:
                await call(channel, "Missing", b"")
            assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
        await server.stop(0)

    asyncio.run(scenario())


def test_long_messages_are_cut_not_lost() -> None:
    async def fails(request: bytes, context: object) -> bytes:
        raise ContextTooLongError("x" * 100_000)

    async def scenario() -> None:
        server = make_server()
        handler = {"UU": grpc.unary_unary_rpc_method_handler(fails)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handler),))
        address = bind(server, "127.0.0.1:0")
        await server.start()
        async with make_channel(address) as channel:
            with pytest.raises(aio.AioRpcError) as failed:
                await call(channel, "UU", b"")
            assert type(error_from_rpc(failed.value)) is ContextTooLongError
        await server.stop(0)

    asyncio.run(scenario())


def test_bind_refuses_what_others_can_reach() -> None:
    async def scenario() -> None:
        server = make_server()
        with pytest.raises(ConfigError, match="refusing to listen"):
            bind(server, "0.0.0.0:0")
        with pytest.raises(ConfigError, match="host:port"):
            bind(server, "50051")
        assert bind(server, "0.0.0.0:0", allow_insecure=True).startswith("0.0.0.0:")
        taken = bind(server, "127.0.0.1:0")
        with pytest.raises(ConfigError, match=f"cannot listen on {taken}"):
            bind(make_server(), taken)
        await server.start()
        await server.stop(0)

    asyncio.run(scenario())


def test_nobody_listening_is_unavailable() -> None:
    async def scenario() -> None:
        async with make_channel("127.0.0.1:1") as channel:
            with pytest.raises(aio.AioRpcError) as failed:
                await call(channel, "UU", b"NONE")
            error = error_from_rpc(failed.value)
            assert type(error) is UnavailableError
            assert not isinstance(error, PeerLostError)

    asyncio.run(scenario())


SERVER = """
import asyncio
from test_runtime_grpc import make_test_server
from services.runtime.grpc_server import bind

async def main():
    server = make_test_server()
    address = bind(server, "127.0.0.1:0")
    await server.start()
    print(address, flush=True)
    await server.wait_for_termination()

asyncio.run(main())
"""


def test_a_stopped_server_is_noticed() -> None:
    """A stream without traffic ends, by unanswered pings alone, long before the call's own deadline."""
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()

        async def scenario() -> None:
            async with make_channel(address) as channel:
                stream = channel.unary_stream("/test.Test/US")(b"NONE", timeout=600)
                assert await stream.read() == b"first"
                send_signal(process.pid, signal.SIGSTOP)
                async with asyncio.timeout(20):
                    with pytest.raises(aio.AioRpcError) as failed:
                        await stream.read()
                assert type(error_from_rpc(failed.value)) is UnavailableError
                os.kill(process.pid, signal.SIGCONT)
                # The same channel finds the server again; a connection begun while it was stopped may still break.
                async with asyncio.timeout(30):
                    while True:
                        try:
                            assert await channel.unary_unary("/test.Test/UU")(b"NONE", timeout=10) == b"ok"
                            break
                        except aio.AioRpcError as error:
                            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                                raise
                            await asyncio.sleep(0.1)

        asyncio.run(scenario())
    finally:
        process.kill()
        process.wait()
