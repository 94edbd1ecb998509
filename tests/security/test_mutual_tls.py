"""Who gets in with which certificate, over real gRPC connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import get_args

import grpc
import pytest
from authority import Authority, mutual_tls
from google.protobuf.descriptor import FileDescriptor
from grpc import aio

from infinitellm.internal.v1 import gmanager_pb2, instance_pb2, kvdaemon_pb2
from infinitellm.v1 import cluster_pb2, inference_pb2
from services.core.errors import ConfigError, InfiniteLLMError, PermissionDeniedError, UnavailableError
from services.runtime.access import CALLERS
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.grpc_server import bind, make_server
from services.runtime.tls import MutualTls, Role

ROLES: tuple[Role, ...] = get_args(Role)
RESERVE = "/infinitellm.internal.v1.KvDaemonService/Reserve"
DEADLINE_S = 20.0

FILES: tuple[FileDescriptor, ...] = tuple(
    module.DESCRIPTOR for module in (gmanager_pb2, instance_pb2, kvdaemon_pb2, cluster_pb2, inference_pb2)
)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


async def answer(request: bytes, context: object) -> bytes:
    return b"ok"


@asynccontextmanager
async def serving(tls: MutualTls | None) -> AsyncIterator[str]:
    """A server that answers every method of CALLERS, each as a unary call."""
    server = make_server(tls)
    for method in CALLERS:
        _, service, name = method.split("/")
        handlers = {name: grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    address = bind(server, "127.0.0.1:0", tls=tls)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


async def call(channel: aio.Channel, method: str = RESERVE) -> object:
    try:
        return await channel.unary_unary(method)(b"", timeout=DEADLINE_S)
    except aio.AioRpcError as error:
        raise error_from_rpc(error) from error


def refused(server: MutualTls | None, client: MutualTls | None, error: type[InfiniteLLMError]) -> str:
    """Calls Reserve; answers the message of the refusal."""

    async def scenario() -> str:
        async with serving(server) as address, make_channel(address, "kvdaemon", client) as channel:
            with pytest.raises(error) as caught:
                await call(channel)
            assert type(caught.value) is error
            return str(caught.value)

    return asyncio.run(scenario())


def test_the_table_of_callers_has_every_method_of_the_protos() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in FILES
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert set(CALLERS) == methods


@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_call_what_the_table_says_and_nothing_else(
    role: Role, tmp_path: Path, authority: Authority
) -> None:
    server = mutual_tls(tmp_path / "server", authority, "kvdaemon.infinite-llm")
    client = mutual_tls(tmp_path / "client", authority, f"{role}.infinite-llm")

    async def scenario() -> None:
        async with serving(server) as address, make_channel(address, "kvdaemon", client) as channel:
            for method, callers in CALLERS.items():
                if role in callers:
                    assert await call(channel, method) == b"ok"
                else:
                    with pytest.raises(PermissionDeniedError, match=rf"{method} is for .*, not for {role}\."):
                        await call(channel, method)

    asyncio.run(scenario())


def test_a_gateway_cannot_move_blocks() -> None:
    moving = [method for method in CALLERS if "Block" in method or "KvDaemonService" in method]
    assert any(method.endswith("/MoveBlocks") for method in moving)
    assert all("gateway" not in CALLERS[method] for method in moving)


def test_without_a_certificate(tmp_path: Path, authority: Authority) -> None:
    server = mutual_tls(tmp_path / "server", authority, "kvdaemon.infinite-llm")
    refused(server, None, UnavailableError)  # plain text

    async def scenario() -> None:
        async with serving(server) as address:
            options = (("grpc.ssl_target_name_override", "kvdaemon.infinite-llm"),)
            anonymous = grpc.ssl_channel_credentials(authority.pem)
            async with aio.secure_channel(address, anonymous, options=options) as channel:
                with pytest.raises(UnavailableError):
                    await call(channel)

    asyncio.run(scenario())


def test_a_client_of_a_foreign_authority(tmp_path: Path, authority: Authority) -> None:
    foreign, name = Authority("foreign"), "instance.infinite-llm"
    server = mutual_tls(tmp_path / "server", authority, "kvdaemon.infinite-llm")
    client = mutual_tls(tmp_path / "client", foreign, name)
    # It trusts the server; it is the server that must refuse.
    client = MutualTls(server.ca, client.cert, client.key)
    refused(server, client, UnavailableError)


def test_a_server_of_a_foreign_authority(tmp_path: Path, authority: Authority) -> None:
    foreign = Authority("foreign")
    server = mutual_tls(tmp_path / "server", foreign, "kvdaemon.infinite-llm")
    client = mutual_tls(tmp_path / "client", authority, "instance.infinite-llm")
    # The server trusts the client; it is the client that must refuse.
    server = MutualTls(client.ca, server.cert, server.key)
    refused(server, client, UnavailableError)


def test_a_server_of_another_role_or_domain(tmp_path: Path, authority: Authority) -> None:
    client = mutual_tls(tmp_path / "client", authority, "instance.infinite-llm")
    for name in ("gateway.infinite-llm", "kvdaemon.other-cluster", "127.0.0.1"):
        server = mutual_tls(tmp_path / name, authority, name)
        refused(server, client, UnavailableError)


def test_a_client_of_another_role_or_domain(tmp_path: Path, authority: Authority) -> None:
    server = mutual_tls(tmp_path / "server", authority, "kvdaemon.infinite-llm")
    for name in ("gateway.infinite-llm", "instance.other-cluster", "instance.infinite-llm.example", "x.example"):
        client = mutual_tls(tmp_path / name, authority, name)
        message = refused(server, client, PermissionDeniedError)
        assert message == f"{RESERVE} is for instance.infinite-llm, not for {name}"


@pytest.mark.parametrize("who", ["client", "server"])
def test_an_expired_certificate(who: str, tmp_path: Path, authority: Authority) -> None:
    server = mutual_tls(tmp_path / "s", authority, "kvdaemon.infinite-llm", expired=who == "server")
    client = mutual_tls(tmp_path / "c", authority, "instance.infinite-llm", expired=who == "client")
    refused(server, client, UnavailableError)


def test_files_that_are_of_no_use_are_refused_at_start(tmp_path: Path, authority: Authority) -> None:
    async def scenario() -> None:
        good = mutual_tls(tmp_path / "good", authority, "kvdaemon.infinite-llm")
        other = mutual_tls(tmp_path / "other", authority, "kvdaemon.infinite-llm")
        for tls, message in (
            (MutualTls(good.ca, good.cert, other.key), "do not go together"),
            (MutualTls(good.ca, good.cert, tmp_path / "none"), "none cannot be read"),
        ):
            with pytest.raises(ConfigError, match=message):
                bind(make_server(tls), "127.0.0.1:0", tls=tls)
        # With TLS there is no reason to stay on loopback.
        assert bind(make_server(good), "0.0.0.0:0", tls=good).startswith("0.0.0.0:")
        with pytest.raises(ConfigError, match="none cannot be read"):
            make_channel("127.0.0.1:1", "kvdaemon", MutualTls(tmp_path / "none", good.cert, good.key))

    asyncio.run(scenario())
