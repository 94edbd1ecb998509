"""Argument checks shared by the compiled kernels: what native code would otherwise read or write out of bounds.

They look at shapes, dtypes, strides and devices only, never at data, so they cost microseconds and no device sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.interface import AttentionPlan

POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_pool(pool: Tensor, layer: int, device_type: str) -> None:
    """pool: [num_blocks, layers, kv_heads, 2, block_tokens, head_dim], each block's layer contiguous."""
    _require(pool.device.type == device_type, f"pool must be on {device_type}, got {pool.device}")
    _require(pool.dtype in POOL_DTYPES, f"pool must be float32, bfloat16 or float16, got {pool.dtype}")
    _require(
        pool.dim() == 6 and pool.shape[3] == 2,
        f"pool must be [num_blocks, layers, kv_heads, 2, block_tokens, head_dim], got {list(pool.shape)}",
    )
    block_tokens, head_dim = pool.shape[4], pool.shape[5]
    _require(
        pool.stride()[2:] == (2 * block_tokens * head_dim, block_tokens * head_dim, head_dim, 1),
        f"pool must be contiguous inside a block's layer, got strides {pool.stride()}",
    )
    _require(0 <= layer < pool.shape[1], f"layer must be in 0..{pool.shape[1] - 1}, got {layer}")


def check_attention(q: Tensor, pool: Tensor, plan: AttentionPlan, out: Tensor, lse: Tensor) -> None:
    """Shapes as ``AttentionKernels.micro_attention`` says; the pool was checked before."""
    kv_heads, head_dim = pool.shape[2], pool.shape[5]
    _require(
        q.dim() == 3 and q.shape[2] == head_dim and q.shape[1] > 0 and q.shape[1] % kv_heads == 0,
        f"q must be [rows, multiple of {kv_heads} heads, {head_dim}], got {list(q.shape)}",
    )
    _require(q.dtype == pool.dtype, f"q must have the pool's dtype {pool.dtype}, got {q.dtype}")
    _require(
        q.stride(2) == 1 and (q.stride(1) == head_dim or q.shape[1] == 1),
        f"q must be contiguous in the last two dimensions, got strides {q.stride()}",
    )
    _require(out.shape == q.shape and out.is_contiguous(), f"out must be contiguous {list(q.shape)}")
    _require(out.dtype in (torch.float32, pool.dtype), f"out must be float32 or {pool.dtype}, got {out.dtype}")
    _require(
        lse.shape == q.shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous(),
        f"lse must be contiguous float32 {list(q.shape[:2])}, got {lse.dtype} {list(lse.shape)}",
    )
    _require(q.device == pool.device and out.device == pool.device and lse.device == pool.device, _ONE_DEVICE)
    segments = plan.segments
    _require(
        plan.query_start.numel() == segments + 1 and plan.block_start.numel() == segments + 1,
        f"plan of {segments} segments needs {segments + 1} entries in query_start and block_start",
    )
    _require(plan.block_ids.numel() == plan.block_pos.numel(), "plan.block_ids and plan.block_pos differ in length")
    for tensor in (plan.query_start, plan.query_pos, plan.block_start, plan.block_ids, plan.block_pos):
        _require(tensor.dtype == torch.int32 and tensor.is_contiguous(), "plan tensors must be contiguous int32")
        _require(tensor.device == pool.device, _ONE_DEVICE)


def check_merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None) -> None:
    """Shapes as ``AttentionKernels.merge_partials`` says."""
    _require(
        out.dim() == 3 and out.dtype == torch.float32 and out.is_contiguous(),
        f"out must be contiguous float32 [rows, q_heads, head_dim], got {out.dtype} {list(out.shape)}",
    )
    _require(
        lse.shape == out.shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous(),
        f"lse must be contiguous float32 {list(out.shape[:2])}, got {lse.dtype} {list(lse.shape)}",
    )
    count = out.shape[0] if rows is None else rows.numel()
    _require(
        part_out.shape == (count, *out.shape[1:]) and part_out.is_contiguous() and part_out.dtype in POOL_DTYPES,
        f"part_out must be contiguous {[count, *out.shape[1:]]}, got {part_out.dtype} {list(part_out.shape)}",
    )
    _require(
        part_lse.shape == (count, out.shape[1]) and part_lse.dtype == torch.float32 and part_lse.is_contiguous(),
        f"part_lse must be contiguous float32 {[count, out.shape[1]]}, got {part_lse.dtype} {list(part_lse.shape)}",
    )
    _require(lse.device == out.device and part_out.device == out.device and part_lse.device == out.device, _ONE_DEVICE)
    if rows is not None:
        _require(rows.dtype == torch.int64 and rows.dim() == 1 and rows.is_contiguous(), "rows must be [n] int64")
        _require(rows.device == out.device, _ONE_DEVICE)


def check_store(k: Tensor, v: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Shapes as ``AttentionKernels.store_kv`` says; the pool was checked before."""
    shape = (slots.numel(), pool.shape[2], pool.shape[5])
    _require(slots.dtype == torch.int64 and slots.dim() == 1 and slots.is_contiguous(), "slots must be [rows] int64")
    for name, tensor in (("k", k), ("v", v)):
        _require(tensor.shape == shape, f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        _require(tensor.dtype in POOL_DTYPES, f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        _require(
            tensor.stride(2) == 1 and (tensor.stride(1) == shape[2] or shape[1] == 1),
            f"{name} must be contiguous in the last two dimensions, got strides {tensor.stride()}",
        )
    _require(k.dtype == v.dtype, f"k and v must have one dtype, got {k.dtype} and {v.dtype}")
    _require(k.device == pool.device and v.device == pool.device and slots.device == pool.device, _ONE_DEVICE)


_ONE_DEVICE = "all tensors must be on one device"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
