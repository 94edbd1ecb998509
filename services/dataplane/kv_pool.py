"""The memory of a pool: one memfd of rBlocks, mapped by its daemon and by the instance beside it.

A pool is bytes until a geometry cuts it into blocks. Any number of tensors may look at the same bytes, in any number of
processes; who may write which block is the ledger's business.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

import torch
from torch import Tensor

from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError
from services.dataplane.memfd import create_memfd, map_memfd

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvPool:
    """A daemon's pool memory, allocated in full.

    Args:
        pool_bytes: size; the part behind the last whole block stays unused.
        huge_pages: ask for transparent huge pages; without effect where the system does not grant them
            (/sys/kernel/mm/transparent_hugepage/shmem_enabled).

    Raises:
        ConfigError: there is not that much memory; the message names what is available.
    """

    def __init__(self, pool_bytes: int, huge_pages: bool = False) -> None:
        if pool_bytes < 1:
            raise ConfigError(f"pool_bytes must be positive, got {pool_bytes}")
        self.pool_bytes = pool_bytes
        self._fd = create_memfd("infinite-llm-pool", pool_bytes, huge_pages)
        self._memory: mmap.mmap | None = map_memfd(self._fd, pool_bytes)

    @property
    def fd(self) -> int:
        """The memfd, for passing it on. The pool keeps it open until ``close``."""
        return self._fd

    def as_tensor(self, geometry: PoolGeometry) -> Tensor:
        """The pool as blocks: ``[num_blocks, layers, kv_heads, 2, block_tokens, head_dim]`` of ``geometry.dtype``."""
        assert self._memory is not None, "the pool is closed"
        return pool_tensor(self._memory, geometry)

    def close(self) -> None:
        """Gives up the memory, which goes with the last tensor and the last process that looks at it. Idempotent."""
        if self._memory is not None:
            self._memory = None
            os.close(self._fd)


def pool_tensor(memory: mmap.mmap, geometry: PoolGeometry) -> Tensor:
    """A mapped pool as ``[num_blocks, layers, kv_heads, 2, block_tokens, head_dim]``. It keeps the mapping alive.

    Raises:
        ConfigError: the pool does not hold a single block.
    """
    num_blocks = len(memory) // geometry.block_bytes
    if num_blocks == 0:
        raise ConfigError(
            f"a pool of {len(memory)} bytes holds no block of {geometry.block_bytes} bytes; make it larger"
        )
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=num_blocks * geometry.block_bytes)
    return flat.view(_DTYPES[geometry.dtype]).view(num_blocks, *geometry.block_shape)
