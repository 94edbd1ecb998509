"""A real kvdaemon, and real clients of it as processes of their own that can be killed and stopped.

``python kvdaemon_client.py ADDRESS INSTANCE remote|mapped`` opens a session, uses it, prints ``ready``, keeps it open,
and prints ``lost: REASON`` when it ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import torch
from signals import send_signal
from torch import Tensor

from infinitellm.internal.v1 import kvdaemon_pb2 as pb
from infinitellm.internal.v1.kvdaemon_pb2_grpc import KvDaemonServiceStub
from kernels import AttentionPlan, LayerParams, empty_partial
from kernels.reference import ReferenceKernels
from services.core.blocks import PoolGeometry
from services.dataplane.peers import PeerSet
from services.dataplane.pool_socket import map_pool
from services.dataplane.remote_attention import PeerShare, RemoteAttention
from services.dataplane.shm import ShmTransport
from services.dataplane.transport import Limits
from services.dataplane.wire import PlanSegment
from services.rmanager.daemon_client import DaemonSession
from services.runtime.etcd import EtcdClient
from services.runtime.membership import Membership

GEOMETRY = PoolGeometry(layers=2, kv_heads=2, block_tokens=16, head_dim=32, dtype="float32")
SESSION_TIMEOUT_S = 2.0
DEADLINE_S = 30.0


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.05)


class KvDaemonProcess:
    """``python -m services.kvdaemon`` with a pool of 1 MiB (64 blocks); its address comes from etcd."""

    def __init__(self, directory: Path, etcd_endpoint: str, member_id: str = "kv-0") -> None:
        self.member_id = member_id
        self.directory = directory
        self._etcd = etcd_endpoint
        self._config = directory / f"{member_id}.yaml"
        config = {
            "cluster": "test",
            "member_id": member_id,
            "etcd": [etcd_endpoint],
            "pool_mib": 1,
            "socket_dir": str(directory),
            "session_timeout_s": SESSION_TIMEOUT_S,
        }
        self._config.write_text(json.dumps(config))  # JSON is YAML
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        with (self.directory / f"{self.member_id}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.kvdaemon", "--config", str(self._config)], stdout=log, stderr=log
            )
        found: list[str] = []

        def registered() -> bool:
            assert self.process.poll() is None, self.log()
            found.extend(self.registered_addresses())
            return bool(found)

        wait_for("the kvdaemon registers", registered)
        self.address = found[0]
        self._channel = grpc.insecure_channel(self.address)
        self._stub = KvDaemonServiceStub(self._channel)

    def registered_addresses(self) -> list[str]:
        async def look() -> list[str]:
            etcd = EtcdClient((self._etcd,))
            try:
                members = await Membership(etcd, "test").list("kvdaemon", 5.0)
                return [member.address for member in members.values() if member.member_id == self.member_id]
            finally:
                await etcd.close()

        return asyncio.run(look())

    def pool(self) -> pb.GetPoolResponse:
        """What the daemon says of its pool; the ledger must be sound at any time."""
        response = self._stub.GetPool(pb.GetPoolRequest(), timeout=10.0, wait_for_ready=True)
        assert not response.violations, response.violations
        return response

    def nobody_holds_anything(self) -> bool:
        pool = self.pool()
        return pool.sessions == 0 and pool.stats.free + pool.stats.cached == pool.stats.total

    def log(self) -> str:
        return (self.directory / f"{self.member_id}.log").read_text()

    def signal(self, signum: signal.Signals) -> None:
        send_signal(self.process.pid, signum)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._channel.close()


class ClientProcess:
    """One client; ``wait_line`` waits for what it prints."""

    def __init__(self, address: str, instance: str, kind: str) -> None:
        command = [sys.executable, __file__, address, instance, kind]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line.strip())

    def wait_line(self, beginning: str) -> str:
        def there() -> bool:
            assert self.process.poll() is None or any(line.startswith(beginning) for line in self._lines), self._lines
            return any(line.startswith(beginning) for line in self._lines)

        wait_for(f"the client prints {beginning!r}", there)
        return next(line for line in self._lines if line.startswith(beginning))

    def signal(self, signum: signal.Signals) -> None:
        send_signal(self.process.pid, signum)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)


# The client's own process.


async def run_client(address: str, instance: str, kind: str) -> None:
    lost = asyncio.Event()

    def on_lost(_: str, reason: str) -> None:
        print(f"lost: {reason}", flush=True)
        lost.set()

    session = DaemonSession(
        "kv-0",
        address,
        instance_id=instance,
        epoch=time.time_ns(),
        geometry=GEOMETRY,
        mapped=kind == "mapped",
        on_lost=on_lost,
    )
    await session.open()
    kept = await {"mapped": use_mapped, "remote": use_remote, "late": use_late}[kind](session)
    print("ready", flush=True)
    await lost.wait()
    await asyncio.Event().wait()  # a client that has lost its session may go on living
    del kept


async def use_mapped(session: DaemonSession) -> Tensor:
    """Leaves 3 workspace blocks and 1 sealed block, written in place; answers the mapping."""
    opened = session.opened
    pool = map_pool(Path(opened.pool_socket), opened.session_id, time.monotonic() + DEADLINE_S)
    handles = await session.reserve(4, 4, workspace=True)
    blocks = pool.as_tensor(GEOMETRY)
    for handle in handles:
        blocks[handle.block] = torch.randn(GEOMETRY.block_shape)
    assert await session.seal([(handles[0], os.urandom(16))]) == handles[:1]
    return blocks


async def use_remote(session: DaemonSession) -> PeerSet:
    """Leaves 2 sealed and 2 reserved blocks; what it queries agrees with the reference. Answers the data plane."""
    contents = torch.randn(2, *GEOMETRY.block_shape, generator=torch.Generator().manual_seed(7))
    handles = await session.reserve(4, 4, request_id="r")
    transport = ShmTransport()
    peers = PeerSet(transport, Limits(1 << 20, 1 << 22), query_room=1 << 16)
    peers.connect("kv-0", session.opened.offers.addresses[0], session.opened.session_id)
    for index in range(2):
        content: memoryview = contents[index].view(-1).view(torch.uint8).numpy().data
        peers.write_block("kv-0", index, handles[index], index.to_bytes(16, "little"), content)
    sealed = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(sealed) < 2:
        assert time.monotonic() < deadline
        peers.poll(0.1)
        assert not peers.take_lost()
        sealed.update({answer.tag: answer.handle for answer in peers.take_sealed()})

    remote = RemoteAttention(peers, ReferenceKernels(), "float32", timeout_s=DEADLINE_S)
    rows = [(sealed[index].block, sealed[index].generation, index * GEOMETRY.block_tokens) for index in range(2)]
    segment = PlanSegment(1, 3, 29, 0, np.array(rows, np.uint32))
    for step in range(2):
        remote.begin_step(step, [PeerShare("kv-0", torch.arange(3), [segment], distance=0)])
        segment = segment._replace(known=2, blocks=np.empty((0, 3), np.uint32))
        for layer in range(GEOMETRY.layers):
            q = torch.randn(3, 4, GEOMETRY.head_dim)
            params = LayerParams(layer, 0.2)
            out, lse = empty_partial(3, 4, GEOMETRY.head_dim)
            remote.submit(params, q)
            remote.collect(out, lse)
            expected_out, expected_lse = reference(q, contents, params)
            torch.testing.assert_close(out, expected_out)
            torch.testing.assert_close(lse, expected_lse)
    return peers


async def use_late(session: DaemonSession) -> threading.Thread:
    """Leaves 1 sealed and 3 reserved blocks, and a thread that writes into them when this process has been stopped."""
    handles = await session.reserve(4, 4)
    peers = PeerSet(ShmTransport(), Limits(1 << 20, 1 << 22), query_room=1 << 16)
    peers.connect("kv-0", session.opened.offers.addresses[0], session.opened.session_id)
    garbage = torch.full(GEOMETRY.block_shape, 100.0).view(-1).view(torch.uint8).numpy().data
    peers.write_block("kv-0", 0, handles[0], os.urandom(16), garbage)
    deadline = time.monotonic() + DEADLINE_S
    while not peers.take_sealed():
        assert time.monotonic() < deadline
        peers.poll(0.1)

    def write_when_continued() -> None:
        then = time.monotonic()
        while (now := time.monotonic()) - then < 1.0:
            then = now
            time.sleep(0.05)
        for tag, handle in enumerate(handles):  # by the connection it has, as in the middle of a step; then by new ones
            peers.write_block("kv-0", tag, handle, os.urandom(16), garbage)
            while not (lost := peers.take_lost()):
                peers.poll(0.1)
            assert not peers.take_sealed()
            print(f"refused: {lost[0].reason}", flush=True)
            peers.connect("kv-0", session.opened.offers.addresses[0], session.opened.session_id)
        print("harmless", flush=True)

    thread = threading.Thread(target=write_when_continued, daemon=True)
    thread.start()
    return thread


def reference(q: Tensor, contents: Tensor, params: LayerParams) -> tuple[Tensor, Tensor]:
    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    plan = AttentionPlan(ints(0, 3), ints(29), ints(0, 2), ints(0, 1), ints(0, GEOMETRY.block_tokens), 3)
    out, lse = empty_partial(*q.shape)
    ReferenceKernels().micro_attention(q, contents, plan, params, out, lse)
    return out, lse


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(run_client(*sys.argv[1:]))
