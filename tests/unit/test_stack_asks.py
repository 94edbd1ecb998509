"""Layers of a stack that ask other daemons in compiled code: the same answers as when Python asks for each layer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from asked_rig import HEADS, ROWS, Asked, Way
from kvdaemon_rig import GEOMETRY, WAYS, key
from own_products import has_own_products
from torch import Tensor

from kernels import AttentionPlan, LayerParams
from kernels.cpu import CpuKernels, find_library
from kernels.cpu.asking import CompiledAsker
from kernels.cpu.layer_ops import CpuLayerOps
from kernels.layer_ops import Activation, LayerParts
from kernels.layer_stack import LayerStack, StackedLayer
from services.core.errors import PeerLostError, TransferTimeoutError
from services.dataplane.peers import Peer
from services.dataplane.remote_attention import PeerShare
from services.dataplane.wire import PlanSegment
from services.instance.dist_attention import DistAttention, StepTensors

pytestmark = [
    pytest.mark.skipif(find_library() is None, reason="the CPU kernels are not built"),
    pytest.mark.skipif(not has_own_products(), reason="no compiled products for this processor"),
]
HIDDEN, INNER = 64, 128
WINDOW, FAR = 47, 60  # the first layer's; what daemon b has lies farther back, and only the second layer asks it


class Steps:
    """A stack of two layers over a local pool and two daemons."""

    def __init__(self, asked: Asked, dtype: torch.dtype = torch.float32) -> None:
        self.asked = asked
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(1)
        self.stack = self._stack()
        shape = (ROWS, GEOMETRY.layers, GEOMETRY.kv_heads, 2, GEOMETRY.block_tokens, GEOMETRY.head_dim)
        self.context = DistAttention(CpuKernels(1), torch.zeros(shape, dtype=dtype), asked.remote)
        self.left = 0
        self._planned = False
        finish = self.context._finish

        def counted(*args: object) -> Tensor:
            self.left += 1
            return finish(*args)  # type: ignore[arg-type]

        self.context._finish = counted  # type: ignore[method-assign, assignment]

    def step(self, number: int) -> None:
        """Once in compiled code, and once with every layer's attention left to Python."""
        x = self._random(1, ROWS, HIDDEN)
        got = self._through(x, 2 * number)
        askers = self.asked.remote.askers
        self.asked.remote.askers = lambda _q: None  # type: ignore[method-assign]
        left = self.left
        try:
            assert torch.equal(got, self._through(x, 2 * number + 1))
        finally:
            self.asked.remote.askers = askers  # type: ignore[method-assign]
        assert self.left == left + GEOMETRY.layers
        self.left = left

    def _through(self, x: Tensor, step: int) -> Tensor:
        shares = []
        for at, (name, blocks, rows) in enumerate(zip("ab", self.asked.blocks, self.asked.rows, strict=True)):
            entries = np.array([(h.block, h.generation, 8 * at) for at, h in enumerate(blocks)], np.uint32)
            known, new = (len(blocks), entries[:0]) if self._planned else (0, entries)
            segments = [PlanSegment(handle, 1, 45, known, new) for handle in range(len(rows))]
            shares.append(PeerShare(name, rows, segments, (1, FAR)[at]))
        self._planned = True
        self.asked.remote.begin_step(step, shares)
        ones = torch.arange(ROWS, dtype=torch.int32)
        starts = torch.arange(ROWS + 1, dtype=torch.int32)
        plan = AttentionPlan(starts, torch.full((ROWS,), 45, dtype=torch.int32), starts, ones, ones * 0 + 40, 1)
        self.context.begin_step(StepTensors(torch.arange(ROWS) * GEOMETRY.block_tokens + 5, plan))
        angles = [(None, None)] * GEOMETRY.layers
        output = self.context.through(self.stack, x, angles)
        assert output is not None
        assert self.context.calls % GEOMETRY.layers == 0
        times = self.context.times
        assert 0 < times.local_attention_s < times.attention_s
        assert times.send_s > 0
        return output

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def _stack(self) -> LayerStack:
        ops, layers = CpuLayerOps(), []
        heads = HEADS + 2 * GEOMETRY.kv_heads
        shapes = [(heads * 16, HIDDEN), (HIDDEN, HEADS * 16), (2 * INNER, HIDDEN), (HIDDEN, INNER)]
        for layer in range(GEOMETRY.layers):
            linears = [ops.linear(self._random(*shape) * 0.2, None) for shape in shapes]
            qkv, output, gate_up, down = linears
            norm = ops.norm(torch.ones(HIDDEN, dtype=self.dtype), 1e-5, 0.0)
            assert qkv is not None
            assert output is not None
            assert gate_up is not None
            assert down is not None
            parts = LayerParts(norm, qkv, None, output, None, norm, gate_up, Activation.SILU, down, None, 1.0)
            op = ops.layer(parts)
            assert op is not None
            layers.append(StackedLayer(op, LayerParams(layer, 0.25, (WINDOW, 0)[layer], 3.0)))
        stack = ops.stack(layers, HEADS, GEOMETRY.kv_heads)
        assert stack is not None
        return stack


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def steps(way: Way, tmp_path: Path) -> Iterator[Steps]:
    with ExitStack() as stack:
        yield Steps(Asked(way, tmp_path, stack))


