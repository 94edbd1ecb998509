"""The Triton kernels compile to machine code for GPUs, on a machine without one."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton.attention import attend, merge_splits
from kernels.triton.memory import merge_part, store_rows

SHARED_MEMORY = 99 * 1024  # of a block, on the smallest GPUs that have bfloat16
PLAN = dict.fromkeys(("query_start", "query_pos", "block_start", "block_ids", "block_pos"), "*i32")
STRIDES = dict.fromkeys(("q_stride", "k_stride", "v_stride", "block_stride"), "i64")
NUMBERS = {"rows": "i32", "window": "i32", "tiles": "i32", "num_splits": "i32", "places": "i32", "heads": "i32"}
SCALARS = {"scale": "fp32", "softcap": "fp32"}
POINTERS = dict.fromkeys(("out", "lse", "part_out", "part_lse"), "*fp32")


def compile_kernel(kernel, element: str, arch: int, types: dict[str, str] | None = None, **constants: object):
    """kernel for one variant of its constants; element is the type of q, k, v and pool."""
    data = dict.fromkeys(("q", "k", "v", "pool"), f"*{element}")
    known = {**PLAN, **STRIDES, **NUMBERS, **SCALARS, **POINTERS, **data, **(types or {})}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else known[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", arch, 32))


@pytest.mark.parametrize(
    ("element", "arch", "tile_rows", "tile_keys", "head_dim", "capped"),
    [("bf16", 80, 16, 64, 128, False), ("bf16", 90, 64, 32, 256, True), ("fp32", 90, 64, 32, 128, False)],
)
def test_attend(element: str, arch: int, tile_rows: int, tile_keys: int, head_dim: int, capped: bool) -> None:
    shape = {"KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_TOKENS": 64, "TILE_DIM": head_dim}
    tiles = {"TILE_ROWS": tile_rows, "TILE_KEYS": tile_keys, "CAPPED": capped, "WIDEN": False}
    kernel = compile_kernel(attend, element, arch, **shape, **tiles)
    assert kernel.metadata.shared <= SHARED_MEMORY


def test_attend_where_numbers_are_one() -> None:
    """Triton makes arguments of value 1 constants."""
    shape = {"KV_HEADS": 1, "GROUP": 1, "HEAD_DIM": 80, "BLOCK_TOKENS": 16, "TILE_DIM": 128}
    tiles = {"TILE_ROWS": 16, "TILE_KEYS": 16, "CAPPED": False, "WIDEN": False}
    ones = {"rows": 1, "window": 1, "tiles": 1, "num_splits": 1}
    compile_kernel(attend, "bf16", 90, **shape, **tiles, **ones)


def test_merges_and_store() -> None:
    dim = {"HEAD_DIM": 80, "TILE_DIM": 128}
    compile_kernel(merge_splits, "bf16", 90, {"out": "*bf16"}, SPLITS=32, TILE_SPLITS=32, **dim)
    for rows, indexed in (("*i64", True), ("*fp32", False)):
        compile_kernel(merge_part, "bf16", 90, {"part_out": "*bf16", "rows": rows}, INDEXED=indexed, **dim)
    compile_kernel(store_rows, "bf16", 90, {"slots": "*i64", "k": "*fp32"}, BLOCK_TOKENS=64, **dim)
