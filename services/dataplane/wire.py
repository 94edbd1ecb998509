"""The data plane's messages: a fixed 64-byte header, then raw bytes.

    instance -> daemon                            daemon -> instance
    PLAN         a step's segments                (no answer)
    QUERY        one layer's query rows           PARTIAL       out, then lse, of the same rows
    WRITE_BLOCK  key and contents of a block      BLOCK_SEALED  the block that holds that content now
    FORGET       segments that are gone           (no answer)
    TRACE        whose traces segments belong to  (no answer)
    COPY         a block to write elsewhere       COPIED        it has been written
                                                  COPY_FAILED   why it has not
                                                  REFUSED       why a message could not be served; ends the connection

    daemon -> daemon, on behalf of a session of the second
    FILL_BLOCK   contents of a block              BLOCK_FILLED  or REFUSED

**Rights.** A connection's hello names the session that it belongs to and its role. The OWNER is the session's instance.
A READER is another process of it, a rank of a tensor-parallel model: it may PLAN, QUERY and FORGET. A WRITER is another
daemon that an instance has told to COPY: it may send nothing but FILL_BLOCK, into blocks that the session has offered
(``Ledger.reserve`` with a time to live), each once. All rights end with the session.

**Heads.** The hello also says which of the blocks' KV heads the connection's queries are for, usually all. A block has
all heads, whoever asks; query head h of such a connection reads KV head ``first + h // (q_heads // (end - first))``.

A daemon serves a connection's messages in order and releases each before it answers. So an answer that echoes sequence
n says that the room of every message up to n is free again (``Peer`` counts on it). The answer to a COPY may come after
those to later messages.

**Segments.** A segment is what a daemon holds of one sequence: its sealed blocks there, by position. The daemon keeps
the list for as long as the connection lives; a PLAN keeps the first ``known`` blocks of it and appends new ones (a
daemon that knows fewer refuses). So a step's plan does not grow with the context, and a list stays ascending.

Integers are little-endian. Multi-byte tensors are sent as they lie in memory (all supported machines are so).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.core.blocks import BLOCK_KEY_BYTES, BlockHandle, HeadRange
from services.core.errors import InvalidRequestError
from services.core.trace_context import TraceContext
from services.dataplane.negotiation import Offers, unpack_offers

WIRE_VERSION = 3
HEADER_BYTES = 64
# version, kind, layer, rows, sequence, step, block, generation,
# q_heads, head_dim, dtype, out_dtype, scale, softcap, window
_HEADER = struct.Struct("<BBHIQQIIHHBBxxffI")
_NO_BLOCK = BlockHandle(0, 0)
_PAD = bytes(HEADER_BYTES - _HEADER.size)

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}


class Kind(IntEnum):
    PLAN = 1
    QUERY = 2
    PARTIAL = 3
    WRITE_BLOCK = 4
    BLOCK_SEALED = 5
    FORGET = 6
    REFUSED = 7
    COPY = 8
    COPIED = 9
    COPY_FAILED = 10
    FILL_BLOCK = 11
    BLOCK_FILLED = 12
    TRACE = 13


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed part of every message; fields that a kind does not use are 0.

    Attributes:
        sequence: number of the request within its connection; an answer echoes it.
        step: the sender's step, to recognise what belongs together.
        rows: query rows (QUERY, PARTIAL), segments (PLAN), handles (FORGET, TRACE).
        dtype: element type of q (QUERY) or of out (PARTIAL), by name.
        out_dtype: element type wanted for out (QUERY).
        scale, softcap, window: as ``kernels.LayerParams``.
    """

    kind: Kind
    sequence: int = 0
    step: int = 0
    layer: int = 0
    rows: int = 0
    block: BlockHandle = _NO_BLOCK
    q_heads: int = 0
    head_dim: int = 0
    dtype: str = "float32"
    out_dtype: str = "float32"
    scale: float = 0.0
    softcap: float = 0.0
    window: int = 0

    def pack(self) -> bytes:
        return (
            _HEADER.pack(
                WIRE_VERSION,
                self.kind,
                self.layer,
                self.rows,
                self.sequence,
                self.step,
                self.block.block,
                self.block.generation,
                self.q_heads,
                self.head_dim,
                DTYPE_CODES[self.dtype],
                DTYPE_CODES[self.out_dtype],
                self.scale,
                self.softcap,
                self.window,
            )
            + _PAD
        )


