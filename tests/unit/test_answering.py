"""Queries that compiled code answers, from rings and streams: the same answers, and the same distrust."""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Iterator
from ctypes import c_uint64
from pathlib import Path

import pytest
import torch
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from kvdaemon_rig import GEOMETRY, WAYS, Rig, attend, segment
from ring_scribbler import RingScribbler
from stream_scribbler import StreamScribbler

import kernels
from kernels import AttentionPlan, LayerParams
from kernels.cpu import CpuKernels, find_library
from kernels.cpu.answering import CompiledQueries, ConnectionWatch
from services.core.blocks import BlockHandle
from services.dataplane.shm_ring import RingLayout, RingReader, RingWriter
from services.dataplane.transport import Limits
from services.dataplane.wire import Header, Kind

pytestmark = pytest.mark.skipif(find_library() is None, reason="the CPU kernels are not built")
SMALL = Limits(max_message_bytes=4 << 10, window_bytes=16 << 10)  # its rings wrap every few messages
PARAMS = LayerParams(0, 0.25)


class CountingRig(Rig):
    """Counts the queries that Python answers, but for the first layer's: they often come together with their plan."""

    by_python = 0

    def __init__(self, scheme: str, link: str | None, directory: Path) -> None:
        self.over_link = link is not None
        super().__init__(kernels=kernels.load("cpu"), scheme=scheme, link=link, directory=directory)
        query = self.worker._query

        def counted(client: object, header: Header, *args: object) -> None:
            self.by_python += header.layer > 0
            query(client, header, *args)  # type: ignore[arg-type]

        self.worker._query = counted  # type: ignore[method-assign]


@pytest.fixture(params=WAYS, ids=str)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CountingRig]:
    with CountingRig(*request.param, tmp_path) as rig:
        yield rig


def at(handles: list[BlockHandle]) -> list[tuple[BlockHandle, int]]:
    return [(handle, i * GEOMETRY.block_tokens) for i, handle in enumerate(handles)]


def decode(rig: CountingRig, connection: object, steps: range, blocks: list[BlockHandle], pause_s: float = 0) -> None:
    """Two sequences take steps; every answer is the reference's. ``pause_s``: before a query, at most."""
    choose = random.Random(1)
    for step in steps:
        new = [at(blocks[:3]), at(blocks[3:])] if step == 0 else [[], []]
        known = [0, 0] if step == 0 else [3, len(blocks) - 3]
        rig.send_plan(connection, step, *(segment(n, 1, 40 + step, entries, known[n]) for n, entries in enumerate(new)))
        parts = [(1, 40 + step, at(blocks[:3])), (1, 40 + step, at(blocks[3:]))]
        for layer in range(GEOMETRY.layers):
            q = rig.random(2, 4, GEOMETRY.head_dim)
            time.sleep(pause_s * choose.random())
            rig.send_query(connection, q, sequence=100 * step + layer, step=step, layer=layer, softcap=3.0, window=45)
            header, out, lse = rig.partial(connection)
            assert (header.sequence, header.step, header.layer) == (100 * step + layer, step, layer)
            expected = attend(rig.blocks(), q, parts, LayerParams(layer, 0.25, 45, 3.0))
            torch.testing.assert_close(out, expected[0])
            torch.testing.assert_close(lse, expected[1])


def test_after_the_first_step_python_answers_hardly_any(rig: CountingRig) -> None:
    session = rig.open()
    blocks = rig.sealed(session, range(5))
    connection = rig.connect(session, SMALL)
    decode(rig, connection, range(100), blocks)
    if rig.over_link:  # what is not due yet when a look ends is Python's: on a busy machine, most of it
        assert rig.by_python < 100 * (GEOMETRY.layers - 1), "layers that are counted"
    else:
        assert rig.by_python <= 10, "the first step's, as nobody knows the number of query heads then, and hardly any"
    decode(rig, connection, range(100, 101), blocks)  # after a round of the loop, all is counted
    assert rig.worker.hosting.queries >= 100 * GEOMETRY.layers
    (traffic,) = rig.worker.traffic.all()
    q_bytes, lse_bytes = 2 * 4 * GEOMETRY.head_dim * 4, 2 * 4 * 4
    assert traffic.sent_bytes >= 100 * GEOMETRY.layers * (64 + q_bytes + lse_bytes)
    assert traffic.received_bytes >= 100 * GEOMETRY.layers * (64 + q_bytes)


def test_both_sides_sleep_and_wake_whatever_the_pauses(rig: CountingRig) -> None:
    """A doorbell that is missed costs a whole deadline."""
    session = rig.open()
    blocks = rig.sealed(session, range(5))
    connection = rig.connect(session, SMALL)
    decode(rig, connection, range(400), blocks, pause_s=3e-3)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"step": 8}, "step 8"),
        ({"layer": 2}, "layer 2"),
        ({"q_heads": 3, "rows": 2}, "3 query heads"),
        ({"rows": 3}, "3 rows"),
        ({"head_dim": 8}, "head_dim 8"),
        ({"scale": float("nan")}, "finite"),
        ({"dtype": "bfloat16"}, "dtypes"),
    ],
)
def test_what_does_not_fit_is_refused_as_ever(rig: CountingRig, wrong: dict[str, object], reason: str) -> None:
    session = rig.open()
    blocks = rig.sealed(session, range(5))
    connection = rig.connect(session)
    decode(rig, connection, range(3), blocks)
    rig.send_query(connection, rig.random(2, 4, GEOMETRY.head_dim), **{"step": 2, **wrong})
    assert reason in rig.refusal(connection)


