import numpy as np
import pytest

from services.core.blocks import BLOCK_KEY_BYTES, BlockHandle, HeadRange
from services.core.errors import InvalidRequestError
from services.core.trace_context import TraceContext
from services.dataplane import wire
from services.dataplane.negotiation import Offers
from services.dataplane.wire import CopyOrder, Header, Hello, Kind, PlanSegment, Role, SegmentTrace


def test_a_header_survives_the_way():
    header = Header(
        Kind.QUERY,
        sequence=2**40,
        step=2**50,
        layer=79,
        rows=2048,
        block=BlockHandle(2**31, 2**32 - 1),
        q_heads=64,
        head_dim=128,
        dtype="bfloat16",
        out_dtype="float32",
        scale=0.125,
        softcap=50.0,
        window=4096,
    )
    packed = header.pack()
    assert len(packed) == wire.HEADER_BYTES
    assert wire.unpack(memoryview(packed + b"payload")) == (header, b"payload")


def test_traces_survive_the_way():
    traces = [SegmentTrace(7, TraceContext(1 << 127, 1)), SegmentTrace(2**32 - 1, TraceContext(2, (1 << 64) - 1))]
    packed = wire.pack_traces(traces)
    assert wire.unpack_traces(2, memoryview(packed)) == traces
    with pytest.raises(InvalidRequestError, match="TRACE of 3 segments holds 56 bytes"):
        wire.unpack_traces(3, memoryview(packed))


def test_a_plan_survives_the_way():
    segments = [
        PlanSegment(7, 3, 2_000_000, 5, np.array([[1, 2, 64], [3, 4, 128]], np.uint32)),
        PlanSegment(8, 1, 10, 0, np.empty((0, 3), np.uint32)),
        PlanSegment(9, 1, 70, 0, np.array([[6, 1, 0]], np.uint32)),
    ]
    read = wire.unpack_plan(3, memoryview(b"".join(wire.pack_plan(segments))))
    assert [segment[:4] for segment in read] == [segment[:4] for segment in segments]
    assert [segment.blocks.tolist() for segment in read] == [segment.blocks.tolist() for segment in segments]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        bytes(wire.HEADER_BYTES),
        b"\x01" + bytes(63),
        b"\x03\xff" + bytes(62),
        Header(Kind.QUERY).pack()[:36] + b"\x09" + bytes(27),
    ],
)
def test_garbage_is_refused(data: bytes):
    with pytest.raises(InvalidRequestError):
        wire.unpack(memoryview(data))


@pytest.mark.parametrize("cut", [1, 12, 25])
def test_a_plan_of_another_length_is_refused(cut: int):
    payload = b"".join(wire.pack_plan([PlanSegment(1, 1, 0, 0, np.array([[1, 1, 0]], np.uint32))]))
    with pytest.raises(InvalidRequestError):
        wire.unpack_plan(1, memoryview(payload[:-cut]))
    with pytest.raises(InvalidRequestError):
        wire.unpack_plan(1, memoryview(payload + b"x"))


def test_handles_hello_and_blocks():
    assert wire.unpack_handles(3, memoryview(wire.pack_handles([1, 2, 2**32 - 1]))) == [1, 2, 2**32 - 1]
    for hello in (Hello(2**63 + 1), Hello(5, Role.WRITER), Hello(6, Role.READER, HeadRange(8, 65535))):
        assert wire.unpack_hello(hello.pack()) == hello
    key, content = wire.split_block(memoryview(b"k" * BLOCK_KEY_BYTES + b"content"), 7)
    assert (key, content) == (b"k" * BLOCK_KEY_BYTES, b"content")
    with pytest.raises(InvalidRequestError):
        wire.split_block(memoryview(b"too short"), 7)
    for garbage in (b"\x01" + bytes(13), b"\x03\x07" + bytes(12), b"\x03" + bytes(9), b"\x03"):
        with pytest.raises(InvalidRequestError):
            wire.unpack_hello(garbage)


def test_a_copy_order_survives_the_way():
    offers = Offers(("shm:/a/b", "tcp:10.0.0.7:4711"), "boot/1/2")
    order = CopyOrder(bytes(range(16)), offers, 2**64 - 1, BlockHandle(2**32 - 1, 7))
    assert wire.unpack_copy(memoryview(order.pack())) == order
    for garbage in (order.pack()[:32], b"", order.pack() + b"\xff"):
        with pytest.raises(InvalidRequestError):
            wire.unpack_copy(memoryview(garbage))
