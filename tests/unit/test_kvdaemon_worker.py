"""The kvdaemon's worker: what it answers, what it refuses, and what no client can do to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kvdaemon_rig import DEADLINE_S, GEOMETRY, LIMITS, Rig, attend, key, segment
from torch import Tensor

import kernels
from kernels import AttentionPlan, LayerParams
from kernels.reference import ReferenceKernels
from services.core.blocks import BlockHandle, HeadRange
from services.dataplane import wire
from services.dataplane.transport import Limits, Lost
from services.dataplane.wire import Header, Kind, PlanSegment, Role

BF16 = replace(GEOMETRY, dtype="bfloat16")


@pytest.fixture(params=["loopback", "shm", "tcp"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """Over shared memory and TCP with the best kernels, queries are answered in compiled code where that is built."""
    best = None if request.param == "loopback" else kernels.load("cpu")
    with Rig(kernels=best, scheme=request.param, directory=tmp_path) as rig:
        yield rig


def at(handles: list[BlockHandle], first: int = 0) -> list[tuple[BlockHandle, int]]:
    """Blocks one after another, from block number ``first`` of the sequence on."""
    return [(handle, (first + i) * GEOMETRY.block_tokens) for i, handle in enumerate(handles)]


# What it answers.


@pytest.mark.parametrize(("q_heads", "window", "softcap"), [(2, 0, 0.0), (6, 0, 0.0), (8, 10, 0.0), (4, 0, 5.0)])
def test_partials_are_those_of_the_kernel(rig: Rig, q_heads: int, window: int, softcap: float) -> None:
    session = rig.open()
    blocks = rig.sealed(session, range(5))
    segments = [
        (1, 23, at(blocks[:2])),  # a decoding sequence
        (5, 16, [*at(blocks[2:3]), *at(blocks[3:4], 2)]),  # a chunk of another; block 1 of it lies elsewhere
        (2, 40, at(blocks[4:], 1)),
    ]
    connection = rig.connect(session)
    rig.send_plan(connection, 3, *(segment(handle, *parts) for handle, parts in enumerate(segments)))
    for layer in range(GEOMETRY.layers):
        q = rig.random(8, q_heads, GEOMETRY.head_dim)
        rig.send_query(connection, q, sequence=9 + layer, step=3, layer=layer, window=window, softcap=softcap)
        header, out, lse = rig.partial(connection)
        assert (header.sequence, header.step, header.layer) == (9 + layer, 3, layer)
        expected = attend(rig.blocks(), q, segments, LayerParams(layer, 0.25, window, softcap))
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(lse, expected[1])


def test_each_connection_asks_for_its_own_range_of_heads(rig: Rig) -> None:
    """The ranks of a tensor-parallel model, side by side, have the answers of one that asks for all heads."""
    session = rig.open()
    blocks = rig.sealed(session, range(3))
    ranks = [
        rig.connect(session, role=role, kv_heads=HeadRange.of_rank(GEOMETRY.kv_heads, rank, 2))
        for rank, role in enumerate((Role.OWNER, Role.READER))
    ]
    for step in range(4):  # the later ones are answered in compiled code, where there is such
        q = rig.random(1, 6, GEOMETRY.head_dim)
        new, known = (at(blocks), 0) if step == 0 else ([], 3)
        for connection, part in zip(ranks, q.chunk(2, dim=1), strict=True):
            rig.send_plan(connection, step, segment(5, 1, 20 + step, new, known))
            rig.send_query(connection, part, step=step, layer=1)
        out, lse = (torch.cat(parts, 1) for parts in zip(*(rig.partial(c)[1:] for c in ranks), strict=True))
        expected = attend(rig.blocks(), q, [(1, 20 + step, at(blocks))], LayerParams(1, 0.25))
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize("heads", [(0, 3), (1, 1), (2, 3), (2, 1)])
def test_heads_that_blocks_do_not_have(rig: Rig, heads: tuple[int, int]) -> None:
    connection = rig.connect(rig.open(), role=Role.READER, kv_heads=HeadRange(*heads))
    assert f"KV heads {heads[0]} to {heads[1]} (half-open) of blocks that have 2" in rig.refusal(connection)


def test_query_heads_that_do_not_fit_the_range(rig: Rig) -> None:
    connection = rig.connect(rig.open("b"), kv_heads=HeadRange(0, 2))
    rig.send_plan(connection, 1, segment(0, 1, 5, []))
    rig.send_query(connection, rig.random(1, 3, GEOMETRY.head_dim), step=1)
    assert "3 query heads over 2 KV heads" in rig.refusal(connection)
    connection = rig.connect(rig.open("c"), kv_heads=HeadRange(1, 2))
    rig.send_plan(connection, 1, segment(0, 1, 5, []))
    rig.send_query(connection, rig.random(1, 3, GEOMETRY.head_dim), step=1)
    assert rig.partial(connection)[0].q_heads == 3


def test_compiled_kernels_and_bfloat16() -> None:
    with Rig(geometry=BF16, kernels=kernels.load("cpu")) as rig:
        session = rig.open()
        parts = (1, 30, at(rig.sealed(session, range(3))))
        q = rig.random(1, 4, BF16.head_dim)
        connection = rig.connect(session)
        rig.send_plan(connection, 1, segment(0, *parts))
        expected = attend(rig.blocks(), q, [parts], LayerParams(1, 0.25))
        for out_dtype in ("float32", "bfloat16"):
            rig.send_query(connection, q, step=1, layer=1, out_dtype=out_dtype)
            header, out, lse = rig.partial(connection)
            assert header.dtype == out_dtype
            torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(lse, expected[1], rtol=1e-3, atol=1e-3)


def test_segments_grow_and_are_forgotten(rig: Rig) -> None:
    session = rig.open()
    blocks = rig.sealed(session, range(4))
    connection = rig.connect(session)
    q = rig.random(1, 2, GEOMETRY.head_dim)

    def ask(step: int, known: int, new: list[tuple[BlockHandle, int]], total: int) -> None:
        rig.send_plan(connection, step, segment(7, 1, 50, new, known))
        rig.send_query(connection, q, step=step)
        _, out, lse = rig.partial(connection)
        expected = attend(rig.blocks(), q, [(1, 50, at(blocks[:total]))], LayerParams(0, 0.25))
        torch.testing.assert_close(out, expected[0])
        torch.testing.assert_close(lse, expected[1])

    ask(1, 0, at(blocks[:2]), 2)
    ask(2, 2, [], 2)
    ask(3, 2, at(blocks[2:], 2), 4)
    ask(4, 1, at(blocks[1:3], 1), 3)  # only the first is kept, and others follow it
    rig.send(connection, Header(Kind.FORGET, rows=2), (7).to_bytes(4, "little"), (999).to_bytes(4, "little"))
    ask(5, 0, at(blocks[:1]), 1)


def test_parts_without_a_visible_key_are_empty(rig: Rig) -> None:
    session = rig.open()
    connection = rig.connect(session)
    future = at(rig.sealed(session, [1]), 10)
    rig.send_plan(connection, 1, segment(0, 1, 0, future), segment(1, 2, 5, []), segment(2, 0, 5, []))
    rig.send_query(connection, rig.random(3, 2, GEOMETRY.head_dim), step=1)
    _, out, lse = rig.partial(connection)
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_plan_without_rows(rig: Rig) -> None:
    connection = rig.connect(rig.open())
    rig.send_plan(connection, 1)
    rig.send_query(connection, rig.random(0, 2, GEOMETRY.head_dim), step=1)
    header, out, lse = rig.partial(connection)
    assert (header.rows, out.numel(), lse.numel()) == (0, 0, 0)


def test_written_block_is_sealed_and_held(rig: Rig) -> None:
    session = rig.open()
    (handle,) = rig.reserve(session, 1)
    content = rig.random(*GEOMETRY.block_shape)
    connection = rig.connect(session)
    rig.send_block(connection, handle, 5, content, tag=77)
    header, _ = rig.receive(connection)
    assert (header.kind, header.sequence, header.step, header.block) == (Kind.BLOCK_SEALED, 7, 77, handle)
    torch.testing.assert_close(rig.blocks()[handle.block], content)
    with rig.shared as ledger:
        assert ledger.readable(session, handle)
        assert ledger.attach(session, [key(5)]) == [(0, handle)]


def test_written_block_of_known_content_adopts_the_earlier_one(rig: Rig) -> None:
    first, second = rig.open("a"), rig.open("b")
    (earlier,) = rig.sealed(first, [5])
    (handle,) = rig.reserve(second, 1)
    connection = rig.connect(second)
    rig.send_block(connection, handle, 5, rig.blocks()[earlier.block].clone(), tag=1)
    header, _ = rig.receive(connection)
    assert header.block == earlier
    with rig.shared as ledger:
        assert ledger.readable(second, earlier)
        assert (ledger.stats().in_use, ledger.stats().reserved) == (1, 0)
    rig.send_plan(connection, 1, segment(0, 1, 20, at([earlier])))
    q = rig.random(1, 2, GEOMETRY.head_dim)
    rig.send_query(connection, q, step=1)
    expected = attend(rig.blocks(), q, [(1, 20, at([earlier]))], LayerParams(0, 0.25))
    torch.testing.assert_close(rig.partial(connection)[1], expected[0])


# What it refuses.


def plan_of(rig: Rig, session: int) -> PlanSegment:
    return segment(0, 1, 20, at(rig.sealed(session, [1, 2])))


def test_stale_foreign_and_unsealed_blocks(rig: Rig) -> None:
    session, other = rig.open("a"), rig.open("b")
    (block,) = rig.sealed(session, [1])
    (foreign,) = rig.sealed(other, [2])
    (reserved,) = rig.reserve(session, 1)
    stale = BlockHandle(block.block, block.generation - 1)
    for bad in (stale, foreign, reserved, BlockHandle(12345, 1)):
        connection = rig.connect(session)
        rig.send_plan(connection, 1, segment(0, 1, 20, at([block, bad])))
        assert "STALE_GENERATION" in rig.refusal(connection)
    connection = rig.connect(session)
    rig.send_plan(connection, 1, segment(0, 1, 20, at([block])))
    rig.send_query(connection, rig.random(1, 2, GEOMETRY.head_dim), step=1)
    rig.partial(connection)


def test_released_block_is_stale_for_later_plans(rig: Rig) -> None:
    session = rig.open()
    (block,) = rig.sealed(session, [1])
    with rig.shared as ledger:
        ledger.release(session, [block])
    connection = rig.connect(session)
    rig.send_plan(connection, 1, segment(0, 1, 20, at([block])))
    assert "STALE_GENERATION" in rig.refusal(connection)


def test_plans_that_do_not_fit(rig: Rig) -> None:
    session = rig.open()
    first, second = rig.sealed(session, [1, 2])
    good = segment(0, 1, 20, [(first, 0)])
    cases = [
        ([segment(0, 1, 20, [(first, 0)], known=3)], "known"),
        ([good, segment(0, 1, 20, [(second, 8)], known=2)], "known"),
        ([segment(0, 1, 20, [(first, 8), (second, 8)])], "ascend"),
        ([good, segment(0, 1, 20, [(second, 0)], known=1)], "ascend"),
        ([segment(0, 1, 20, [(first, 1 << 31)])], "position"),
        ([segment(0, 5, (1 << 31) - 4, [(first, 0)])], "position"),
        ([segment(0, 1 << 31, 0, [(first, 0)])], "position"),
    ]
    for segments, reason in cases:
        connection = rig.connect(session)
        rig.send_plan(connection, 1, *segments)
        assert reason in rig.refusal(connection)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"step": 2}, "step"),
        ({"rows": 2}, "rows"),
        ({"layer": GEOMETRY.layers}, "layer"),
        ({"q_heads": 3}, "heads"),
        ({"q_heads": 0}, "heads"),
        ({"head_dim": 8}, "head_dim"),
        ({"dtype": "bfloat16"}, "dtypes"),
        ({"out_dtype": "float16"}, "dtypes"),
        ({"q_heads": 4}, "bytes"),
        ({"scale": float("nan")}, "finite"),
    ],
)
def test_queries_that_do_not_fit(rig: Rig, fields: dict[str, object], reason: str) -> None:
    session = rig.open()
    connection = rig.connect(session)
    rig.send_plan(connection, 1, plan_of(rig, session))
    rig.send_query(connection, rig.random(1, 2, GEOMETRY.head_dim), **{"step": 1, **fields})
    refusal = rig.refusal(connection)
    assert "INVALID_REQUEST" in refusal
    assert reason in refusal


def test_answer_that_is_too_long_for_the_peer(rig: Rig) -> None:
    session = rig.open()
    connection = rig.connect(session, Limits(8000, 16000))
    rig.send_plan(connection, 1, segment(0, 60, 20, at(rig.sealed(session, [1]))))
    rig.send_query(connection, rig.random(60, 2, GEOMETRY.head_dim), step=1)
    assert "longer than" in rig.refusal(connection)


def test_messages_out_of_place(rig: Rig) -> None:
    session = rig.open()
    cases: list[tuple[Header, list[bytes], str]] = [
        (Header(Kind.QUERY, rows=1, q_heads=2, head_dim=16), [bytes(128)], "before any PLAN"),
        (Header(Kind.PARTIAL), [], "PARTIAL"),
        (Header(Kind.PLAN, rows=3), [b"short"], "PLAN"),
        (Header(Kind.PLAN, rows=(1 << 32) - 1), [], "PLAN"),
        (Header(Kind.FORGET, rows=3), [b"short"], "FORGET"),
        (Header(Kind.WRITE_BLOCK), [b"short"], "WRITE_BLOCK"),
    ]
    for header, parts, reason in cases:
        connection = rig.connect(session)
        rig.send(connection, header, *parts)
        assert reason in rig.refusal(connection)
    for garbage in (b"", b"\xff" * 64, b"\x02\xff" + bytes(62)):
        connection = rig.connect(session)
        connection.send([garbage])
        assert "INVALID_REQUEST" in rig.refusal(connection)


def test_writes_to_blocks_that_are_not_the_sessions_own(rig: Rig) -> None:
    session, other = rig.open("a"), rig.open("b")
    (sealed,) = rig.sealed(session, [1])
    (foreign,) = rig.reserve(other, 1)
    content = rig.random(*GEOMETRY.block_shape)
    before = rig.blocks().clone()
    for bad in (sealed, foreign, BlockHandle(12345, 1)):
        connection = rig.connect(session)
        rig.send_block(connection, bad, 9, content, tag=1)
        assert "STALE_GENERATION" in rig.refusal(connection)
    torch.testing.assert_close(rig.blocks(), before)


def test_unknown_sessions(rig: Rig) -> None:
    rig.open()
    assert "SESSION_REVOKED" in rig.refusal(rig.connect(4711))
    connection = rig.transport.connect(rig.address, b"good day", LIMITS)
    rig._inbox[connection] = []
    assert "INVALID_REQUEST" in rig.refusal(connection)


# Sessions that end.


def test_end_of_a_session_ends_its_connections_only(rig: Rig) -> None:
    ended, going_on = rig.open("a"), rig.open("b")
    first, second, third = rig.connect(ended), rig.connect(ended), rig.connect(going_on)
    for connection in (first, second, third):  # all are accepted
        rig.send_plan(connection, 1)
        rig.send_query(connection, rig.random(0, 2, GEOMETRY.head_dim), step=1)
        rig.partial(connection)
    rig.open("a", epoch=2)
    assert "SESSION_REVOKED" in rig.refusal(first)
    assert "SESSION_REVOKED" in rig.refusal(second)
    rig.send_query(third, rig.random(0, 2, GEOMETRY.head_dim), step=1)
    rig.partial(third)


class Gate(ReferenceKernels):
    """Kernels that compute when they are told to, and fail when they are told to."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        self.fail = False

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        self.entered.set()
        assert self.go.wait(DEADLINE_S)
        if self.fail:
            raise RuntimeError("the kernel failed")
        super().micro_attention(q, pool, plan, params, out, lse)