def unpack(data: memoryview) -> tuple[Header, memoryview]:
    """Splits a message into its header and payload.

    Raises:
        InvalidRequestError: the message is not of this protocol or version.
    """
    if len(data) < HEADER_BYTES:
        raise InvalidRequestError(f"data plane message of {len(data)} bytes is shorter than its header")
    fields = _HEADER.unpack_from(data)
    version, kind = fields[0], fields[1]
    if version != WIRE_VERSION:
        raise InvalidRequestError(f"data plane message of version {version}; this process speaks {WIRE_VERSION}")
    try:
        header = Header(
            kind=Kind(kind),
            layer=fields[2],
            rows=fields[3],
            sequence=fields[4],
            step=fields[5],
            block=BlockHandle(fields[6], fields[7]),
            q_heads=fields[8],
            head_dim=fields[9],
            dtype=DTYPE_NAMES[fields[10]],
            out_dtype=DTYPE_NAMES[fields[11]],
            scale=fields[12],
            softcap=fields[13],
            window=fields[14],
        )
    except (KeyError, ValueError) as error:
        raise InvalidRequestError(f"data plane message with an unknown code: {error}") from None
    return header, data[HEADER_BYTES:]


class PlanSegment(NamedTuple):
    """One segment of a PLAN.

    Attributes:
        handle: names the segment within its connection, chosen by the sender.
        query_len: query rows of this step; rows of all segments follow one another in the QUERY messages.
        query_pos: position of the first of them.
        known: the daemon keeps this many first blocks of what earlier plans sent (usually all) and drops the others.
        blocks: further blocks with the position of their first token, ascending: rows (block, generation, position).
    """

    handle: int
    query_len: int
    query_pos: int
    known: int
    blocks: NDArray[np.uint32]  # [n, 3]


_SEGMENT = struct.Struct("<IIIII")  # handle, query_len, query_pos, known, number of new blocks


def pack_plan(segments: Sequence[PlanSegment]) -> list[bytes]:
    """Payload of a PLAN: all segment records, then all their new blocks."""
    records = b"".join(_SEGMENT.pack(s.handle, s.query_len, s.query_pos, s.known, len(s.blocks)) for s in segments)
    return [records, *(np.ascontiguousarray(s.blocks, np.uint32).tobytes() for s in segments if len(s.blocks))]


def unpack_plan(rows: int, payload: memoryview) -> list[PlanSegment]:
    """Reads a PLAN of ``rows`` segments; the blocks are copies.

    Raises:
        InvalidRequestError: the payload is shorter or longer than its records say.
    """
    blocks_at = rows * _SEGMENT.size
    if len(payload) < blocks_at:
        raise InvalidRequestError(f"PLAN of {rows} segments holds only {len(payload)} bytes")
    records = [_SEGMENT.unpack_from(payload, i * _SEGMENT.size) for i in range(rows)]
    total = sum(record[4] for record in records)
    if len(payload) != blocks_at + total * 12:
        raise InvalidRequestError(f"PLAN with {total} new blocks holds {len(payload)} bytes")
    entries = np.frombuffer(payload, np.uint32, total * 3, blocks_at).reshape(total, 3).copy()
    segments: list[PlanSegment] = []
    at = 0
    for handle, query_len, query_pos, known, new in records:
        segments.append(PlanSegment(handle, query_len, query_pos, known, entries[at : at + new]))
        at += new
    return segments


def pack_handles(handles: Sequence[int]) -> bytes:
    """Payload of a FORGET."""
    return np.asarray(handles, np.uint32).tobytes()


def unpack_handles(rows: int, payload: memoryview) -> list[int]:
    """Reads a FORGET of ``rows`` handles."""
    if len(payload) != rows * 4:
        raise InvalidRequestError(f"FORGET of {rows} segments holds {len(payload)} bytes")
    return [int(handle) for handle in np.frombuffer(payload, np.uint32)]


class SegmentTrace(NamedTuple):
    """A segment whose request is traced. Sent once, before the first PLAN that names the segment."""

    handle: int
    trace: TraceContext


_TRACE = struct.Struct("<I16s8s")  # handle, trace id, span id, the ids as W3C has them: most significant byte first


