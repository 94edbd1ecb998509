"""How the attention kernel cuts its work: the sizes of tiles and programs, what they are by default, what may be tried.

The best sizes depend on the GPU and on the shapes of the model; ``tuning`` measures them. Where nothing was measured,
the defaults here stand. They follow from what a multiprocessor has: decoding wants bytes in flight (two or three tiles
of keys and values of 16 KiB each for every program, and two programs beside each other), prefill wants large products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

MIN_DOT = 16  # smallest side of a matrix product on tensor cores
_TILE_BYTES = 16384  # of a tile's keys, and of its values
_MAX_DECODE_ROWS = 64


class Kind(Enum):
    DECODE = "decode"  # all effective rows of a segment in one small tile: memory is the limit
    PREFILL = "prefill"  # large tiles: matrix products are the limit


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of a launch.

    Attributes:
        tile_rows: effective rows of a tile, a power of two of at least 16.
        tile_keys: keys of a tile, a power of two of at least 16; at most a block's.
        num_warps: of a program.
        num_stages: tiles of keys and values that are on their way while one is computed, plus one.
        programs: items per multiprocessor that the blocks of a batch are dealt out to.
        max_registers: of a thread, so that two programs fit beside each other; 0: as many as the compiler likes.
        descriptors: tiles are copied by the tensor memory accelerator where the pool's layout allows it (Hopper).
    """

    tile_rows: int
    tile_keys: int
    num_warps: int
    num_stages: int
    programs: int
    max_registers: int = 0
    descriptors: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """What a tiling is chosen for, besides the GPU.

    Attributes:
        dtype: of the pool, as ``str(torch.dtype)`` says it without the module.
        group: query heads per KV head.
    """

    kind: Kind
    dtype: str
    element_size: int
    head_dim: int
    group: int
    block_tokens: int

    @property
    def key(self) -> str:
        return f"{self.kind.value}-{self.dtype}-dim{self.head_dim}-group{self.group}-block{self.block_tokens}"


@dataclass(frozen=True, slots=True)
class Gpu:
    """What of a GPU the sizes depend on.

    Attributes:
        name: as CUDA says it.
        capability: compute capability, (9, 0) for Hopper.
        shared_memory: bytes that one program may have.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


# Where Triton's interpreter computes: as many programs as it can go through quickly, one after another.
INTERPRETER = Gpu("interpreter", (9, 0), 1, 227 * 1024)


def tile_dim(head_dim: int) -> int:
    """Power of two that holds a head."""
    return max(MIN_DOT, _power(head_dim))


def decode_rows(group: int) -> int:
    """Effective rows of a decoding tile: one row of every head of the group, filled up for the tensor cores."""
    return max(MIN_DOT, min(_MAX_DECODE_ROWS, _power(group)))


def default(gpu: Gpu, shape: Shape) -> Tiling:
    """What is used where nothing was measured."""
    key_bytes = tile_dim(shape.head_dim) * shape.element_size
    keys = max(MIN_DOT, min(shape.block_tokens, 64, _TILE_BYTES // key_bytes))
    if shape.kind is Kind.DECODE:
        wanted = Tiling(decode_rows(shape.group), keys, num_warps=4, num_stages=3, programs=4)
    elif shape.element_size > 2 or tile_dim(shape.head_dim) > 128:
        # Without tensor cores, or with an accumulator twice as wide, 128 rows do not fit into registers.
        wanted = Tiling(64, min(keys, 32), num_warps=4, num_stages=2, programs=4)
    elif gpu.capability >= (9, 0):
        # Two programs of 128 registers beside each other: one's products run while the other takes exponentials.
        wanted = Tiling(128, keys, num_warps=8, num_stages=2, programs=4, max_registers=128)
    else:
        wanted = Tiling(128, keys, num_warps=8, num_stages=3, programs=4)
    fewer = [replace(wanted, num_stages=stages) for stages in range(wanted.num_stages, 0, -1)]
    return next((tiling for tiling in fewer if fits(gpu, shape, tiling)), fewer[-1])


def candidates(gpu: Gpu, shape: Shape) -> list[Tiling]:
    """What is worth measuring, the default first. Each is a kernel of its own to compile: seconds."""
    keys = max(MIN_DOT, min(shape.block_tokens, 64))
    half = max(MIN_DOT, keys // 2)
    if shape.kind is Kind.DECODE:
        rows = decode_rows(shape.group)
        sizes = [(keys, 4, 2), (keys, 4, 3), (keys, 4, 4), (keys, 8, 3), (keys, 2, 3), (half, 4, 4), (half, 2, 4)]
        tried = [Tiling(rows, *chosen, programs=4) for chosen in sizes]
    else:
        tried = [
            Tiling(128, keys, num_warps=8, num_stages=2, programs=4, max_registers=128),
            Tiling(128, keys, num_warps=8, num_stages=2, programs=4),
            Tiling(128, keys, num_warps=8, num_stages=3, programs=4),
            Tiling(128, half, num_warps=8, num_stages=3, programs=4, max_registers=128),
            Tiling(128, keys, num_warps=4, num_stages=2, programs=4),
            Tiling(64, keys, num_warps=4, num_stages=2, programs=4),
            Tiling(64, keys, num_warps=4, num_stages=2, programs=4, max_registers=168),
        ]
    if gpu.capability >= (9, 0):
        tried += [replace(tiling, descriptors=True) for tiling in tried[:3]]
    usable = [tiling for tiling in tried if fits(gpu, shape, tiling)]
    return list(dict.fromkeys([default(gpu, shape), *usable]))


def with_other_programs(tiling: Tiling) -> list[Tiling]:
    """The same kernel with its work dealt out otherwise."""
    return [replace(tiling, programs=programs) for programs in (2, 8, 16) if programs != tiling.programs]


def fits(gpu: Gpu, shape: Shape, tiling: Tiling) -> bool:
    """Whether keys and values in flight, the queries and the weights find room in shared memory."""
    row_bytes = tile_dim(shape.head_dim) * shape.element_size
    flying = tiling.num_stages * 2 * tiling.tile_keys * row_bytes
    resident = tiling.tile_rows * max(row_bytes, tiling.tile_keys * shape.element_size)
    return flying + resident <= gpu.shared_memory


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
