"""A kvdaemon's worker, ledger and pool in this process, and a client of its data plane."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels import AttentionKernels, AttentionPlan, LayerParams
from kernels.reference import ReferenceKernels
from services.core.blocks import BlockHandle, HeadRange, PoolGeometry
from services.dataplane import wire
from services.dataplane.composite import CompositeTransport
from services.dataplane.kv_pool import KvPool
from services.dataplane.link import EmulatedLink
from services.dataplane.link_spec import parse_link
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.negotiation import Offers, socket_identity
from services.dataplane.shm import ShmTransport
from services.dataplane.tcp import TcpTransport
from services.dataplane.transport import Accepted, Buffer, Connection, Limits, Lost, Received, Transport
from services.dataplane.wire import Header, Kind, PlanSegment, Role
from services.kvdaemon.hosted_traces import HostedTraces
from services.kvdaemon.pool_view import PoolView
from services.kvdaemon.sessions import Sessions, SharedLedger
from services.kvdaemon.worker import Worker
from services.rmanager.ledger import Ledger

GEOMETRY = PoolGeometry(layers=2, kv_heads=2, block_tokens=8, head_dim=16, dtype="float32")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LIMITS = Limits(max_message_bytes=1 << 20, window_bytes=1 << 22)
DEADLINE_S = 20.0
WAYS = (("shm", None), ("tcp", None), ("shm", "25gbit,50us"), ("tcp", "25gbit,50us"))  # schemes and links


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Rig:
    """Use as a context manager; ``failure`` is what ended the worker, if anything did. Daemons of one hub meet.

    ``scheme``: of the data plane, "shm", "tcp" or "both", in place of the loopback transport; ``link``: emulated
    over it.
    """

    def __init__(
        self,
        blocks: int = 16,
        geometry: PoolGeometry = GEOMETRY,
        kernels: AttentionKernels | None = None,
        hub: LoopbackHub | None = None,
        name: str = "daemon",
        scheme: str = "loopback",
        directory: Path | None = None,
        link: str | None = None,
        traces: HostedTraces | None = None,
    ):
        self.geometry = geometry
        self.pool = KvPool(blocks * geometry.block_bytes)
        self.shared = SharedLedger(Ledger(self.pool.pool_bytes, itertools.count(100).__next__))
        self.hub = hub or LoopbackHub()
        self._scheme, self._link = scheme, link
        server: Transport
        if scheme == "tcp":
            server = TcpTransport("127.0.0.1:0")
        elif scheme == "loopback":
            server = LoopbackTransport(self.hub, name)
        else:
            assert directory is not None, "for the socket"
            server = ShmTransport(directory / name)
            if scheme == "both":
                server = CompositeTransport([server, tcp := TcpTransport("127.0.0.1:0")])
        server = self._over_link(server)
        self.address = server.listen()
        addresses = (self.address, tcp.listen()) if scheme == "both" else (self.address,)
        self.offers = Offers(addresses, socket_identity(Path(self.address.partition(":")[2])))
        self.worker = Worker(server, self.shared, PoolView(self.pool, kernels or ReferenceKernels()), traces)
        self.sessions = Sessions(self.shared, self.worker.sessions_ended)
        self.transport = self.another_client("client")
        self.failure: BaseException | None = None
        self._inbox: dict[Connection, list[tuple[Header, bytes]]] = {}
        self._lost: set[Connection] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._random = torch.Generator().manual_seed(1)

    def __enter__(self) -> Rig:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.transport.close()
        assert self.failure is None, self.failure
        with self.shared as ledger:
            assert ledger.check_integrity() == []

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.failure = error

    def another_client(self, name: str = "another") -> Transport:
        if self._scheme == "loopback":
            return LoopbackTransport(self.hub, name)
        if self._scheme == "both":
            return self._over_link(CompositeTransport([ShmTransport(), TcpTransport()]))
        return self._over_link(TcpTransport() if self._scheme == "tcp" else ShmTransport())

    def _over_link(self, transport: Transport) -> Transport:
        return transport if self._link is None else EmulatedLink(transport, parse_link(self._link))

    # Control plane.

    def open(self, instance: str = "a", epoch: int = 1, geometry: PoolGeometry | None = None) -> int:
        return self.sessions.open(instance, epoch, geometry or self.geometry, False)[0].session_id

    def reserve(self, session: int, number: int, ttl_s: float = 0.0) -> list[BlockHandle]:
        with self.shared as ledger:
            return ledger.reserve(session, number, number, ttl_s=ttl_s)

    def sealed(self, session: int, keys: Sequence[int]) -> list[BlockHandle]:
        """Blocks of random content, sealed under these keys."""
        handles = self.reserve(session, len(keys))
        blocks = self.blocks()
        for handle in handles:
            blocks[handle.block] = self.random(*self.geometry.block_shape)
        with self.shared as ledger:
            return ledger.seal(session, handles, [key(number) for number in keys])

    def blocks(self) -> Tensor:
        return self.pool.as_tensor(self.geometry)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random).to(DTYPES[self.geometry.dtype])

    # Data plane.

    def connect(
        self, session: int, limits: Limits = LIMITS, role: Role = Role.OWNER, kv_heads: HeadRange | None = None
    ) -> Connection:
        connection = self.transport.connect(self.address, wire.Hello(session, role, kv_heads).pack(), limits)
        self._inbox[connection] = []
        return connection

    def send(self, connection: Connection, header: Header, *parts: Buffer) -> None:
        connection.send([header.pack(), *parts])

    def send_plan(self, connection: Connection, step: int, *segments: PlanSegment) -> None:
        self.send(connection, Header(Kind.PLAN, step=step, rows=len(segments)), *wire.pack_plan(segments))

    def send_query(self, connection: Connection, q: Tensor, **fields: object) -> None:
        """``fields``: of the header, where they are to differ from what fits."""
        values = {
            "rows": q.shape[0],
            "q_heads": q.shape[1],
            "head_dim": q.shape[2],
            "dtype": self.geometry.dtype,
            "scale": 0.25,
            **fields,
        }
        self.send(connection, Header(Kind.QUERY, **values), as_bytes(q))  # type: ignore[arg-type]

    def send_block(self, connection: Connection, handle: BlockHandle, number: int, content: Tensor, tag: int) -> None:
        header = Header(Kind.WRITE_BLOCK, sequence=7, step=tag, block=handle)
        self.send(connection, header, key(number), as_bytes(content))

    def receive(self, connection: Connection) -> tuple[Header, bytes]:
        """The next message of this connection."""
        deadline = time.monotonic() + DEADLINE_S
        while not self._inbox[connection]:
            assert time.monotonic() < deadline, "no answer"
            assert connection not in self._lost, "connection lost without a word"
            self._poll()
        return self._inbox[connection].pop(0)

    def refusal(self, connection: Connection) -> str:
        """The reason of the refusal that must come, and after it the end of the connection."""
        header, payload = self.receive(connection)
        assert header.kind is Kind.REFUSED, header
        deadline = time.monotonic() + DEADLINE_S
        while connection not in self._lost:
            assert time.monotonic() < deadline, "the connection was not ended"
            self._poll()
        return payload.decode()

    def partial(self, connection: Connection) -> tuple[Header, Tensor, Tensor]:
        """The next message, which must be a PARTIAL: out [rows, q_heads, head_dim] and lse [rows, q_heads]."""
        header, payload = self.receive(connection)
        assert header.kind is Kind.PARTIAL, payload
        shape = (header.rows, header.q_heads, header.head_dim)
        size = header.rows * header.q_heads * header.head_dim * DTYPES[header.dtype].itemsize
        out = torch.empty(shape, dtype=DTYPES[header.dtype])
        lse = torch.empty(shape[:2])
        as_bytes(out)[:] = payload[:size]
        as_bytes(lse)[:] = payload[size:]
        return header, out, lse

    def _poll(self) -> None:
        for event in self.transport.poll(0.1):
            match event:
                case Received(connection, message):
                    header, payload = wire.unpack(message.data)
                    self._inbox[connection].append((header, bytes(payload)))
                    message.release()
                case Lost(connection, _):
                    self._lost.add(connection)
                case Accepted():
                    raise AssertionError("nobody connects to the client")
                case _:
                    pass


def segment(
    handle: int,
    query_len: int,
    query_pos: int,
    blocks: Sequence[tuple[BlockHandle, int]],
    known: int = 0,
) -> PlanSegment:
    """``blocks``: new blocks with their positions."""
    rows = np.array([(h.block, h.generation, position) for h, position in blocks], np.uint32).reshape(-1, 3)
    return PlanSegment(handle, query_len, query_pos, known, rows)


def attend(
    pool: Tensor, q: Tensor, segments: Sequence[tuple[int, int, Sequence[tuple[BlockHandle, int]]]], params: LayerParams
) -> tuple[Tensor, Tensor]:
    """What the reference kernel answers for segments (query_len, query_pos, blocks with positions), float32."""

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    blocks = [entry for _, _, entries in segments for entry in entries]
    plan = AttentionPlan(
        ints([0, *itertools.accumulate(length for length, _, _ in segments)]),
        ints([position for _, position, _ in segments]),
        ints([0, *itertools.accumulate(len(entries) for _, _, entries in segments)]),
        ints([handle.block for handle, _ in blocks]),
        ints([position for _, position in blocks]),
        max(length for length, _, _ in segments),
    )
    out, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
    ReferenceKernels().micro_attention(q, pool, plan, params, out, lse)
    return out, lse


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's own memory; a tensor that is not contiguous is copied."""
    if not tensor.numel():
        return memoryview(bytearray())
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data