def test_session_revoked_during_the_computation_gets_no_answer() -> None:
    gate = Gate()
    with Rig(kernels=gate) as rig:
        session = rig.open()
        connection = rig.connect(session)
        rig.send_plan(connection, 1, plan_of(rig, session))
        rig.send_query(connection, rig.random(1, 2, GEOMETRY.head_dim), step=1)
        assert gate.entered.wait(DEADLINE_S)
        other = rig.open("b")
        rig.sessions.close(session)
        assert len(rig.reserve(other, 16)) == 16, "its blocks are given away while the worker reads them"
        rig.blocks().fill_(1e3)
        gate.go.set()
        assert "SESSION_REVOKED" in rig.refusal(connection)


def test_failed_kernel_costs_one_connection() -> None:
    gate = Gate()
    gate.go.set()
    with Rig(kernels=gate) as rig:
        session = rig.open()
        plan = plan_of(rig, session)
        connection, other = rig.connect(session), rig.connect(session)
        gate.fail = True
        rig.send_plan(connection, 1, plan)
        rig.send_query(connection, rig.random(1, 2, GEOMETRY.head_dim), step=1)
        assert "RuntimeError" in rig.refusal(connection)
        gate.fail = False
        rig.send_plan(other, 1, plan)
        rig.send_query(other, rig.random(1, 2, GEOMETRY.head_dim), step=1)
        rig.partial(other)


