"""A rank computes what it is ordered to, over connections of its own, and says how that ended.

Here it has the whole model, so that it needs no others; what is left of a step is what it is with several.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kvdaemon_rig import Rig
from small_llama import write_small_llama
from torch import Tensor

from kernels import AttentionPlan
from kernels.reference import ReferenceKernels
from services.core.blocks import BlockHandle
from services.dataplane.host_device import HostDevice
from services.dataplane.kv_pool import KvPool
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import PeerShare
from services.dataplane.transport import Limits
from services.dataplane.wire import PlanSegment, Role
from services.instance.assembly import ComputeParts
from services.instance.batch import Batch
from services.instance.dist_attention import DistAttention, StepTensors
from services.instance.model import Model, load_model
from services.instance.ranks.lockstep import LockstepRemoteAttention
from services.instance.ranks.orders import DaemonAddress, RankChannel, StepEnd, StepOrder
from services.instance.ranks.process import Rank

BLOCK, KNOWN = 16, 32  # two blocks of the sequence lie on the daemon, the next one is the rank's own
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("models") / "llama"
    write_small_llama(path, seed=1)
    return load_model(path, "float32", None)


class RankRig:
    """A rank, a daemon, and the leader's end of the channel between."""

    def __init__(self, model: Model, rig: Rig) -> None:
        self.rig = rig
        geometry = rig.geometry
        self.pool = KvPool(4 * geometry.block_bytes).as_tensor(geometry)
        peers = PeerSet(rig.another_client("rank"), Limits(1 << 20, 1 << 22), 1 << 16, Role.READER)
        remote = LockstepRemoteAttention(peers, ReferenceKernels(), "float32", DEADLINE_S)
        attention = DistAttention(ReferenceKernels(), self.pool, remote)
        attention.attach_to(model.module)
        self.rank = Rank(model, ComputeParts(peers, remote, attention), HostDevice())
        ours, theirs = socket.socketpair()
        self.leader, self.channel = RankChannel(ours.detach()), RankChannel(theirs.detach())

    def step(self, number: int, handle: int, blocks: list[BlockHandle], known: int, session: int | None) -> StepEnd:
        """One token at position KNOWN; ``session``: the leader's with the daemon, None: it has lost it."""
        one, none = torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1], dtype=torch.int32)
        here = torch.tensor([1], dtype=torch.int32)
        position = torch.tensor([KNOWN], dtype=torch.int32)
        local = StepTensors(here.long() * BLOCK, AttentionPlan(none, position, none, here, position, 1))
        new = [(block, generation, i * BLOCK) for i, (block, generation) in enumerate(blocks)]
        segment = PlanSegment(handle, 1, KNOWN, known, np.array(new, np.uint32).reshape(-1, 3))
        shares = (PeerShare("d", one, (segment,), 1),)
        daemons = () if session is None else (DaemonAddress("d", self.rig.address, session),)
        batch = Batch(one + 7, position.long(), local, shares, one, None)
        self.leader.send(StepOrder(number, batch, daemons, (("d", handle + 100),)))
        order = self.channel.receive(DEADLINE_S)
        assert isinstance(order, StepOrder)
        self.channel.send(self.rank.compute(order))
        end = self.leader.receive(DEADLINE_S)
        assert isinstance(end, StepEnd)
        assert end.step == number
        return end

    def keys(self) -> Tensor:
        """Of the last layer and the new token: they depend on the attention of all layers before."""
        return self.pool[1, -1, :, 0, 0].clone()


@pytest.fixture
def rank(model: Model) -> Iterator[RankRig]:
    with Rig(geometry=model.shape.geometry(BLOCK, "float32")) as rig:
        yield RankRig(model, rig)


def test_a_rank_follows_its_leader_from_session_to_session(rank: RankRig) -> None:
    rig = rank.rig
    session = rig.open()
    blocks = rig.sealed(session, [1, 2])
    content = rig.blocks()[[block.block for block in blocks]].clone()
    assert rank.step(1, 0, blocks, 0, session) == StepEnd(1, "", ())
    expected = rank.keys()
    assert rank.step(2, 0, [], 2, session) == StepEnd(2, "", ()), "the daemon knows the blocks by now"
    assert torch.equal(rank.keys(), expected)

    rig.sessions.close(session)
    end = rank.step(3, 0, [], 2, session)
    assert "kvdaemon d" in end.failure
    assert [(lost.kvdaemon_id, lost.session_id) for lost in end.lost] == [("d", session)]
    assert not torch.allclose(rank.keys(), expected), "computed to its end, without the daemon and for nothing"
    assert rank.step(4, 0, [], 2, session).failure, "the same session has no second connection"
    assert rank.step(5, 0, [], 2, None).failure

    session = rig.open(epoch=2)
    blocks = rig.sealed(session, [3, 4])
    rig.blocks()[[block.block for block in blocks]] = content
    assert rank.step(6, 1, blocks, 0, session) == StepEnd(6, "", ())
    torch.testing.assert_close(rank.keys(), expected)
    newer = rig.open(epoch=3)  # the leader knows it first
    blocks = rig.sealed(newer, [5, 6])
    rig.blocks()[[block.block for block in blocks]] = content
    end = rank.step(7, 2, blocks, 0, newer)
    assert end.failure == ""
    assert {lost.session_id for lost in end.lost} == {session}, "its own, older one"
    torch.testing.assert_close(rank.keys(), expected)