def test_the_same_as_layer_by_layer(way: Way, steps: Steps) -> None:
    for number in range(100):
        steps.step(number)
    asked, layers = steps.asked, GEOMETRY.layers
    if way == ("shm", None):
        assert steps.left < 100 * layers, "every layer was left to Python"
    for traffic in asked.peers.traffic():  # daemon b is not asked by the first layer
        rows, messages = (2, 200 * layers) if traffic.kvdaemon_id == "a" else (ROWS, 200 * (layers - 1))
        assert traffic.answers == messages
        assert traffic.received_bytes == messages * (64 + rows * HEADS * (16 + 1) * 4)
        assert traffic.sent_bytes > messages * (64 + rows * HEADS * 16 * 4)
    assert {name: times.messages for name, times in asked.remote.answers.items()} == {"a": 2, "b": 1}
    assert asked.remote.merge_s > 0
    assert all(asked.peers.get(name)._bytes_out == 0 for name in "ab"), "every query has been answered"


@pytest.mark.skipif(not has_own_products(torch.bfloat16), reason="no such products for this processor")
def test_the_same_in_bfloat16(way: Way, tmp_path: Path) -> None:
    with ExitStack() as stack:
        steps = Steps(Asked(way, tmp_path, stack, dtype="bfloat16"), torch.bfloat16)
        for number in range(20):
            steps.step(number)


def test_answers_that_do_not_come_at_once_are_left_to_python(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledAsker, "wait_for", lambda asker, _spin_s: setattr(asker._asking, "spin_ns", 0))
    for number in range(50):
        steps.step(number)
    assert steps.left > 0, "no answer takes no time"
    assert all(steps.asked.peers.get(name)._bytes_out == 0 for name in "ab")


def test_a_query_that_cannot_be_sent_is_left_to_python(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    lend = Peer.lend

    def cramped(peer: Peer, asker: CompiledAsker, distance: int) -> bool:
        if peer.kvdaemon_id == "b":
            asker.channel.max_message = 8
        return lend(peer, asker, distance)

    monkeypatch.setattr(Peer, "lend", cramped)
    for number in range(20):
        steps.step(number)
    assert steps.left >= 20, "the second layer's"


def test_a_connection_that_cannot_be_lent(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    lend = Peer.lend
    monkeypatch.setattr(Peer, "lend", lambda peer, *how: peer.kvdaemon_id == "a" and lend(peer, *how))
    for number in range(5):
        steps.step(number)
    assert steps.left == 5 * GEOMETRY.layers


def test_other_messages_come_in_between(steps: Steps) -> None:
    asked, taken = steps.asked, []
    for number in range(10):
        (handle,) = asked.rigs[0].reserve(asked.sessions[0], 1)
        content = asked.rigs[0].random(*GEOMETRY.block_shape).numpy().data.cast("B")
        asked.peers.write_block("a", number, handle, key(50 + number), content)
        steps.step(number)
        asked.peers.poll(0)
        taken += asked.peers.take_sealed()
    deadline = time.monotonic() + 20
    while len(taken) < 10:
        assert time.monotonic() < deadline
        asked.peers.poll(0.1)
        taken += asked.peers.take_sealed()
    assert [sealed.tag for sealed in taken] == list(range(10))


def test_a_daemon_that_ends_the_session_is_a_lost_peer(steps: Steps) -> None:
    steps.step(0)
    steps.asked.rigs[0].sessions.close(steps.asked.sessions[0])

    def more() -> None:
        for number in range(1, 100):
            steps.step(number)

    with pytest.raises(PeerLostError, match="kvdaemon a"):
        more()


def test_a_daemon_that_stands_still_for_a_while(steps: Steps) -> None:
    steps.step(0)
    held = threading.Event()

    def stand_still() -> None:
        with steps.asked.rigs[1].shared:
            held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=stand_still)
    thread.start()
    held.wait()
    steps.step(1)
    thread.join()


def test_a_daemon_that_does_not_answer_is_given_up(way: Way, tmp_path: Path) -> None:
    with ExitStack() as stack:
        steps = Steps(Asked(way, tmp_path, stack, timeout_s=0.3))
        steps.step(0)
        with steps.asked.rigs[1].shared, pytest.raises(TransferTimeoutError, match="kvdaemon b"):
            steps.step(1)
