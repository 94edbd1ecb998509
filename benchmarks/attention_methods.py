"""Three ways in which some processes compute one decode attention layer together: what each rank does in a layer.

All use the same kernel, blocks and connections, and send outputs as bfloat16. The result lies on rank 0 as ``out``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from benchmarks.decode_layer import (
    GEOMETRY,
    HEAD_DIM,
    HEADS,
    Attention,
    bytes_of,
    make_query,
    share_of,
    tensor_of,
)
from benchmarks.rank_mesh import Mesh
from kernels.interface import empty_partial
from services.dataplane.transport import Limits

PIECE_BLOCKS = 1  # of keys and values that travel, in a message
_PIECES_AHEAD = 8  # sent and not used yet
_USED = b"used"
LIMITS = Limits(PIECE_BLOCKS * GEOMETRY.block_bytes, (_PIECES_AHEAD + 1) * PIECE_BLOCKS * GEOMETRY.block_bytes)


class Method(ABC):
    """One rank's part. All ranks call ``layer`` equally often, then ``finish``.

    Attributes:
        out: [1, HEADS, HEAD_DIM] float32, on rank 0 the layer's result.
    """

    def __init__(self, mesh: Mesh, ranks: int, pool: Tensor) -> None:
        self.mesh, self.ranks = mesh, ranks
        self.q = make_query()
        self.attention = Attention()
        self.out, self.lse = empty_partial(1, HEADS, HEAD_DIM)

    @abstractmethod
    def layer(self) -> None: ...

    def finish(self) -> None:  # noqa: B027
        """Takes in what layers have left on its way: nothing, but where a method says otherwise."""


class DistAttention(Method):
    """Tokens are divided. Rank 0 has the query: it travels to the others, and their partial states come back."""

    def __init__(self, mesh: Mesh, ranks: int, pool: Tensor) -> None:
        super().__init__(mesh, ranks, pool)
        own = share_of(len(pool), mesh.rank, ranks)
        self._blocks = pool[own.start : own.stop]
        self._part = torch.empty(1, HEADS, HEAD_DIM, dtype=torch.bfloat16)

    def layer(self) -> None:
        if self.mesh.rank == 0:
            self._ask()
        else:
            self._answer()

    def _ask(self) -> None:
        query = bytes_of(self.q)
        for rank in self.mesh.others:
            self.mesh.send(rank, [query])
        self.attention.attend(self.q, self._blocks, self.out, self.lse)
        for rank in self.mesh.others:
            answer = self.mesh.receive(rank)
            part = tensor_of(answer.data, torch.bfloat16, 1, HEADS, HEAD_DIM)
            lse = tensor_of(answer.data, torch.float32, 1, HEADS, offset=part.nbytes)
            self.attention.kernels.merge_partials(self.out, self.lse, part, lse)
            answer.release()

    def _answer(self) -> None:
        query = self.mesh.receive(0)
        q = tensor_of(query.data, torch.bfloat16, 1, HEADS, HEAD_DIM)
        self.attention.attend(q, self._blocks, self._part, self.lse)
        query.release()
        self.mesh.send(0, [bytes_of(self._part), bytes_of(self.lse)])


class TensorParallelism(Method):
    """Heads are divided. All ranks have the query, and all need all outputs before they go on, as in a real model."""

    def __init__(self, mesh: Mesh, ranks: int, pool: Tensor) -> None:
        super().__init__(mesh, ranks, pool)
        self._shares = [share_of(HEADS, rank, ranks) for rank in range(ranks)]
        own = self._shares[mesh.rank]
        self._own_q = self.q[:, own.start : own.stop].contiguous()
        self._own_out = torch.empty_like(self._own_q)
        self._own_lse = torch.empty(1, len(own))
        self._blocks = pool[:, :, own.start : own.stop]

    def layer(self) -> None:
        self.attention.attend(self._own_q, self._blocks, self._own_out, self._own_lse)
        own = bytes_of(self._own_out)
        for rank in self.mesh.others:
            self.mesh.send(rank, [own])
        self._put(self.mesh.rank, self._own_out)
        for rank in self.mesh.others:
            message = self.mesh.receive(rank)
            self._put(rank, tensor_of(message.data, torch.bfloat16, 1, len(self._shares[rank]), HEAD_DIM))
            message.release()

    def _put(self, rank: int, out: Tensor) -> None:
        heads = self._shares[rank]
        self.out[:, heads.start : heads.stop] = out


class RingAttention(Method):
    """Tokens are divided. Keys and values travel around the ring, piece by piece, to rank 0, which has the query.

    A piece is attended to where it was received. Each rank passes on what it has and then what comes from the next one,
    up to ``_PIECES_AHEAD`` ahead, of the next layer as well. What nobody has a query for does not travel: neither rank
    0's own pieces, nor anything beyond rank 0.
    """

    def __init__(self, mesh: Mesh, ranks: int, pool: Tensor) -> None:
        super().__init__(mesh, ranks, pool)
        own = share_of(len(pool), mesh.rank, ranks)
        starts = range(own.start, own.stop, PIECE_BLOCKS)
        self._pieces = [pool[start : min(start + PIECE_BLOCKS, own.stop)] for start in starts]
        self._next, self._previous = mesh.rank + 1, mesh.rank - 1
        self._coming = sum(
            -(-len(share_of(len(pool), rank, ranks)) // PIECE_BLOCKS) for rank in range(mesh.rank + 1, ranks)
        )
        self._ahead = 0
        self._part_out, self._part_lse = empty_partial(1, HEADS, HEAD_DIM)

    def layer(self) -> None:
        if self.mesh.rank == 0:
            self._attend_to_all()
        else:
            self._pass_on_all()

    def finish(self) -> None:
        while self._ahead:
            self.mesh.receive(self._previous).release()
            self._ahead -= 1

    def _attend_to_all(self) -> None:
        """What has come goes first; meanwhile its own."""
        self.out.zero_()
        self.lse.fill_(float("-inf"))
        own, coming = iter(self._pieces), self._coming
        piece = next(own, None)
        while piece is not None or coming:
            if coming:
                self.mesh.poll(0.0)
                message = self.mesh.take(self._next) if piece is not None else self.mesh.receive(self._next)
                if message is not None:
                    blocks = len(message.data) // GEOMETRY.block_bytes
                    self._attend_to(tensor_of(message.data, torch.bfloat16, blocks, *GEOMETRY.block_shape))
                    message.release()
                    self.mesh.send(self._next, [_USED])
                    coming -= 1
                    continue
            if piece is not None:
                self._attend_to(piece)
                piece = next(own, None)

    def _attend_to(self, piece: Tensor) -> None:
        self.attention.attend(self.q, piece, self._part_out, self._part_lse)
        self.attention.kernels.merge_partials(self.out, self.lse, self._part_out, self._part_lse)

    def _pass_on_all(self) -> None:
        for piece in self._pieces:
            self._pass_on(bytes_of(piece))
        for _ in range(self._coming):
            message = self.mesh.receive(self._next)
            self._pass_on(message.data)
            message.release()
            self.mesh.send(self._next, [_USED])

    def _pass_on(self, piece: bytes | bytearray | memoryview) -> None:
        self._ahead += 1
        self.mesh.send(self._previous, [piece])
        while (used := self.mesh.take(self._previous)) is not None:
            used.release()
            self._ahead -= 1
        if self._ahead == _PIECES_AHEAD:
            self.mesh.receive(self._previous).release()
            self._ahead -= 1


METHODS: dict[str, type[Method]] = {
    "DistAttention": DistAttention,
    "RingAttention": RingAttention,
    "tensor parallelism": TensorParallelism,
}
