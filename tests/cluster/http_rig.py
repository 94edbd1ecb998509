"""A gateway's HTTP API under test, with a played instance behind it; the fixture is in conftest.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from etcd_process import EtcdProcess
from gateway_rig import Gateway, PlayedInstance, gateway, service, until, write_checkpoint

from services.runtime.etcd import EtcdClient


@dataclass(frozen=True)
class HttpRig:
    etcd: str
    gateway: Gateway
    bare: Gateway  # serves a checkpoint without a tokenizer


@contextmanager
def running_rig(root: Path) -> Iterator[HttpRig]:
    """Real etcd, gManager and gateways, below an empty directory."""
    etcd = EtcdProcess(root)
    etcd.start()
    (root / "bare").mkdir()
    try:
        with (
            service("gmanager", root, listen="127.0.0.1:0", etcd=[etcd.endpoint]),
            gateway(root, etcd.endpoint, write_checkpoint(root / "tiny"), max_queue=3, instance_wait_s=1.0) as full,
            gateway(
                root / "bare", etcd.endpoint, write_checkpoint(root / "no-words", tokenizer=False), member_id="bare"
            ) as bare,
        ):
            yield HttpRig(etcd.endpoint, full, bare)
    finally:
        etcd.kill()


@asynccontextmanager
async def instance(rig: HttpRig, **script: object) -> AsyncIterator[tuple[PlayedInstance, httpx.AsyncClient]]:
    """A played instance that the gateway has connected to, and a client of the gateway."""
    etcd = EtcdClient([rig.etcd])
    played = PlayedInstance("instance-0")
    for name, value in script.items():
        setattr(played.script, name, value)
    await played.start(etcd)
    async with httpx.AsyncClient(base_url=rig.gateway.http, timeout=20) as client:

        async def ready() -> bool:
            return (await client.get("/health")).status_code == 200

        try:
            await until(ready, "the gateway is ready")
            yield played, client
        finally:
            await played.close()
            await etcd.close()


def events(body: str) -> list[dict[str, object]]:
    parts = body.removesuffix("\n\n").split("\n\n")
    assert all(part.startswith("data: ") for part in parts)
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]