def test_a_session_that_has_ended_is_answered_no_more(rig: CountingRig) -> None:
    session, other = rig.open(), rig.open("b")
    blocks, others = rig.sealed(session, range(5)), rig.sealed(other, range(10, 15))
    connection, alive = rig.connect(session), rig.connect(other)
    decode(rig, connection, range(3), blocks)
    decode(rig, alive, range(3), others)
    with rig.shared as ledger:  # nobody tells the worker
        ledger.close_session(session)
    rig.send_query(connection, rig.random(2, 4, GEOMETRY.head_dim), step=2)
    assert "over" in rig.refusal(connection)
    decode(rig, alive, range(3, 6), others)


def test_other_messages_between_the_queries_keep_their_order(rig: CountingRig) -> None:
    session = rig.open()
    blocks = rig.sealed(session, range(5))
    connection = rig.connect(session)
    decode(rig, connection, range(2), blocks)
    (handle,) = rig.reserve(session, 1)
    q, content = rig.random(2, 4, GEOMETRY.head_dim), rig.random(*GEOMETRY.block_shape)
    rig.send_query(connection, q, sequence=1, step=1, layer=0)
    rig.send_block(connection, handle, 99, content, tag=1)
    rig.send_query(connection, q, sequence=8, step=1, layer=1)
    kinds = [rig.receive(connection)[0] for _ in range(3)]
    assert [(h.kind, h.sequence) for h in kinds] == [(Kind.PARTIAL, 1), (Kind.BLOCK_SEALED, 7), (Kind.PARTIAL, 8)]


# A peer that writes anything anywhere.


def compiled_queries(cpu: CpuKernels, pool: torch.Tensor, ended: c_uint64) -> CompiledQueries:
    """Queries of two rows over all blocks."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    plan = AttentionPlan(ints(0, 1, 2), ints(90, 90), ints(0, 2, 4), ints(0, 1, 2, 3), ints(0, 8, 0, 8), 1)
    queries = cpu.compiled_queries(pool, plan, 4, torch.float32)
    queries.allow(1, ended, 0)
    return queries


@cases(150)
@given(st.integers(0, 1 << 30))
def test_garbage_in_shared_memory_leads_nowhere(seed: int) -> None:
    """Counters, lengths and headers are anything: nothing outside the outgoing ring and two counters is written."""
    cpu = CpuKernels(1)
    pool = torch.randn(4, *GEOMETRY.block_shape, generator=torch.Generator().manual_seed(seed))
    before = pool.clone()
    ended = c_uint64(0)
    queries = compiled_queries(cpu, pool, ended)
    layout = RingLayout(Limits(2 << 10, 8 << 10), 0)
    memory = mmap.mmap(-1, layout.total_bytes + 4096)  # with a margin
    reader, writer = RingReader(memory, layout, 0), RingWriter(memory, layout, 1)
    queries.channel.max_message, queries.channel.fd = layout.limits.max_message_bytes, -1
    reader.bind(queries.channel.in_)
    writer.bind(queries.channel.out)
    incoming, outgoing = layout.data_at(0), layout.data_at(1)
    peer = RingScribbler(random.Random(seed), memory, layout, 0, 2 * 4 * GEOMETRY.head_dim * 4)
    header = Header(Kind.QUERY, step=1, rows=2, q_heads=4, head_dim=GEOMETRY.head_dim, scale=0.25)
    for _ in range(30):
        if not peer.act(header.pack()):
            continue
        kept = bytes(memory[:incoming]), bytes(memory[outgoing + layout.capacity :])
        if reader.held == 0:
            reader.lend(queries.channel.in_)
            writer.lend(queries.channel.out)
            ConnectionWatch([reader.published], -1).watch([reader.taken], [queries], 1e-6)
            reader.take_back(queries.channel.in_)
            writer.take_back(queries.channel.out)
        page, margin = kept
        changed = {at // 8 for at in range(len(page)) if page[at] != memory[at]}
        assert changed <= {16, 128}, "what it has read, and what it has published"
        assert margin == memory[outgoing + layout.capacity :]
    assert torch.equal(pool, before)


@cases(150)
@given(st.integers(0, 1 << 30))
def test_garbage_in_a_stream_leads_nowhere(seed: int) -> None:
    """Frames and headers are anything, and come in pieces: only queries of the plan are answered."""
    pool = torch.randn(4, *GEOMETRY.block_shape, generator=torch.Generator().manual_seed(seed))
    before = pool.clone()
    queries = compiled_queries(CpuKernels(1), pool, c_uint64(0))
    peer = StreamScribbler(random.Random(seed), Limits(2 << 10, 8 << 10), 2 * 4 * GEOMETRY.head_dim * 4)
    header = Header(Kind.QUERY, step=1, rows=2, q_heads=4, head_dim=GEOMETRY.head_dim, scale=0.25)
    peer.connection.answer_with(queries)
    around, charges = peer.margins(), 0
    for _ in range(30):
        peer.act(header.pack())
        answered = queries.answered
        charges += peer.receive()
        if peer.lost:
            break
        charges += (queries.answered - answered) * (64 + 2 * 4 * GEOMETRY.head_dim * 4)
        assert peer.reader.freed == charges
        assert peer.margins() == around
    assert torch.equal(pool, before)
    peer.close()
