"""The instance's side of DistAttention, where a daemon is lost between two steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.reference import ReferenceKernels
from services.core.blocks import BlockHandle
from services.core.errors import PeerLostError
from services.dataplane import wire
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import PeerShare, RemoteAttention
from services.dataplane.transport import Limits, Received
from services.dataplane.wire import Kind, PlanSegment


def test_a_daemon_that_takes_no_plan_does_not_keep_it_from_the_others() -> None:
    """The blocks that a plan names count as known from then on, so every daemon that is there must get it."""
    hub = LoopbackHub()
    daemons = {name: LoopbackTransport(hub, name) for name in ("a", "b")}
    peers = PeerSet(LoopbackTransport(hub, "instance"), Limits(1 << 12, 1 << 12), query_room=0)
    for number, (name, transport) in enumerate(daemons.items()):
        peers.connect(name, transport.listen(), number)
        transport.poll(0)
    peers.write_block("a", 1, BlockHandle(0, 1), bytes(16), bytes(3800))  # the window of "a" is full: its plan ends it
    remote = RemoteAttention(peers, ReferenceKernels(), "float32", timeout_s=1.0)
    blocks = np.array([(block, 1, 64 * block) for block in range(40)], np.uint32)
    shares = [PeerShare(name, torch.arange(1), [PlanSegment(1, 1, 4000, 0, blocks)], 0) for name in daemons]
    with pytest.raises(PeerLostError, match="kvdaemon a"):
        remote.begin_step(1, shares)
    kinds = [wire.unpack(e.message.data)[0].kind for e in daemons["b"].poll(0) if isinstance(e, Received)]
    assert kinds == [Kind.PLAN]
    peers.close()
