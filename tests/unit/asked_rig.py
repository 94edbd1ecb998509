"""Two real daemons, and an instance's side of asking them."""

from __future__ import annotations

import select
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from kvdaemon_rig import GEOMETRY, LIMITS, Rig, attend
from torch import Tensor

from kernels import LayerParams
from kernels.cpu import CpuKernels
from kernels.reference import ReferenceKernels
from services.dataplane.link import EmulatedConnection
from services.dataplane.peers import PeerSet
from services.dataplane.remote_attention import PeerShare, RemoteAttention
from services.dataplane.shm import ShmConnection
from services.dataplane.tcp_connection import TcpConnection
from services.dataplane.transport import Limits
from services.dataplane.wire import PlanSegment

HEADS, ROWS = 4, 3
Way = tuple[str, str | None]  # scheme and link


class Asked:
    """Two daemons, and what asks them: rows 0 and 2 of the first, rows 0 to 2 of the second.

    Where they offer shm and tcp, each is reached over another of these.
    """

    def __init__(
        self,
        way: Way,
        directory: Path,
        stack: ExitStack,
        limits: Limits = LIMITS,
        timeout_s: float = 20.0,
        dtype: str = "float32",
    ) -> None:
        scheme, link = way
        geometry = replace(GEOMETRY, dtype=dtype)
        self.rigs = [
            stack.enter_context(
                Rig(geometry=geometry, kernels=CpuKernels(1), name=name, scheme=scheme, link=link, directory=directory)
            )
            for name in ("a", "b")  # kernels of their own: one for each thread
        ]
        self.sessions = [rig.open() for rig in self.rigs]
        self.blocks = [rig.sealed(session, range(5)) for rig, session in zip(self.rigs, self.sessions, strict=True)]
        self.rows = [torch.tensor([0, 2]), torch.arange(ROWS)]
        self.peers = PeerSet(self.rigs[0].another_client(), limits, query_room=0)
        stack.callback(self.peers.close)
        addresses = (self.rigs[0].offers.addresses[0], self.rigs[1].offers.addresses[-1])
        for name, address, session in zip("ab", addresses, self.sessions, strict=True):
            self.peers.connect(name, address, session)
        self.by_python = 0
        self.remote = RemoteAttention(self.peers, CpuKernels(1), "float32", timeout_s)
        merge = self.remote._merge

        def counted(*args: object) -> object:
            answer = merge(*args)  # type: ignore[arg-type]
            self.by_python += answer is not None
            return answer

        self.remote._merge = counted  # type: ignore[method-assign, assignment]
        self.random = torch.Generator().manual_seed(1)
        self._planned = False

    def step(self, number: int, between: object = None) -> None:
        """One decode step of all layers; what comes of it is what the reference kernels merge."""
        shares = []
        for name, blocks, rows in zip("ab", self.blocks, self.rows, strict=True):
            entries = np.array([(h.block, h.generation, 8 * at) for at, h in enumerate(blocks)], np.uint32)
            known, new = (len(blocks), entries[:0]) if self._planned else (0, entries)
            segments = [PlanSegment(handle, 1, 50 + number, known, new) for handle in range(len(rows))]
            shares.append(PeerShare(name, rows, segments, 1))
        self._planned = True
        self.remote.begin_step(number, shares)
        for layer in range(GEOMETRY.layers):
            params = LayerParams(layer, 0.25, 47, 3.0)
            q, out = self._random(ROWS, 2 * HEADS, GEOMETRY.head_dim)[:, :HEADS], self._random(ROWS, HEADS, 16)
            lse = self._random(ROWS, HEADS)
            expected = self._expected(number, q, params, out.clone(), lse.clone())
            assert self.remote.submit(params, q)
            if callable(between):
                between()
            self.remote.collect(out, lse)
            torch.testing.assert_close(out, expected[0])
            torch.testing.assert_close(lse, expected[1])

    def until_all_have_come(self) -> None:
        deadline = time.monotonic() + 20
        for name in "ab":
            connection = self.peers.get(name).connection
            if isinstance(connection, EmulatedConnection):
                connection = connection.inner
            assert isinstance(connection, ShmConnection | TcpConnection)
            while not has_come(connection):
                assert time.monotonic() < deadline, "no answer"
                time.sleep(1e-4)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def _expected(self, step: int, q: Tensor, params: LayerParams, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        for rig, blocks, rows in zip(self.rigs, self.blocks, self.rows, strict=True):
            parts = [(1, 50 + step, [(handle, 8 * at) for at, handle in enumerate(blocks)]) for _ in rows]
            part = attend(rig.blocks(), q[rows], parts, params)
            ReferenceKernels().merge_partials(out, lse, *part, rows)
        return out, lse


def has_come(connection: ShmConnection | TcpConnection) -> bool:
    """Whether there is something to read."""
    if isinstance(connection, ShmConnection):
        return connection.reader.pending()
    return bool(select.select([connection.fd], [], [], 0)[0])
