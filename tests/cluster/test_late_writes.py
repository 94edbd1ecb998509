"""A client that was stopped until its session was over, and then writes as if nothing had happened."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kvdaemon_client import DEADLINE_S, GEOMETRY, ClientProcess, KvDaemonProcess, wait_for
from torch import Tensor

from kernels import AttentionPlan, LayerParams, empty_partial
from kernels.reference import ReferenceKernels
from services.core.blocks import BlockHandle
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import PeerShare, RemoteAttention
from services.dataplane.shm import ShmTransport
from services.dataplane.transport import Limits
from services.dataplane.wire import PlanSegment
from services.rmanager.daemon_client import DaemonSession

pytestmark = pytest.mark.cluster
BLOCKS = 64  # all of the pool


@pytest.fixture
def daemon(tmp_path: Path, etcd_endpoint: str) -> Iterator[KvDaemonProcess]:
    daemon = KvDaemonProcess(tmp_path, etcd_endpoint)
    daemon.start()
    yield daemon
    daemon.close()


def test_late_writes_reach_no_block_that_others_hold(daemon: KvDaemonProcess) -> None:
    late = ClientProcess(daemon.address, "late", "late")
    try:
        late.wait_line("ready")
        late.signal(signal.SIGSTOP)
        wait_for("its session ends", lambda: daemon.pool().sessions == 0)
        asyncio.run(hold_everything(daemon, late))
    finally:
        late.close()


async def hold_everything(daemon: KvDaemonProcess, late: ClientProcess) -> None:
    """Fills every block of the pool, lets the late client write, and looks at what stands in the blocks."""
    session = DaemonSession(
        "kv-0",
        daemon.address,
        instance_id="holder",
        epoch=time.time_ns(),
        geometry=GEOMETRY,
        mapped=False,
        on_lost=lambda _, reason: pytest.fail(reason),
    )
    opened = await session.open()
    handles = await session.reserve(BLOCKS, BLOCKS)
    peers = PeerSet(ShmTransport(), Limits(1 << 20, 1 << 22), query_room=1 << 16)
    peers.connect("kv-0", opened.offers.addresses[0], opened.session_id)
    contents = torch.randn(BLOCKS, *GEOMETRY.block_shape, generator=torch.Generator().manual_seed(1))
    await asyncio.to_thread(write, peers, handles, contents)  # the session's pings go on meanwhile

    late.signal(signal.SIGCONT)
    await asyncio.to_thread(late.wait_line, "harmless")
    await asyncio.to_thread(compare, peers, handles, contents)
    assert not daemon.pool().violations
    assert daemon.log().count("SESSION_REVOKED") >= 4, "all of its connections were refused by name"
    peers.close()
    await session.close()


def write(peers: PeerSet, handles: list[BlockHandle], contents: Tensor) -> None:
    for tag, (handle, content) in enumerate(zip(handles, contents, strict=True)):
        key = handle.block.to_bytes(16, "little")
        peers.write_block("kv-0", tag, handle, key, content.view(-1).view(torch.uint8).numpy().data)
    sealed: dict[int, BlockHandle] = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(sealed) < len(handles):
        assert time.monotonic() < deadline
        peers.poll(0.1)
        assert not peers.take_lost()
        sealed.update({answer.tag: answer.handle for answer in peers.take_sealed()})
    assert list(map(sealed.get, range(len(handles)))) == handles


def compare(peers: PeerSet, handles: list[BlockHandle], contents: Tensor) -> None:
    """One query for each block, so that nothing that stands in it can hide behind the others."""
    remote = RemoteAttention(peers, ReferenceKernels(), "float32", timeout_s=DEADLINE_S)
    kernels = ReferenceKernels()
    last = GEOMETRY.block_tokens - 1
    for step, handle in enumerate(handles):
        rows = np.array([(handle.block, handle.generation, 0)], np.uint32)
        remote.begin_step(step, [PeerShare("kv-0", torch.arange(1), [PlanSegment(step, 1, last, 0, rows)], distance=0)])
        for layer in range(GEOMETRY.layers):
            q, params = torch.randn(1, 4, GEOMETRY.head_dim), LayerParams(layer, 0.2)
            out, lse = empty_partial(1, 4, GEOMETRY.head_dim)
            remote.submit(params, q)
            remote.collect(out, lse)
            expected_out, expected_lse = empty_partial(1, 4, GEOMETRY.head_dim)
            kernels.micro_attention(q, contents, one_block(step, last), params, expected_out, expected_lse)
            torch.testing.assert_close(out, expected_out)
            torch.testing.assert_close(lse, expected_lse)


def one_block(block: int, query_pos: int) -> AttentionPlan:
    ints = (torch.tensor(values, dtype=torch.int32) for values in ((0, 1), (query_pos,), (0, 1), (block,), (0,)))
    return AttentionPlan(*ints, 1)
