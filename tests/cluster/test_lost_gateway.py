"""A launched cluster with a second gateway, which is killed in mid-stream: its streams go on at the first one."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import yaml
from cluster_process import Cluster
from gateway_rig import until
from test_serving import SMALL_ENGINE, prompt_of

from infinitellm import AsyncClient, Client, Tokens
from services.launcher.ports import free_ports

pytestmark = pytest.mark.cluster

PROMPT = prompt_of(300, seed=33)
TOKENS = 500
# No draw of its choices, with the model below, is within 1e-4 of another token: rounding decides none.
SAMPLING = {"temperature": 0.8, "seed": 30, "ignore_eos": True, "max_tokens": TOKENS}


@dataclass
class Gateway:
    """A further gateway of a launched cluster."""

    http: str
    grpc: str
    process: subprocess.Popen[bytes]


@contextmanager
def further_gateway(cluster: Cluster, name: str) -> Iterator[Gateway]:
    """Configured as the launched one, but for its name and ports."""
    (launched,) = cluster.run_dir.rglob("gateway-0.yaml")
    http, grpc = (f"127.0.0.1:{port}" for port in free_ports(2))
    config = yaml.safe_load(launched.read_text()) | {"member_id": name, "http_listen": http, "grpc_listen": grpc}
    path = cluster.run_dir / f"{name}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    with (cluster.run_dir / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "services.gateway", "--config", str(path)], stderr=log)
    try:
        wait_until(lambda: healthy(http), f"{name} is ready", cluster)
        yield Gateway(f"http://{http}", grpc, process)
    finally:
        process.kill()
        process.wait(10)


def healthy(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], bool], what: str, cluster: Cluster) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}\n{cluster.logs()}"
        time.sleep(0.02)


@dataclass
class SseStream:
    """A client of server-sent events without any library for it: it keeps the last id, and goes on behind it."""

    choices: list[list[int]] = field(default_factory=lambda: [[]])
    last_event_id: str = ""
    request_id: str = ""
    done: bool = False

    @property
    def tokens(self) -> list[int]:
        """Of the first choice."""
        return self.choices[0]

    async def begin(self, gateway: str, body: dict[str, object]) -> None:
        events = {"Accept": "text/event-stream"}  # with their ids
        await self._read("POST", f"{gateway}/v1/completions", json=body, headers=events)

    async def resume(self, gateway: str) -> None:
        headers = {"Last-Event-ID": self.last_event_id}
        await self._read("GET", f"{gateway}/v1/streams/{self.request_id}", headers=headers)

    async def _read(self, method: str, url: str, **request: object) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            try:
                async with client.stream(method, url, **request) as response:
                    assert response.status_code == 200, await response.aread()
                    self.request_id = response.headers["x-request-id"]
                    async for line in response.aiter_lines():
                        self._take(line)
            except httpx.TransportError:
                return  # the gateway is gone

    def _take(self, line: str) -> None:
        name, _, value = line.partition(": ")
        if name == "id":
            self.last_event_id = value
        elif name == "data" and value == "[DONE]":
            self.done = True
        elif name == "data":
            (choice,) = json.loads(value)["choices"]
            self.choices[choice["index"]] += choice["token_ids"]


@pytest.fixture(scope="module")
def cluster(clear_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    arguments = ("--instances", "1", "--kvdaemons", "1", "--pool-mib", "4", "--dtype", "float32")
    with Cluster(clear_llama, tmp_path_factory.mktemp("run") / "c", *arguments, config=SMALL_ENGINE) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[int]:
    return cluster.complete(PROMPT, **SAMPLING).token_ids


def test_streams_of_a_killed_gateway_go_on(cluster: Cluster, undisturbed: list[int]) -> None:
    """At once: the SDK's, for threads and for asyncio, and raw server-sent events."""
    first = f"127.0.0.1:{cluster.grpc_port}"

    async def scenario() -> None:
        addresses = [lost.grpc, first]
        sse, with_threads, with_asyncio = SseStream(), [], []

        def stream() -> None:
            with Client(addresses) as client:
                for event in client.generate(PROMPT, **SAMPLING):
                    with_threads.append(event)

        async def stream_async() -> None:
            async with AsyncClient(addresses) as client:
                async for event in client.generate(PROMPT, **SAMPLING):
                    with_asyncio.append(event)

        body = {"prompt": PROMPT, "stream": True, "return_token_ids": True, **SAMPLING}
        raw = asyncio.create_task(sse.begin(lost.http, body))
        streams = [asyncio.create_task(asyncio.to_thread(stream)), asyncio.create_task(stream_async())]
        await until(lambda: min(len(sse.tokens), len(with_threads), len(with_asyncio)) >= 20, "all have tokens", 60)
        lost.process.kill()
        assert max(len(with_threads), len(with_asyncio)) < TOKENS
        async with asyncio.timeout(60):
            await raw
            assert 20 <= len(sse.tokens) < TOKENS
            assert not sse.done
            await sse.resume(f"http://127.0.0.1:{cluster.http_port}")
            for task in streams:
                await task
        assert sse.done
        assert sse.tokens == undisturbed
        for events in (with_threads, with_asyncio):
            assert [token for event in events if isinstance(event, Tokens) for token in event.ids] == undisturbed
            # Resumed, not begun anew: the request has kept its name.
            assert len({event.request_id for event in events}) == 1

    with further_gateway(cluster, "gateway-lost") as lost:
        asyncio.run(scenario())
    metrics = cluster.http.get("/metrics").text
    assert "infinite_llm_resumed_requests_total 3.0" in metrics


def test_all_choices_of_a_killed_gateways_stream_go_on(cluster: Cluster, undisturbed: list[int]) -> None:
    answer = cluster.request(PROMPT, n=3, **SAMPLING).json()
    expected = [choice["token_ids"] for choice in answer["choices"]]
    assert expected[0] == undisturbed

    async def scenario() -> None:
        sse = SseStream([[], [], []])
        body = {"prompt": PROMPT, "n": 3, "stream": True, "return_token_ids": True, **SAMPLING}
        raw = asyncio.create_task(sse.begin(lost.http, body))
        await until(lambda: min(map(len, sse.choices)) >= 20, "all choices have tokens", 60)
        lost.process.kill()
        await raw
        assert not sse.done
        assert max(map(len, sse.choices)) < TOKENS
        async with asyncio.timeout(60):
            await sse.resume(f"http://127.0.0.1:{cluster.http_port}")
        assert sse.done
        assert sse.choices == expected

    with further_gateway(cluster, "gateway-of-choices") as lost:
        asyncio.run(scenario())


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_redis_away_and_the_gateway_lost(cluster: Cluster, undisturbed: list[int], how: signal.Signals) -> None:
    """Running requests go on without Redis; a stream of the SDK even survives its gateway then."""
    tokens: list[int] = []
    steps = [(20, lambda: cluster.signal("redis", how)), (100, lambda: lost.process.kill())]
    with (
        further_gateway(cluster, f"gateway-{how.name.lower()}") as lost,
        Client([lost.grpc, f"127.0.0.1:{cluster.grpc_port}"]) as client,
    ):
        for event in client.generate(PROMPT, **SAMPLING):
            if isinstance(event, Tokens):
                tokens += event.ids
                while steps and len(tokens) >= steps[0][0]:
                    steps.pop(0)[1]()
    assert not steps
    assert tokens == undisturbed
    assert cluster.complete(PROMPT, **SAMPLING).token_ids == undisturbed
    if how == signal.SIGSTOP:
        cluster.signal("redis", signal.SIGCONT)