def pack_traces(segments: Sequence[SegmentTrace]) -> bytes:
    """Payload of a TRACE."""
    return b"".join(
        _TRACE.pack(handle, trace.trace_id.to_bytes(16, "big"), trace.span_id.to_bytes(8, "big"))
        for handle, trace in segments
    )


def unpack_traces(rows: int, payload: memoryview) -> list[SegmentTrace]:
    """Reads a TRACE of ``rows`` segments."""
    if len(payload) != rows * _TRACE.size:
        raise InvalidRequestError(f"TRACE of {rows} segments holds {len(payload)} bytes")
    return [
        SegmentTrace(handle, TraceContext(int.from_bytes(trace_id, "big"), int.from_bytes(span_id, "big")))
        for handle, trace_id, span_id in _TRACE.iter_unpack(payload)
    ]


def split_block(payload: memoryview, block_bytes: int) -> tuple[bytes, memoryview]:
    """Key and contents of a WRITE_BLOCK."""
    if len(payload) != BLOCK_KEY_BYTES + block_bytes:
        raise InvalidRequestError(
            f"WRITE_BLOCK carries {len(payload)} bytes; a key and a block are {BLOCK_KEY_BYTES + block_bytes}"
        )
    return bytes(payload[:BLOCK_KEY_BYTES]), payload[BLOCK_KEY_BYTES:]


class CopyOrder(NamedTuple):
    """Payload of a COPY; its header names the block that is to be copied.

    Attributes:
        key: of the content; a daemon that has something else there does not copy it.
        offers: how the daemon to write to can be reached.
        session_id: the ordering instance's session there.
        target: the block to fill, which that session has offered.
    """

    key: bytes
    offers: Offers
    session_id: int
    target: BlockHandle

    def pack(self) -> bytes:
        return self.key + _COPY.pack(self.session_id, *self.target) + self.offers.pack().encode()


_COPY = struct.Struct("<QII")  # session id, block, generation; the key stands before, the offers behind
COPY_BYTES = BLOCK_KEY_BYTES + _COPY.size  # without the offers


def unpack_copy(payload: memoryview) -> CopyOrder:
    """
    Raises:
        InvalidRequestError: the payload is too short, or the offers are no text.
    """
    if len(payload) <= COPY_BYTES:
        raise InvalidRequestError(f"COPY holds only {len(payload)} bytes")
    session_id, block, generation = _COPY.unpack_from(payload, BLOCK_KEY_BYTES)
    try:
        offers = unpack_offers(bytes(payload[COPY_BYTES:]).decode())
    except UnicodeDecodeError:
        raise InvalidRequestError("COPY to addresses that are no text") from None
    return CopyOrder(bytes(payload[:BLOCK_KEY_BYTES]), offers, session_id, BlockHandle(block, generation))


class Role(IntEnum):
    """What a connection may do in the name of its session; see the module's docstring."""

    OWNER = 0
    WRITER = 1
    READER = 2


class Hello(NamedTuple):
    """What a connection to a daemon begins with.

    Attributes:
        session_id: the session it belongs to.
        role: what it may do in the session's name.
        kv_heads: that its queries are for; None: all.
    """

    session_id: int
    role: Role = Role.OWNER
    kv_heads: HeadRange | None = None

    def pack(self) -> bytes:
        return _HELLO.pack(WIRE_VERSION, self.role, *(self.kv_heads or _ALL_HEADS), self.session_id)


_HELLO = struct.Struct("<BBHHQ")  # version, role, first KV head, end of KV heads, session id
_ALL_HEADS = HeadRange(0, 0)


def unpack_hello(hello: bytes) -> Hello:
    """
    Raises:
        InvalidRequestError: it is not of this protocol or version.
    """
    if len(hello) != _HELLO.size or hello[0] != WIRE_VERSION:
        raise InvalidRequestError(f"data plane hello of {len(hello)} bytes is not of version {WIRE_VERSION}")
    _, role, first, end, session_id = _HELLO.unpack(hello)
    heads = HeadRange(first, end)
    try:
        return Hello(session_id, Role(role), None if heads == _ALL_HEADS else heads)
    except ValueError:
        raise InvalidRequestError(f"data plane hello with an unknown role {role}") from None
