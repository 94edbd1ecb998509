"""rBlocks: their shape, their names, and the hash that says what they hold."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.core.errors import ConfigError

BLOCK_KEY_BYTES = 16
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    """Shape of an rBlock: ``[layers, kv_heads, 2, block_tokens, head_dim]`` of ``dtype``; K is index 0, V index 1."""

    layers: int
    kv_heads: int
    block_tokens: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "block_tokens", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"pool geometry: {name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"pool geometry: dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.layers, self.kv_heads, 2, self.block_tokens, self.head_dim)

    @property
    def block_bytes(self) -> int:
        elements = self.layers * self.kv_heads * 2 * self.block_tokens * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.block_tokens)


class BlockHandle(NamedTuple):
    """One block of one daemon's pool. The generation grows whenever the block is given away anew."""

    block: int
    generation: int


class HeadRange(NamedTuple):
    """KV heads first .. end of a model's, half-open."""

    first: int
    end: int

    @staticmethod
    def of_rank(kv_heads: int, rank: int, degree: int) -> HeadRange:
        """The heads that one rank of a tensor-parallel model computes; ``degree`` divides ``kv_heads``."""
        share = kv_heads // degree
        return HeadRange(rank * share, (rank + 1) * share)


class BlockRef(NamedTuple):
    """One block of the cluster."""

    kvdaemon_id: str
    handle: BlockHandle


@dataclass(frozen=True, slots=True)
class BlockKeySpace:
    """What, besides the tokens, decides a block's contents. Blocks of different spaces never share a key.

    Attributes:
        model: fingerprint of the checkpoint.
        dtype: element type of the KV cache.
        kv_heads: half-open range of KV heads in the block: of what lies there, not of who computed it. Ranks of a
            tensor-parallel instance fill a block together, so it has all heads, and the name that one process gives it.
        rotary: name of the rotary regime (longrope has two).
        salt: separates tenants.
    """

    model: str
    dtype: str
    kv_heads: tuple[int, int]
    rotary: str = "default"
    salt: bytes = b""

    def root(self) -> bytes:
        """The key that stands before a sequence's first block."""
        text = "\0".join((self.model, self.dtype, f"{self.kv_heads[0]}:{self.kv_heads[1]}", self.rotary))
        return hashlib.blake2b(text.encode() + b"\0" + self.salt, digest_size=BLOCK_KEY_BYTES).digest()


def next_block_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full block: chained over everything before it.

    Args:
        previous: key of the block before, or ``BlockKeySpace.root()``.
        token_ids: the block's own tokens, each below 2**32.
    """
    digest = hashlib.blake2b(previous, digest_size=BLOCK_KEY_BYTES)
    digest.update(struct.pack(f"<{len(token_ids)}I", *token_ids))
    return digest.digest()


def block_keys(space: BlockKeySpace, token_ids: Sequence[int], block_tokens: int) -> list[bytes]:
    """Keys of all full blocks of a sequence, in order."""
    keys: list[bytes] = []
    key = space.root()
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        key = next_block_key(key, token_ids[start : start + block_tokens])
        keys.append(key)
    return keys
