"""The processes of ``python -m benchmarks.attention_parallelism``: a mesh, and a pool of which each uses its part."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.attention_methods import LIMITS, METHODS, Method
from benchmarks.decode_layer import BLOCK_TOKENS, GEOMETRY, fill_blocks, share_of
from benchmarks.pinned_process import PinnedProcess
from benchmarks.rank_mesh import Mesh
from services.dataplane.kv_pool import KvPool, pool_tensor
from services.dataplane.memfd import map_memfd
from services.dataplane.select import Scheme

_READY = "ready"


@dataclass(frozen=True, slots=True)
class _Load:
    """The next pool; its descriptor follows. ``pool_bytes`` 0: none, and the old one is given up."""

    pool_bytes: int


@dataclass(frozen=True, slots=True)
class _Work:
    method: str
    layers: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one rank, for one layer.

    Attributes:
        sent_bytes: messages' bytes.
        out: [HEADS * HEAD_DIM] the method's output, right on rank 0 alone.
    """

    layer_s: float
    sent_bytes: float
    out: list[float]


class Ranks:
    """Some processes, dealt out to the cores in turn; a context manager."""

    def __init__(self, count: int, cores: Sequence[int], scheme: Scheme, directory: Path) -> None:
        self._stack = ExitStack()
        self._processes = [
            PinnedProcess(cores[rank % len(cores)], _rank, rank, count, scheme, directory) for rank in range(count)
        ]

    def __enter__(self) -> Ranks:
        with ExitStack() as stack:
            for process in self._processes:
                stack.enter_context(process)
            addresses = [process.hear() for process in self._processes]
            self._tell_all(addresses)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def context(self, tokens: int) -> Iterator[None]:
        """Fills a pool with so many tokens' keys and values, for as long as the context manager lasts.

        Raises:
            ConfigError: there is not that much memory.
        """
        pool = KvPool(GEOMETRY.blocks_for(tokens) * GEOMETRY.block_bytes)
        try:
            for process in self._processes:
                process.tell(_Load(pool.pool_bytes))
                process.hand_over(pool.fd)
            for process in self._processes:
                process.hear()
            yield
            self._tell_all(_Load(0))
        finally:
            pool.close()

    def measure(self, method: str, layers: int) -> list[Measured]:
        """Computes one layer for all to begin together, and then so many; answers each rank's measurement."""
        for process in self._processes:
            process.tell(_Work(method, layers))
        return [process.hear() for process in self._processes]

    def _tell_all(self, command: object) -> None:
        for process in self._processes:
            process.tell(command)
        for process in self._processes:
            process.hear()


def _rank(pipe: Connection, rank: int, ranks: int, scheme: Scheme, directory: Path) -> None:
    torch.set_num_threads(1)
    mesh = Mesh(rank, scheme, directory)
    pipe.send(mesh.address)
    mesh.connect(pipe.recv(), LIMITS)
    pipe.send(_READY)
    methods: dict[str, Method] = {}
    while True:
        match pipe.recv():
            case _Load(pool_bytes=pool_bytes):
                methods.clear()
                if pool_bytes:
                    methods.update(_load(mesh, ranks, reduction.recv_handle(pipe), pool_bytes))
                pipe.send(_READY)
            case _Work(method=method, layers=layers):
                pipe.send(_measure(mesh, methods[method], layers))


def _load(mesh: Mesh, ranks: int, descriptor: int, pool_bytes: int) -> dict[str, Method]:
    """Maps the pool and fills this rank's share of it."""
    pool = pool_tensor(map_memfd(descriptor, pool_bytes), GEOMETRY)
    os.close(descriptor)
    fill_blocks(pool, share_of(len(pool), mesh.rank, ranks))
    return {name: method(mesh, ranks, pool) for name, method in METHODS.items()}


def _measure(mesh: Mesh, method: Method, layers: int) -> Measured:
    mesh.sent_bytes = 0
    method.layer()
    started = time.perf_counter()
    for _ in range(layers):
        method.layer()
    seconds = time.perf_counter() - started
    method.finish()
    return Measured(seconds / layers, mesh.sent_bytes / (layers + 1), method.out.flatten().tolist())


def kv_bytes(tokens: int) -> int:
    """Of one layer."""
    return tokens // BLOCK_TOKENS * GEOMETRY.block_bytes
