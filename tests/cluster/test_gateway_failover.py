"""Instances that die, stop or hang in the middle of an answer: the client's stream goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from etcd_process import EtcdProcess
from gateway_rig import (
    Gateway,
    PlayedInstance,
    Script,
    expected_tokens,
    gateway,
    instance_process,
    service,
    until,
    write_checkpoint,
)
from signals import send_signal

from services.runtime.etcd import EtcdClient

pytestmark = pytest.mark.cluster

SEED = 11
BODY = {"prompt": [1, 2, 3], "seed": SEED, "temperature": 1, "stream": True, "return_token_ids": True}


@pytest.fixture
def gmanager(etcd_endpoint: str, tmp_path: Path) -> Iterator[object]:
    with service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_endpoint]) as process:
        yield process


@contextmanager
def running_gateway(directory: Path, etcd: str, **config: object) -> Iterator[Gateway]:
    config = {"stream_timeout_s": 1.0, "instance_wait_s": 20.0, **config}
    with gateway(directory, etcd, write_checkpoint(directory / "tiny"), **config) as running:
        yield running


@asynccontextmanager
async def instances(etcd_endpoint: str, *scripts: Script) -> AsyncIterator[list[PlayedInstance]]:
    etcd = EtcdClient([etcd_endpoint])
    played = [PlayedInstance(f"instance-{index}", script) for index, script in enumerate(scripts)]
    for one in played:
        await one.start(etcd)
    try:
        yield played
    finally:
        for one in played:
            await one.close()
        await etcd.close()


async def connected(client: httpx.AsyncClient, count: int) -> None:
    async def enough() -> bool:
        return (await client.get("/health")).json()["instances"] == count

    await until(enough, f"{count} instances are connected")


class Stream:
    """One streamed completion, read token by token."""

    def __init__(self, client: httpx.AsyncClient, body: dict[str, object]) -> None:
        self.tokens: list[int] = []
        self.error: dict[str, object] | None = None
        self.finish_reason: str | None = None
        self.task = asyncio.create_task(self._read(client, body))

    async def _read(self, client: httpx.AsyncClient, body: dict[str, object]) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self.error = event["error"]
                        continue
                    (choice,) = event["choices"]
                    self.tokens += choice["token_ids"]
                    self.finish_reason = choice["finish_reason"]

    async def reaches(self, count: int) -> None:
        await until(lambda: len(self.tokens) >= count or self.task.done(), f"{count} tokens have come")
        assert len(self.tokens) >= count

    async def ends(self) -> None:
        async with asyncio.timeout(40):
            await self.task


def test_the_least_loaded_instance_is_taken(etcd_endpoint: str, gmanager: object, tmp_path: Path) -> None:
    async def scenario() -> None:
        slow = Script(delay_s=0.05)
        async with (
            instances(etcd_endpoint, slow, slow) as played,
            httpx.AsyncClient(base_url=running.http, timeout=20) as client,
        ):
            await connected(client, 2)
            long = Stream(client, BODY | {"prompt": [1] * 50, "max_tokens": 40})
            await until(lambda: any(one.submitted for one in played), "the long one is placed")
            (busy,) = [one for one in played if one.submitted]
            (idle,) = [one for one in played if not one.submitted]
            short = [Stream(client, BODY | {"max_tokens": 10}) for _ in range(3)]
            await until(lambda: len(idle.submitted) == 3, "the short ones go to the other one")
            for stream in (long, *short):
                await stream.ends()
            assert len(busy.submitted) == 1

    with running_gateway(tmp_path, etcd_endpoint) as running:
        asyncio.run(scenario())


@pytest.mark.parametrize("how", ["dies", "is silent"])
def test_an_answer_goes_on_at_another_instance(etcd_endpoint: str, gmanager: object, tmp_path: Path, how: str) -> None:
    async def scenario() -> None:
        async with (
            instances(etcd_endpoint, Script(delay_s=0.03), Script(delay_s=0.03)) as played,
            httpx.AsyncClient(base_url=running.http, timeout=20) as client,
        ):
            await connected(client, 2)
            stream = Stream(client, BODY | {"max_tokens": 60})
            await stream.reaches(5)
            (first,) = [one for one in played if one.submitted]
            (second,) = [one for one in played if not one.submitted]
            if how == "dies":
                await first.die()
            else:
                first.script.silent = True
            await stream.ends()
            assert stream.tokens == expected_tokens(60, 1, SEED)
            assert stream.finish_reason == "length"
            (submit,) = second.submitted
            assert submit.request_id == first.submitted[0].request_id
            assert submit.prompt_tokens == 3
            assert list(submit.token_ids[3:]) == expected_tokens(len(submit.token_ids) - 3, 1, SEED)
            assert len(submit.token_ids) >= 3 + 5
            assert submit.max_tokens == 60
            assert submit.arrival_time == first.submitted[0].arrival_time
            first.script.silent = False  # so that it can be closed

    with running_gateway(tmp_path, etcd_endpoint) as running:
        asyncio.run(scenario())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_killed_or_stopped(etcd_endpoint: str, gmanager: object, tmp_path: Path, how: signal.Signals) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=running.http, timeout=20) as client:
            await connected(client, 1)
            stream = Stream(client, BODY | {"max_tokens": 40})
            await stream.reaches(3)
            send_signal(only.pid, how)
            # The answer waits for an instance to appear.
            with instance_process("instance-1", etcd_endpoint, delay_s=0.01):
                await stream.ends()
            assert stream.tokens == expected_tokens(40, 1, SEED)
            assert stream.error is None

    with (
        running_gateway(tmp_path, etcd_endpoint) as running,
        instance_process("instance-0", etcd_endpoint, delay_s=0.03) as only,
    ):
        asyncio.run(scenario())


def test_the_same_instance_comes_back(etcd_endpoint: str, gmanager: object, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            instances(etcd_endpoint, Script(delay_s=0.03)) as (first,),
            httpx.AsyncClient(base_url=running.http, timeout=20) as client,
        ):
            await connected(client, 1)
            stream = Stream(client, BODY | {"max_tokens": 40})
            await stream.reaches(3)
            # It hangs and goes on: the gateway has given up the old stream and opens another to the same address.
            first.script.silent = True
            await until(lambda: "request lost its instance" in running.log.read_text(), "the silence is noticed")
            first.script.silent = False
            await stream.ends()
            assert stream.tokens == expected_tokens(40, 1, SEED)
            assert len(first.submitted) == 2

    with running_gateway(tmp_path, etcd_endpoint) as running:
        asyncio.run(scenario())


def test_no_instance_comes_back(etcd_endpoint: str, gmanager: object, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            instances(etcd_endpoint, Script(delay_s=0.03)) as (only,),
            httpx.AsyncClient(base_url=running.http, timeout=20) as client,
        ):
            await connected(client, 1)
            stream = Stream(client, BODY | {"max_tokens": 40})
            await stream.reaches(3)
            await only.die()
            await stream.ends()
            assert stream.error is not None
            assert stream.error["code"] == "no_instance"
            assert stream.tokens == expected_tokens(len(stream.tokens), 1, SEED)

    with running_gateway(tmp_path, etcd_endpoint, instance_wait_s=1.0) as running:
        asyncio.run(scenario())


def test_a_request_that_ends_every_instance_fails(etcd_endpoint: str, gmanager: object, tmp_path: Path) -> None:
    async def scenario() -> None:
        refusing = Script(fail=("SHUTTING_DOWN", "ending"))
        async with (
            instances(etcd_endpoint, refusing, refusing) as played,
            httpx.AsyncClient(base_url=running.http, timeout=20) as client,
        ):
            await connected(client, 2)
            response = await client.post("/v1/completions", json=BODY)
            assert response.status_code == 503
            assert "3 instances in a row" in response.json()["error"]["message"]
            assert sorted(len(one.submitted) for one in played) == [1, 2]

    with running_gateway(tmp_path, etcd_endpoint, max_failovers=2) as running:
        asyncio.run(scenario())


def test_gmanager_and_etcd_away(etcd_process: EtcdProcess, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with (
            instances(etcd_process.endpoint, Script(delay_s=0.02)) as (played,),
            httpx.AsyncClient(base_url=running.http, timeout=20) as client,
        ):
            await connected(client, 1)
            running_stream = Stream(client, BODY | {"max_tokens": 100})
            await running_stream.reaches(3)
            os.kill(manager.pid, signal.SIGKILL)
            etcd_process.kill()
            new_stream = Stream(client, BODY | {"max_tokens": 10})
            for stream, count in ((new_stream, 10), (running_stream, 100)):
                await stream.ends()
                assert stream.tokens == expected_tokens(count, 1, SEED)
            assert (await client.get("/health")).status_code == 200
            # When both are back, a new instance is found.
            etcd_process.start()
            with service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_process.endpoint]):
                etcd = EtcdClient([etcd_process.endpoint])
                late = PlayedInstance("late", Script())
                await late.start(etcd)
                await connected(client, 2)
                await late.close()
                await etcd.close()
            assert len(played.submitted) == 2

    with (
        service("gmanager", tmp_path, listen="127.0.0.1:0", etcd=[etcd_process.endpoint]) as manager,
        running_gateway(tmp_path, etcd_process.endpoint) as running,
    ):
        asyncio.run(scenario())


def test_sigterm_ends_the_gateway_in_the_middle_of_a_stream(
    etcd_endpoint: str, gmanager: object, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with (
            instances(etcd_endpoint, Script(delay_s=0.05)),
            httpx.AsyncClient(base_url=running.http, timeout=20) as client,
        ):
            await connected(client, 1)
            stream = Stream(client, BODY | {"max_tokens": 5000})
            await stream.reaches(3)
            running.process.terminate()
            await asyncio.to_thread(running.process.wait, 20)
            assert running.process.returncode == 0, running.log.read_text()
            await asyncio.gather(stream.task, return_exceptions=True)
            assert stream.finish_reason is None

    with running_gateway(tmp_path, etcd_endpoint, shutdown_grace_s=1.0) as running:
        asyncio.run(scenario())
