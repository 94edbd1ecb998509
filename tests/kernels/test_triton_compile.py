"""The Triton kernels compile to machine code for GPUs, on a machine without one, and to the code that was meant."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton.attention import attend, merge_items
from kernels.triton.memory import merge_part, merge_sink, store_rows
from kernels.triton.schedule import schedule
from kernels.triton.tiling import Gpu, Kind, Shape, Tiling, default, tile_dim

AMPERE, SMALL, HOPPER = (
    Gpu("A100", (8, 0), 108, 163 * 1024),
    Gpu("L4", (8, 9), 58, 99 * 1024),
    Gpu("H200", (9, 0), 132, 227 * 1024),
)
REGISTERS = 65536  # of a multiprocessor
PLAN = dict.fromkeys(("query_start", "query_pos", "block_start", "block_ids", "block_pos"), "*i32")
SCHEDULE = dict.fromkeys(("count", "items", "row_parts"), "*i32")
STRIDES = dict.fromkeys(("q_stride", "k_stride", "v_stride", "block_stride"), "i64")
NUMBERS = dict.fromkeys(
    ("rows", "window", "places", "heads", "segments", "target", "first_place", "low", "high"), "i32"
)
SCALARS = {"scale": "fp32", "softcap": "fp32"}
POINTERS = dict.fromkeys(("out", "lse", "part_out", "part_lse"), "*fp32")


def compile_kernel(
    kernel,
    element: str,
    gpu: Gpu,
    types: dict[str, str] | None = None,
    options: dict[str, int | None] | None = None,
    **constants: object,
):
    """kernel for one variant of its constants, as a launch with aligned tensors has it; element is the pool's type."""
    data = dict.fromkeys(("q", "k", "v", "pool", "sinks"), f"*{element}")
    described = f"tensordesc<{element}[{constants.get('TILE_KEYS')}, {constants.get('TILE_DIM')}]>"
    data["pool_rows"] = described if constants.get("DESCRIBED") else "constexpr"
    known = {**PLAN, **SCHEDULE, **STRIDES, **NUMBERS, **SCALARS, **POINTERS, **data, **(types or {})}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else known[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    values |= {
        (index,): None for index, name in enumerate(names) if signature[name] == "constexpr" and name not in constants
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in STRIDES
    }
    target = GPUTarget("cuda", gpu.capability[0] * 10 + gpu.capability[1], 32)
    return triton.compile(ASTSource(kernel, signature, values, aligned), target=target, options=options or {})


def compile_attend(gpu: Gpu, shape: Shape, tiling: Tiling, capped: bool = False, **constants: object):
    element = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[shape.dtype]
    options = {
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        "maxnreg": tiling.max_registers or None,
        "enable_fp_fusion": True,
    }
    sizes = {
        "KV_HEADS": 8,
        "GROUP": shape.group,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_TOKENS": shape.block_tokens,
        "TILE_ROWS": tiling.tile_rows,
        "TILE_KEYS": tiling.tile_keys,
        "TILE_DIM": tile_dim(shape.head_dim),
        "CAPPED": capped,
        "NEGATED": False,
        "DESCRIBED": tiling.descriptors,
        "WIDEN": False,
        **constants,
    }
    return compile_kernel(attend, element, gpu, options=options, **sizes)


def registers_and_stack(kernel, directory: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack frame: what did not find room in registers."""
    (directory / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", str(directory / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def bfloat16(kind: Kind, head_dim: int = 128) -> Shape:
    return Shape(kind, "bfloat16", 2, head_dim, 4, 64)


@pytest.mark.parametrize("gpu", [AMPERE, HOPPER], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decoding_keeps_the_memory_busy(gpu: Gpu, head_dim: int, tmp_path: Path) -> None:
    """Copies of 16 bytes to shared memory ahead of their use, tensor cores, two programs to a multiprocessor."""
    shape = bfloat16(Kind.DECODE, head_dim)
    tiling = default(gpu, shape)
    kernel = compile_attend(gpu, shape, tiling)
    ptx = kernel.asm["ptx"]
    copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    assert copies.count("0x10") >= 32
    assert set(copies) <= {"0x10", "0x4"}  # by fours: positions of the blocks at the edges
    assert "mma.sync" in ptx
    registers, stack = registers_and_stack(kernel, tmp_path)
    assert stack == 0
    assert 2 * 32 * tiling.num_warps * registers <= REGISTERS
    assert 2 * (kernel.metadata.shared + 1024) <= gpu.shared_memory + 1024


def test_prefill_on_hopper(tmp_path: Path) -> None:
    """Products of whole warp groups, two programs to a multiprocessor, next to nothing that spills."""
    shape = bfloat16(Kind.PREFILL)
    tiling = default(HOPPER, shape)
    kernel = compile_attend(HOPPER, shape, tiling)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "mma.sync.aligned.m16n8k16" not in kernel.asm["ptx"]
    registers, stack = registers_and_stack(kernel, tmp_path)
    assert stack <= 128
    assert 2 * 32 * tiling.num_warps * registers <= REGISTERS
    assert 2 * (kernel.metadata.shared + 1024) <= HOPPER.shared_memory + 1024


@pytest.mark.parametrize("kind", list(Kind))
def test_descriptors_on_hopper(kind: Kind, tmp_path: Path) -> None:
    shape = bfloat16(kind)
    kernel = compile_attend(HOPPER, shape, replace(default(HOPPER, shape), descriptors=True))
    assert kernel.asm["ptx"].count("cp.async.bulk.tensor") >= 4
    assert registers_and_stack(kernel, tmp_path)[1] <= 128


def test_prefill_on_ampere(tmp_path: Path) -> None:
    shape = bfloat16(Kind.PREFILL)
    kernel = compile_attend(AMPERE, shape, default(AMPERE, shape))
    assert "mma.sync" in kernel.asm["ptx"]
    assert registers_and_stack(kernel, tmp_path)[1] == 0


@pytest.mark.parametrize(
    ("gpu", "kind", "dtype", "head_dim", "capped"),
    [
        (SMALL, Kind.DECODE, "float16", 256, True),
        (SMALL, Kind.PREFILL, "bfloat16", 256, False),
        (HOPPER, Kind.PREFILL, "bfloat16", 96, True),
        (SMALL, Kind.PREFILL, "float32", 64, False),
    ],
)
def test_other_shapes(gpu: Gpu, kind: Kind, dtype: str, head_dim: int, capped: bool) -> None:
    shape = Shape(kind, dtype, 4 if dtype == "float32" else 2, head_dim, 4, 64)
    kernel = compile_attend(gpu, shape, default(gpu, shape), capped)
    assert kernel.metadata.shared <= gpu.shared_memory


def test_attend_where_numbers_are_one() -> None:
    """Triton makes arguments of value 1 constants."""
    shape = Shape(Kind.DECODE, "bfloat16", 2, 80, 1, 16)
    kernel = compile_attend(HOPPER, shape, default(HOPPER, shape), KV_HEADS=1, q_stride=1, block_stride=1)
    assert kernel.metadata.shared <= HOPPER.shared_memory


@pytest.mark.parametrize("segments", [1, 1024])
def test_schedule(segments: int) -> None:
    sizes = {"GROUP": 3, "BLOCK_TOKENS": 64, "TILE_ROWS": 16, "MIN_BLOCKS": 4, "TILE_SEGMENTS": segments, "LANES": 64}
    assert compile_kernel(schedule, "bf16", HOPPER, **sizes).asm["cubin"]


def test_merges_and_store() -> None:
    dim = {"HEAD_DIM": 80, "TILE_DIM": 128}
    for rows in (1, 32):
        sizes = {"KV_HEADS": 2, "GROUP": 3, "TILE_SPLITS": 64, "MERGE_ROWS": rows}
        assert compile_kernel(merge_items, "bf16", HOPPER, {"out": "*bf16"}, **sizes, **dim).asm["cubin"]
    heads = {"TILE_HEADS": 8, **dim}
    for rows, indexed in (("*i64", True), ("*fp32", False)):
        types = {"part_out": "*bf16", "rows": rows}
        assert compile_kernel(merge_part, "bf16", HOPPER, types, INDEXED=indexed, **heads).asm["cubin"]
    assert compile_kernel(merge_sink, "bf16", HOPPER, **heads).asm["cubin"]
    types = {"slots": "*i64", "k": "*fp32"}
    assert compile_kernel(store_rows, "bf16", HOPPER, types, BLOCK_TOKENS=64, **heads).asm["cubin"]
