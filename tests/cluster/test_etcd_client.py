"""The etcd client against a real etcd: keys, transactions, leases, watches, failures."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from etcd_process import EtcdProcess

from services.core.errors import ConfigError, UnavailableError
from services.runtime.etcd import Condition, Delete, EtcdClient, Put
from services.runtime.etcd_types import KeyValue
from services.runtime.lease import Lease
from services.runtime.tls import TlsConfig

DEADLINE_S = 60.0


@asynccontextmanager
async def client_of(*endpoints: str, timeout_s: float = 3.0, tls: TlsConfig | None = None) -> AsyncIterator[EtcdClient]:
    client = EtcdClient(endpoints, tls, timeout_s=timeout_s)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield client
    finally:
        await client.close()


async def eventually(check, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


class Watched:
    """Follows a prefix in the background and keeps every state seen."""

    def __init__(self, etcd: EtcdClient, prefix: str) -> None:
        self.states: list[dict[str, bytes]] = []
        self._task = asyncio.create_task(self._follow(etcd.watch(prefix)))

    async def _follow(self, states: AsyncIterator[Mapping[str, KeyValue]]) -> None:
        async for entries in states:
            self.states.append({key: entry.value for key, entry in entries.items()})

    async def until(self, state: dict[str, bytes]) -> None:
        await eventually(lambda: self._task.done() or (self.states and self.states[-1] == state), f"{state}")
        assert not self._task.done(), self._task.exception()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


def test_keys_and_transactions(etcd_process) -> None:
    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            assert await etcd.get("/a/x") is None
            await etcd.put("/a/x", b"1")
            await etcd.put("/a/y", b"2")
            await etcd.put("/b", b"3")
            listed = await etcd.range("/a/")
            assert [(entry.key, entry.value) for entry in listed.entries] == [("/a/x", b"1"), ("/a/y", b"2")]
            x = listed.entries[0]
            swapped = await etcd.transaction([Condition("/a/x", "mod", x.mod_revision)], [Put("/a/x", b"4")])
            assert swapped.succeeded
            assert swapped.revision > listed.revision
            again = await etcd.transaction([Condition("/a/x", "mod", x.mod_revision)], [Delete("/a/x")])
            assert not again.succeeded
            assert not (await etcd.transaction([Condition("/a/x", "create", 0)], [Put("/a/x", b"5")])).succeeded
            got = await etcd.get("/a/x")
            assert got is not None
            assert (got.value, got.create_revision) == (b"4", x.create_revision)
            assert await etcd.delete("/a/x")
            assert not await etcd.delete("/a/x")

    asyncio.run(scenario())


def test_leases(etcd_process) -> None:
    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            lease_id = await etcd.lease_grant(30)
            await etcd.put("/leased", b"", lease_id)
            assert await etcd.lease_keepalive(lease_id) == 30
            await etcd.lease_revoke(lease_id)
            assert await etcd.get("/leased") is None
            assert await etcd.lease_keepalive(lease_id) <= 0
            await etcd.lease_revoke(lease_id)
            with pytest.raises(UnavailableError, match="lease not found"):
                await etcd.put("/leased", b"", lease_id)
            # A kept lease outlives its TTL, and says so when somebody else has ended it.
            async with await Lease.grant(etcd, 1) as lease:
                await asyncio.sleep(2.5)
                assert not lease.lost.is_set()
                await etcd.lease_revoke(lease.lease_id)
                await lease.lost.wait()

    asyncio.run(scenario())


def test_watch_resumes_after_a_restart(etcd_process) -> None:
    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            await etcd.put("/w/a", b"1")
            watched = Watched(etcd, "/w/")
            await watched.until({"/w/a": b"1"})
            await etcd.put("/w/b", b"2")
            await etcd.put("/other", b"")
            await watched.until({"/w/a": b"1", "/w/b": b"2"})
            etcd_process.kill()
            etcd_process.start()
            async with client_of(etcd_process.endpoint) as other:
                await other.delete("/w/a")
                await other.put("/w/b", b"3")
            await watched.until({"/w/b": b"3"})
            await watched.stop()

    asyncio.run(scenario())


def test_watch_lists_again_after_compaction(etcd_process, caplog) -> None:
    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            await etcd.put("/w/a", b"1")
            watched = Watched(etcd, "/w/")
            await watched.until({"/w/a": b"1"})
            etcd_process.kill()
            # While the watch finds no etcd, the history that it would resume from goes.
            etcd_process.start(hidden=True)
            async with client_of(etcd_process.hidden_endpoint) as other:
                await other.delete("/w/a")
                revision = await other.put("/w/b", b"2")
                etcd_process.compact(etcd_process.hidden_endpoint, revision)
            etcd_process.kill()
            etcd_process.start()
            await watched.until({"/w/b": b"2"})
            await watched.stop()

    with caplog.at_level("INFO"):
        asyncio.run(scenario())
    assert "compacted up to" in str([record.__dict__ for record in caplog.records])
    assert "watch lists everything again" in caplog.text


def test_watch_lists_again_when_the_store_is_new(etcd_process) -> None:
    async def scenario() -> None:
        async with client_of(etcd_process.endpoint) as etcd:
            for value in (b"1", b"2", b"3"):
                await etcd.put("/w/a", value)
            watched = Watched(etcd, "/w/")
            await watched.until({"/w/a": b"3"})
            etcd_process.kill()
            (etcd_process.directory / "data").rename(etcd_process.directory / "old")
            etcd_process.start()
            await watched.until({})
            await watched.stop()

    asyncio.run(scenario())


def test_calls_to_a_stopped_etcd_time_out(etcd_process) -> None:
    async def scenario() -> None:
        async with client_of(etcd_process.endpoint, timeout_s=1.0) as etcd:
            before = await etcd.put("/a", b"1")
            lease_id = await etcd.lease_grant(30)
            late = etcd.transaction([Condition("/a", "mod", before)], [Put("/a", b"2")])
            etcd_process.pause()
            for call in (etcd.get("/a"), late, etcd.lease_keepalive(lease_id)):
                with pytest.raises(UnavailableError):
                    await call
            etcd_process.resume()
            # The write that timed out may have been applied, may be yet, or never is; of two swaps of one revision one
            # at the most succeeds, whichever comes first.
            deadline = time.monotonic() + 30
            while True:
                try:
                    swapped = await etcd.transaction([Condition("/a", "mod", before)], [Put("/a", b"3")])
                    got = await etcd.get("/a")
                    break
                except UnavailableError:
                    assert time.monotonic() < deadline
            assert got is not None
            if swapped.succeeded:
                assert got.value == b"3"
            else:
                assert got.value in (b"2", b"3"), "b'3' if a swap of this loop was applied after it had timed out"
                assert got.mod_revision > before

    asyncio.run(scenario())


def test_fails_over_to_another_endpoint(etcd_process) -> None:
    async def scenario() -> None:
        async with client_of("127.0.0.1:1", etcd_process.endpoint) as etcd:
            await etcd.put("/a", b"1")
            got = await etcd.get("/a")
            assert got is not None
            assert got.value == b"1"
        async with client_of("127.0.0.1:1", "127.0.0.1:2", timeout_s=1.0) as etcd:
            with pytest.raises(UnavailableError, match="is etcd running there"):
                await etcd.put("/a", b"1")
            with pytest.raises(UnavailableError, match=r"127\.0\.0\.1"):
                await etcd.get("/a")

    asyncio.run(scenario())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")
def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=etcd -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True, timeout=60)
    process = EtcdProcess(tmp_path, (f"--cert-file={cert}", f"--key-file={key}"), scheme="https")
    process.start()

    async def scenario() -> None:
        async with client_of(process.endpoint, tls=TlsConfig(cert)) as etcd:
            await etcd.put("/a", b"1")
            assert (await etcd.range("/a")).entries[0].value == b"1"
        async with client_of(process.endpoint, timeout_s=1.0) as plain:
            with pytest.raises(UnavailableError):
                await plain.put("/a", b"2")

    try:
        asyncio.run(scenario())
    finally:
        process.kill()


def test_tls_configuration_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cert and key go together"):
        TlsConfig(tmp_path / "ca.pem", cert=tmp_path / "cert.pem")
    with pytest.raises(ConfigError, match=r"ca\.pem cannot be read"):
        TlsConfig(tmp_path / "ca.pem").channel_credentials()
