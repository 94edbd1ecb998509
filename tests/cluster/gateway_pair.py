"""Two real gateways over one real Redis, and a client of their server-sent events."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from etcd_process import EtcdProcess
from gateway_rig import Gateway, PlayedInstance, Script, gateway, service, until, write_checkpoint
from redis_process import RedisProcess

from services.runtime.etcd import EtcdClient

EVENTS = {"Accept": "text/event-stream"}  # brings their ids


@dataclass
class Stream:
    """Server-sent events as they came, until the connection broke or ended."""

    last_event_id: str = ""
    request_id: str = ""
    chunks: list[dict[str, object]] = field(default_factory=list)
    done: bool = False

    @property
    def choices(self) -> list[dict[str, object]]:
        return [choice for chunk in self.chunks for choice in chunk.get("choices", ())]

    @property
    def tokens(self) -> list[int]:
        return [token for choice in self.choices for token in choice.get("token_ids", ())]

    @property
    def text(self) -> str:
        return "".join(choice["text"] if "text" in choice else choice["delta"]["content"] for choice in self.choices)

    async def read(self, response: httpx.Response, stop_after: int | None = None) -> None:
        """Reads to the end, to the break of the connection, or so many events."""
        response.raise_for_status()
        self.request_id = response.headers["x-request-id"]
        try:
            async for line in response.aiter_lines():
                if line.startswith("id: "):
                    self.last_event_id = line.removeprefix("id: ")
                elif line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.chunks.append(json.loads(line.removeprefix("data: ")))
                elif stop_after is not None and not line and len(self.chunks) >= stop_after:
                    return
        except httpx.TransportError:
            return

    async def resume(self, at: Gateway, stop_after: int | None = None, **headers: str) -> int:
        """Goes on at a gateway; answers the status."""
        last = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
        async with (
            httpx.AsyncClient(timeout=20) as client,
            client.stream("GET", f"{at.http}/v1/streams/{self.request_id}", headers=last | headers) as response,
        ):
            if response.status_code == 200:
                await self.read(response, stop_after)
            return response.status_code


@dataclass(frozen=True)
class Pair:
    """Two gateways of one cluster."""

    first: Gateway
    second: Gateway
    redis: RedisProcess
    etcd: str

    @asynccontextmanager
    async def instance(self, **script: object) -> AsyncIterator[PlayedInstance]:
        """A played instance that both have connected to."""
        etcd = EtcdClient([self.etcd])
        played = PlayedInstance("instance-0", Script(**{"delay_s": 0.01, **script}))
        await played.start(etcd)
        try:
            async with httpx.AsyncClient(timeout=20) as client:
                for url in (self.first.http, self.second.http):

                    async def ready(url: str = url) -> bool:
                        return (await client.get(url + "/health")).status_code == 200

                    await until(ready, "the gateway is ready")
            yield played
        finally:
            await played.close()
            await etcd.close()

    async def begin(self, path: str, body: dict[str, object], stop_after: int | None = None, **headers: str) -> Stream:
        """A stream at the first gateway, until it ends or breaks."""
        stream = Stream()
        async with (
            httpx.AsyncClient(timeout=20) as client,
            client.stream("POST", self.first.http + path, json=body, headers=EVENTS | headers) as response,
        ):
            await stream.read(response, stop_after)
        return stream

    async def state(self, request_id: str) -> dict[bytes, bytes]:
        return self.redis.client().hgetall(f"infinite-llm:test:request:{request_id}")

    def journalled(self, request_id: str) -> int:
        """Tokens of it that the journal has."""
        return self.redis.client().strlen(f"infinite-llm:test:request:{request_id}:tokens") // 4


@contextmanager
def running_pair(root: Path, **config: object) -> Iterator[Pair]:
    etcd, redis = EtcdProcess(root), RedisProcess(root)
    etcd.start()
    (root / "second").mkdir()
    checkpoint = write_checkpoint(root / "tiny")
    config = {"redis_url": redis.url, **config}
    try:
        with (
            service("gmanager", root, listen="127.0.0.1:0", etcd=[etcd.endpoint]),
            gateway(root, etcd.endpoint, checkpoint, **config) as first,
            gateway(root / "second", etcd.endpoint, checkpoint, member_id="second", **config) as second,
        ):
            yield Pair(first, second, redis, etcd.endpoint)
    finally:
        redis.signal(signal.SIGCONT)
        redis.signal(signal.SIGKILL)
        etcd.kill()
