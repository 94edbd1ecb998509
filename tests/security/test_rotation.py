"""Certificates replaced while calls go on: no call fails, and new connections show the new identity."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from authority import Authority, SecretDirectory, mutual_tls
from cryptography import x509
from etcd_process import EtcdProcess
from grpc import aio

from services.core.errors import UnavailableError
from services.runtime.access import CALLERS
from services.runtime.etcd import EtcdClient
from services.runtime.grpc_channel import make_channel
from services.runtime.grpc_server import bind, make_server
from services.runtime.tls import MutualTls, TlsConfig

SERVER, CLIENT = "kvdaemon.infinite-llm", "instance.infinite-llm"
SERVICE = "infinitellm.internal.v1.KvDaemonService"
DEADLINE_S = 30.0


async def unary(request: bytes, context: object) -> bytes:
    return b"ok"


async def echo(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def start(tls: MutualTls) -> tuple[aio.Server, str]:
    assert f"/{SERVICE}/Reserve" in CALLERS
    assert f"/{SERVICE}/Session" in CALLERS
    server = make_server(tls)
    handlers = {
        "Reserve": grpc.unary_unary_rpc_method_handler(unary),
        "Session": grpc.stream_stream_rpc_method_handler(echo),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    address = bind(server, "127.0.0.1:0", tls=tls)
    await server.start()
    return server, address


async def reserve(address: str, tls: MutualTls) -> object:
    """One call over a connection of its own."""
    async with make_channel(address, "kvdaemon", tls) as channel:
        return await channel.unary_unary(f"/{SERVICE}/Reserve")(b"", timeout=DEADLINE_S)


def shown_serial(address: str, tls: MutualTls) -> int:
    """The serial number of the certificate that the server shows to a new connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.cert, tls.key)
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), timeout=DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname=SERVER) as connection,
    ):
        shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).serial_number


def test_rotation_under_load(tmp_path: Path) -> None:
    """Leaves first, then the authority: bundle, new leaves, old authority gone."""
    old, new = Authority("old"), Authority("new")
    server_files, client_files = SecretDirectory(tmp_path / "server"), SecretDirectory(tmp_path / "client")
    server_files.put(old.issue(SERVER), old.pem)
    client_files.put(old.issue(CLIENT), old.pem)
    left_behind = mutual_tls(tmp_path / "left", old, CLIENT)

    async def scenario() -> None:
        server, address = await start(server_files.tls)
        stopped = asyncio.Event()
        answered = asyncio.Semaphore(0)

        async def load() -> None:
            while not stopped.is_set():
                assert await reserve(address, client_files.tls) == b"ok"
                answered.release()

        async def more_calls() -> None:
            async with asyncio.timeout(DEADLINE_S):
                for _ in range(5):
                    await answered.acquire()

        tasks = [asyncio.create_task(load()) for _ in range(2)]
        async with make_channel(address, "kvdaemon", client_files.tls) as channel:
            stream = channel.stream_stream(f"/{SERVICE}/Session")()
            await stream.write(b"before")
            assert await stream.read() == b"before"
            await more_calls()
            bundle = old.pem + new.pem
            steps = (
                (old.issue(SERVER), old.issue(CLIENT), old.pem),
                (old.issue(SERVER), old.issue(CLIENT), bundle),
                (new.issue(SERVER), new.issue(CLIENT), bundle),
                (new.issue(SERVER), new.issue(CLIENT), new.pem),
            )
            for server_leaf, client_leaf, trusted in steps:
                # The client first shows what both authorities' trusters accept, then the server changes over.
                client_files.put(client_leaf, trusted if trusted == old.pem else bundle)
                server_files.put(server_leaf, trusted)
                await more_calls()
                assert await asyncio.to_thread(shown_serial, address, client_files.tls) == server_leaf.serial
            # What stands goes on; who comes anew with a certificate of the old authority stays out.
            await stream.write(b"after")
            assert await stream.read() == b"after"
            trusting = MutualTls(client_files.tls.ca, left_behind.cert, left_behind.key)
            with pytest.raises(aio.AioRpcError) as refused:
                await reserve(address, trusting)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            stream.cancel()
        stopped.set()
        await asyncio.gather(*tasks)
        await server.stop(0)

    asyncio.run(scenario())


def test_a_certificate_without_its_key_is_not_taken(tmp_path: Path) -> None:
    authority = Authority()
    first, second = authority.issue(SERVER), authority.issue(SERVER)
    files = SecretDirectory(tmp_path / "server")
    files.put(first, authority.pem)
    client = mutual_tls(tmp_path / "client", authority, CLIENT)

    async def scenario() -> None:
        server, address = await start(files.tls)
        (files.path / "tls.crt").resolve().write_bytes(second.cert)  # by hand, one file after the other
        assert await reserve(address, client) == b"ok"
        assert await asyncio.to_thread(shown_serial, address, client) == first.serial
        (files.path / "tls.key").resolve().write_bytes(second.key)
        assert await asyncio.to_thread(shown_serial, address, client) == second.serial
        (files.path / "ca.crt").resolve().unlink()
        assert await reserve(address, client) == b"ok"
        await server.stop(0)

    asyncio.run(scenario())


def test_towards_etcd(tmp_path: Path) -> None:
    """One client, whose certificate expires and is replaced."""
    authority = Authority()
    own, theirs = SecretDirectory(tmp_path / "own"), SecretDirectory(tmp_path / "etcd")
    own.put(authority.issue("gateway.infinite-llm"), authority.pem)
    theirs.put(authority.issue("localhost"), authority.pem)
    process = EtcdProcess(
        tmp_path,
        (
            f"--cert-file={theirs.tls.cert}",
            f"--key-file={theirs.tls.key}",
            f"--trusted-ca-file={theirs.tls.ca}",
            "--client-cert-auth",
        ),
        scheme="https",
    )
    process.start()

    async def scenario() -> None:
        endpoint = f"localhost:{process.endpoint.split(':')[1]}"
        etcd = EtcdClient([endpoint], TlsConfig(own.tls.ca, own.tls.cert, own.tls.key), timeout_s=DEADLINE_S)
        try:
            assert await etcd.get("key") is None
            own.put(authority.issue("gateway.infinite-llm", expired=True), authority.pem)
            with pytest.raises(UnavailableError):
                await etcd.get("key", timeout_s=3.0)
            own.put(authority.issue("gateway.infinite-llm"), authority.pem)
            assert await etcd.get("key") is None
        finally:
            await etcd.close()

    try:
        asyncio.run(scenario())
    finally:
        process.kill()
