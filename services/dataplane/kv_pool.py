"""The memory of a pool: one piece of rBlocks, mapped by its daemon and by the instance beside it.

A pool is bytes until a geometry cuts it into blocks. Any number of tensors may look at the same bytes, in any number of
processes; who may write which block is the ledger's business. In host memory a pool is a memfd (here); in a GPU's it is
one allocation of CUDA's (``cuda_pool``).
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final

import torch
from torch import Tensor

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError, PeerLostError
from services.dataplane.memfd import (
    Memory,
    create_huge_memfd,
    create_memfd,
    map_aligned,
    map_foreign_memfd,
    put_together,
)

# A tenth of a core that others want, all of one that nobody wants.
_LESS_URGENT = 10
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Pages(Enum):
    """Of what size a pool's pages are."""

    SMALL = "small"  # as the system gives them: of shared memory most give 4 KiB
    TOGETHER = "together"  # likewise, and the system is asked to put them together, in the background
    RESERVED = "reserved"  # huge ones that were reserved for those who ask for them


class MemoryKind(IntEnum):
    """Where a pool lies; part of the protocol between a daemon and the instance beside it."""

    HOST = 0
    CUDA = 1


@dataclass(frozen=True, slots=True)
class Grant:
    """What a daemon passes to a process so that it can map the pool.

    Attributes:
        descriptor: bytes that name the memory; of a memfd none.
        fds: file descriptors that go along; the receiver owns its own.
    """

    kind: MemoryKind
    pool_bytes: int
    descriptor: bytes = b""
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Mapping:
    """Another process's pool in this one.

    Attributes:
        memory: lives as long as any tensor that looks at the pool.
        content: [pool_bytes] uint8.
        unmap: to be called once ``memory`` is gone.
    """

    memory: object
    content: Tensor
    unmap: Callable[[], None]


class Pool(ABC):
    """A daemon's pool memory, allocated in full.

    Attributes:
        linger_s: how long after the end of a process its work on the memory may still be under way.
    """

    pool_bytes: int
    linger_s: float = 0.0

    @abstractmethod
    def grant(self) -> Grant:
        """For passing it on; good until ``close``."""

    @abstractmethod
    def as_tensor(self, geometry: PoolGeometry) -> Tensor:
        """The pool as blocks: ``[num_blocks, layers, kv_heads, 2, block_tokens, head_dim]`` of ``geometry.dtype``.

        Raises:
            ConfigError: the pool does not hold a single block.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives up the memory, which goes with the last tensor and the last process that looks at it. Idempotent."""


def _put_together_beside_others(memory: Memory) -> None:
    """``put_together`` for a thread of its own, which leaves the core to whoever serves meanwhile.

    Where the system has to make room it takes seconds of a core for each GiB. On Linux priorities are of threads.
    """
    os.nice(_LESS_URGENT)
    put_together(memory)


class KvPool(Pool):
    """A pool in host memory.

    Args:
        pool_bytes: size; the part behind the last whole block stays unused.
        pages: that it lies in.

    Raises:
        ConfigError: there is not that much memory; the message names what is available.
    """

    def __init__(self, pool_bytes: int, pages: Pages = Pages.TOGETHER) -> None:
        if pool_bytes < 1:
            raise ConfigError(f"pool_bytes must be positive, got {pool_bytes}")
        self.pool_bytes = pool_bytes
        name = "infinite-llm-pool"
        create = create_huge_memfd if pages is Pages.RESERVED else create_memfd
        self._fd = create(name, pool_bytes)
        self._memory: Memory | None = map_aligned(self._fd, pool_bytes)
        self._putting_together: threading.Thread | None = None
        if pages is Pages.TOGETHER:
            self._putting_together = threading.Thread(
                target=_put_together_beside_others, args=(self._memory,), name="huge pages", daemon=True
            )
            self._putting_together.start()

    def wait_until_together(self, timeout_s: float) -> None:
        """Returns when the system has done what it was asked for, at ``TOGETHER``."""
        if self._putting_together is not None:
            self._putting_together.join(timeout_s)

    @property
    def fd(self) -> int:
        """The memfd. The pool keeps it open until ``close``."""
        return self._fd

    def grant(self) -> Grant:
        return Grant(MemoryKind.HOST, self.pool_bytes, fds=(self._fd,))

    def as_tensor(self, geometry: PoolGeometry) -> Tensor:
        assert self._memory is not None, "the pool is closed"
        return pool_tensor(self._memory, geometry)

    def close(self) -> None:
        if self._memory is not None:
            self._memory = None
            os.close(self._fd)


def map_memory(grant: Grant) -> Mapping:
    """Maps a pool in host memory.

    Raises:
        PeerLostError: the memfd is missing, or is not one of that size that touching is safe in.
    """
    if not grant.fds:
        raise PeerLostError("the daemon passed no memory")
    memory = map_foreign_memfd(grant.fds[0], grant.pool_bytes, map_aligned)
    return Mapping(memory, torch.frombuffer(memory, dtype=torch.uint8), lambda: None)


def pool_tensor(memory: Memory, geometry: PoolGeometry) -> Tensor:
    """As ``blocks_of``; the tensor keeps the mapping alive."""
    return blocks_of(torch.frombuffer(memory, dtype=torch.uint8), geometry)


def blocks_of(content: Tensor, geometry: PoolGeometry) -> Tensor:
    """A pool's memory, [pool_bytes] uint8, as ``[num_blocks, layers, kv_heads, 2, block_tokens, head_dim]``.

    Raises:
        ConfigError: the pool does not hold a single block.
    """
    num_blocks = len(content) // geometry.block_bytes
    if num_blocks == 0:
        raise ConfigError(
            f"a pool of {len(content)} bytes holds no block of {geometry.block_bytes} bytes; make it larger"
        )
    flat = content[: num_blocks * geometry.block_bytes]
    return flat.view(_DTYPES[geometry.dtype]).view(num_blocks, *geometry.block_shape)