def test_pool_is_formatted_anew(rig: Rig) -> None:
    session = rig.open()
    old = rig.connect(session)
    rig.send_plan(old, 1, segment(0, 1, 20, at(rig.sealed(session, [1]))))
    rig.send_query(old, rig.random(1, 2, GEOMETRY.head_dim), step=1)
    rig.partial(old)
    rig.sessions.close(session)
    rig.geometry = replace(GEOMETRY, layers=1, kv_heads=1, dtype="bfloat16")
    session = rig.open("b")
    assert "SESSION_REVOKED" in rig.refusal(old)
    parts = (1, 20, at(rig.sealed(session, [1, 2])))
    connection = rig.connect(session)
    rig.send_plan(connection, 1, segment(0, *parts))
    q = rig.random(1, 3, GEOMETRY.head_dim)
    rig.send_query(connection, q, step=1)
    expected = attend(rig.blocks(), q, [parts], LayerParams(0, 0.25))
    torch.testing.assert_close(rig.partial(connection)[1], expected[0])


def test_peer_that_takes_no_answers_does_not_stall_the_others(rig: Rig) -> None:
    session = rig.open()
    plan = plan_of(rig, session)
    q = rig.random(1, 2, GEOMETRY.head_dim)
    good = rig.connect(session)
    rig.send_plan(good, 1, plan)
    silent = rig.another_client()  # never polled: its answers pile up until its window is full
    connection = silent.connect(rig.address, wire.Hello(session).pack(), Limits(1024, 2048))
    rig.send_plan(connection, 1, plan)
    for _ in range(20):
        rig.send_query(connection, q, step=1)
        rig.send_query(good, q, step=1)
        rig.partial(good)
    deadline = time.monotonic() + DEADLINE_S
    while not any(isinstance(event, Lost) for event in silent.poll(0.1)):  # it has broken its promise of room
        assert time.monotonic() < deadline
    silent.close()
