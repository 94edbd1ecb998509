"""Queries that compiled code sends, and whose answers it merges: the same states, and the same distrust."""

from __future__ import annotations

import mmap
import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asked_rig import HEADS, ROWS, Asked, Way
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from kvdaemon_rig import GEOMETRY, LIMITS, WAYS, key
from ring_scribbler import RingScribbler
from stream_scribbler import StreamScribbler
from torch import Tensor

from kernels import LayerParams
from kernels.cpu import CpuKernels, find_library
from kernels.cpu.answering import Watched
from kernels.cpu.asking import CompiledAsker
from services.core.errors import PeerLostError, TransferTimeoutError
from services.dataplane import wire
from services.dataplane.shm_ring import RingLayout, RingReader, RingWriter
from services.dataplane.tcp_frames import FrameReader
from services.dataplane.transport import Limits, Message, ReleaseHook
from services.dataplane.wire import Header, Kind

pytestmark = pytest.mark.skipif(find_library() is None, reason="the CPU kernels are not built")
SMALL = Limits(max_message_bytes=4 << 10, window_bytes=16 << 10)  # its rings wrap every few messages


class _Ignore(ReleaseHook):
    def __call__(self, message: Message) -> None:
        """Who reads by hand frees by hand."""


IGNORE = _Ignore()


@pytest.fixture(params=[*WAYS, ("both", None), ("both", "25gbit,50us")], ids=str)
def way(request: pytest.FixtureRequest) -> Way:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_hardly_an_answer_passes_through_python(way: Way, tmp_path: Path, stack: ExitStack) -> None:
    asked = Asked(way, tmp_path, stack, SMALL)
    for number in range(100):
        asked.step(number, between=asked.until_all_have_come)
    if way[1] is None:
        assert asked.by_python <= 2, "the first layer's, while the daemons accept"
    else:  # what is not due yet when a look ends is Python's: on a busy machine, most of it
        assert asked.by_python < 2 * 100 * GEOMETRY.layers
    for traffic in asked.peers.traffic():
        rows = 2 if traffic.kvdaemon_id == "a" else ROWS
        assert traffic.answers == 100 * GEOMETRY.layers
        assert traffic.received_bytes == traffic.answers * (64 + rows * HEADS * (16 + 1) * 4)
        assert traffic.sent_bytes > traffic.answers * (64 + rows * HEADS * 16 * 4)
    assert {name: times.messages for name, times in asked.remote.answers.items()} == {"a": 2, "b": 2}
    assert asked.remote.merge_s > 0


def test_both_sides_sleep_and_wake_whatever_the_pauses(way: Way, tmp_path: Path, stack: ExitStack) -> None:
    """A doorbell that is missed costs a whole deadline."""
    asked, choose = Asked(way, tmp_path, stack, SMALL), random.Random(1)
    for number in range(200):
        if number % 3 == 0:
            asked.peers.poll(3e-3 * choose.random())
        asked.step(number, between=lambda: time.sleep(3e-3 * choose.random()))


def test_other_messages_come_in_between(way: Way, tmp_path: Path, stack: ExitStack) -> None:
    asked = Asked(way, tmp_path, stack)
    asked.step(0)
    taken = []
    for number in range(1, 5):
        (handle,) = asked.rigs[0].reserve(asked.sessions[0], 1)
        content = asked.rigs[0].random(*GEOMETRY.block_shape).numpy().data.cast("B")
        asked.peers.write_block("a", number, handle, key(50 + number), content)
        asked.step(number, between=lambda: time.sleep(2e-3))
        taken += asked.peers.take_sealed()
    assert [sealed.tag for sealed in taken] == [1, 2, 3, 4]


def test_a_step_that_was_given_up_leaves_no_answer_behind(way: Way, tmp_path: Path, stack: ExitStack) -> None:
    asked = Asked(way, tmp_path, stack)
    asked.step(0)

    def give_up() -> None:
        raise InterruptedError

    for number in range(1, 20):
        with pytest.raises(InterruptedError):
            asked.step(number, between=give_up)
        asked.step(100 + number)


def test_a_daemon_that_ends_the_session_is_a_lost_peer(way: Way, tmp_path: Path, stack: ExitStack) -> None:
    asked = Asked(way, tmp_path, stack)
    asked.step(0)
    asked.rigs[0].sessions.close(asked.sessions[0])

    def steps() -> None:
        for number in range(1, 100):
            asked.step(number)

    with pytest.raises(PeerLostError, match="kvdaemon a"):
        steps()


def test_a_daemon_that_does_not_answer_is_given_up(way: Way, tmp_path: Path, stack: ExitStack) -> None:
    asked = Asked(way, tmp_path, stack, timeout_s=0.3)
    asked.step(0)
    with asked.rigs[1].shared, pytest.raises(TransferTimeoutError, match="kvdaemon b"):  # nobody enters the ledger
        asked.step(1)


# A peer that writes anything anywhere.

ANSWER = Header(Kind.PARTIAL, step=1, rows=2, q_heads=HEADS, head_dim=16)


def asker_of_two_rows(seed: int) -> tuple[CompiledAsker, Tensor, object]:
    """What asks about rows 0 and 2 of three, the tensor in whose middle answers are merged (7 around it), and what must
    be kept meanwhile."""
    asker = CpuKernels(1).compiled_asker(torch.tensor([0, 2]), 3, 1, torch.float32)
    q = torch.randn(3, HEADS, 16, generator=torch.Generator().manual_seed(seed))
    margin, lse = torch.full((3, 3, HEADS, 16), 7.0), torch.zeros(3, HEADS)
    asker.set_query(q, LayerParams(0, 0.25))
    asker.set_target(margin[1], lse)
    return asker, margin, (q, lse)


@cases(150)
@given(st.integers(0, 1 << 30))
def test_garbage_in_shared_memory_leads_nowhere(seed: int) -> None:
    """Counters, lengths and answers are anything: nothing outside the queries' ring and two counters is written."""
    layout = RingLayout(Limits(2 << 10, 8 << 10), 0)
    memory = mmap.mmap(-1, layout.total_bytes + 4096)
    writer, reader = RingWriter(memory, layout, 0), RingReader(memory, layout, 1)
    outgoing, incoming = layout.data_at(0), layout.data_at(1)
    asker, margin, _kept = asker_of_two_rows(seed)
    channel = asker.channel
    channel.max_message, channel.fd = layout.limits.max_message_bytes, -1
    writer.bind(channel.out)
    reader.bind(channel.in_)
    peer = RingScribbler(random.Random(seed), memory, layout, 1, 2 * HEADS * 17 * 4)
    for sequence in range(1, 30):
        if not peer.act(replace(ANSWER, sequence=sequence).pack()):
            continue
        page, behind = bytes(memory[:outgoing]), bytes(memory[outgoing + layout.capacity : incoming])
        theirs = bytes(memory[incoming:])
        writer.lend(channel.out)
        asker.ask(sequence)
        writer.take_back(channel.out)
        reader.lend(channel.in_)
        ending = asker.take_answer(1e-6)
        reader.take_back(channel.in_)
        assert ending in (Watched.TAKEN, Watched.TIMEOUT, Watched.CHANGED, Watched.CONTENDED)
        changed = {at // 8 for at in range(len(page)) if page[at] != memory[at]}
        assert changed <= {0, 128 + 16}, "what it has published, and what it has read"
        assert behind == memory[outgoing + layout.capacity : incoming]
        assert theirs == memory[incoming:]
    assert (margin[0] == 7).all()
    assert (margin[2] == 7).all()


@cases(150)
@given(st.integers(0, 1 << 30))
def test_garbage_in_a_stream_leads_nowhere(seed: int) -> None:
    """Frames and answers are anything, and come in pieces: only what has been asked for is merged, and each end counts
    what it has freed as ever."""
    limits = Limits(2 << 10, 8 << 10)
    peer = StreamScribbler(random.Random(seed), limits, 2 * HEADS * 17 * 4)
    asker, margin, _kept = asker_of_two_rows(seed)
    peer.connection.ask_with(asker)
    around, charges = peer.margins(), 0
    for sequence in range(1, 30):
        if not peer.connection.ask(asker, sequence):
            break
        peer.act(replace(ANSWER, sequence=sequence).pack())
        if peer.connection.take_answer(asker):
            charges += asker.answer_bytes
        charges += peer.receive()
        if peer.lost:
            break
        assert peer.reader.freed == charges
        assert peer.margins() == around
    assert (margin[0] == 7).all()
    assert (margin[2] == 7).all()
    peer.close()


def test_what_a_full_socket_does_not_take_follows_later() -> None:
    limits, rows = Limits(64 << 10, 256 << 10), 200
    peer = StreamScribbler(random.Random(1), limits, 0)
    peer.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least, about 4 KiB
    q = torch.randn(rows, HEADS, 16)
    asker = CpuKernels(1).compiled_asker(None, rows, 1, torch.float32)
    asker.set_query(q, LayerParams(0, 0.25))
    peer.connection.ask_with(asker)
    reader, ours = FrameReader(limits), peer.connection
    for sequence in range(1, 20):
        assert ours.ask(asker, sequence) == 64 + q.numel() * 4
        assert ours.unsent, "it is larger than what the socket holds"
        assert ours.ask(asker, sequence + 1) == 0, "nothing overtakes it"
        while (message := reader.next(IGNORE)) is None:
            peer.read_into(reader)
            peer.transport.poll(0)
        header, payload = wire.unpack(message.data)
        assert (header.kind, header.sequence, header.rows) == (Kind.QUERY, sequence, rows)
        assert torch.equal(torch.frombuffer(payload, dtype=torch.float32).view(q.shape), q)
        reader.free(message)
        while ours.unsent:  # the padding
            peer.transport.poll(0)
    peer.close()


def test_rows_outside_the_batch_are_not_asked_about() -> None:
    layout = RingLayout(LIMITS, 0)
    memory = mmap.mmap(-1, layout.total_bytes)
    writer = RingWriter(memory, layout, 0)
    for rows in ([0, 3], [-1, 0]):
        asker = CpuKernels(1).compiled_asker(torch.tensor(rows), 3, 1, torch.float32)
        channel = asker.channel
        channel.max_message, channel.fd = LIMITS.max_message_bytes, -1
        writer.bind(channel.out)
        writer.lend(channel.out)
        asker.set_query(torch.zeros(3, HEADS, 16), LayerParams(0, 0.25))
        assert asker.ask(1) == 0
    with pytest.raises(ValueError, match="contiguous in the last two"):
        asker.set_query(torch.zeros(3, 16, HEADS).transpose(1, 2), LayerParams(0, 0.25))
