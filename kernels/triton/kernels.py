"""The Triton kernels behind the interface. Nothing here waits for the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.checks import check_attention, check_merge, check_pool, check_store
from kernels.interface import AttentionKernels, AttentionPlan, LayerParams
from kernels.triton.attention import attend, merge_items
from kernels.triton.memory import merge_part, merge_sink, store_rows
from kernels.triton.prepared import Prepared, PreparedPlans, prepare
from kernels.triton.tiling import INTERPRETER, MIN_DOT, Gpu, Kind, Shape, Tiling, tile_dim
from kernels.triton.tuning import TilingCache

_LOG2_E = 1.4426950408889634
_TILE_ELEMENTS = 4096  # of a program that is one pass over memory
_MERGE_ELEMENTS = 8192
_MERGE_ROWS = 32  # of a program that has nothing to merge, as a rule


class TritonKernels(AttentionKernels):
    """Triton kernels for CUDA tensors (or CPU tensors in Triton's interpreter).

    One instance serves one stream at a time: partial states of split tiles lie in memory that the next call uses again.
    Sizes of launches and of that memory depend on the sizes of a call's tensors and ``max_query_len`` alone, so a call
    can be captured in a CUDA graph, whose plan's tensors may hold another batch at each replay. It must have been
    called with the same sizes before, for the kernels to be compiled.

    Args:
        tilings: sizes of tiles to use instead of tuned and default ones.
        cache: of tuned sizes; None: the default place's.
    """

    name = "triton"

    def __init__(self, tilings: dict[Kind, Tiling] | None = None, cache: TilingCache | None = None) -> None:
        self._interpreted: bool = triton.knobs.runtime.interpret
        self._fixed = dict(tilings or {})
        self._cache = cache if cache is not None else TilingCache()
        self._plans = PreparedPlans()
        self._gpus: dict[int, Gpu] = {}
        self._parts: dict[tuple[int, int], Tensor] = {}  # by device and a bucket of sizes

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        check_pool(pool, params.layer, q.device.type)
        check_attention(q, pool, plan, out, lse)
        kv_heads, block_tokens, head_dim = pool.shape[2], pool.shape[4], pool.shape[5]
        if block_tokens < MIN_DOT or block_tokens & (block_tokens - 1):
            raise ValueError(f"block_tokens must be a power of two of at least {MIN_DOT}, got {block_tokens}")
        rows, q_heads = q.shape[0], q.shape[1]
        if rows == 0:
            return
        group = q_heads // kv_heads
        gpu = self._gpu(q.device)

        def tiling_of(kind: Kind) -> Tiling:
            return self._fixed.get(kind) or self._cache.tiling(gpu, shape_of(pool, q_heads, kind))

        def make() -> Prepared:
            return prepare(plan, rows, kv_heads, group, block_tokens, params.window, gpu, tiling_of)

        with _on(q):
            key = (rows, kv_heads, group, block_tokens, head_dim, pool.dtype, params.window)
            prepared = self._plans.find(plan, key, make)
            self._launch(q, pool, plan, params, out, lse, prepared)

    def _launch(
        self,
        q: Tensor,
        pool: Tensor,
        plan: AttentionPlan,
        params: LayerParams,
        out: Tensor,
        lse: Tensor,
        prepared: Prepared,
    ) -> None:
        kv_heads, block_tokens, head_dim = pool.shape[2], pool.shape[4], pool.shape[5]
        rows, q_heads = q.shape[0], q.shape[1]
        part_out, part_lse = self._partials(q.device, kv_heads, prepared.places, head_dim)
        layer = pool[:, params.layer]
        capped, scale = params.softcap > 0, abs(params.scale)
        shape = {
            "KV_HEADS": kv_heads,
            "GROUP": q_heads // kv_heads,
            "HEAD_DIM": head_dim,
            "TILE_DIM": tile_dim(head_dim),
        }
        for launch in prepared.launches:
            tile_keys = min(launch.tiling.tile_keys, block_tokens)
            described = launch.tiling.descriptors and _describable(layer)
            attend[(launch.capacity * kv_heads,)](
                q,
                layer,
                _rows_of(layer, tile_keys) if described else None,
                plan.block_ids,
                plan.block_pos,
                launch.count,
                launch.items,
                out,
                lse,
                part_out,
                part_lse,
                q.stride(0),
                pool.stride(0),
                prepared.places,
                scale / params.softcap if capped else scale * _LOG2_E,
                params.softcap * _LOG2_E,
                params.window,
                **shape,
                BLOCK_TOKENS=block_tokens,
                TILE_ROWS=launch.tiling.tile_rows,
                TILE_KEYS=tile_keys,
                CAPPED=capped,
                NEGATED=params.scale < 0,
                DESCRIBED=described,
                # The interpreter multiplies bfloat16 as if it were integers.
                WIDEN=self._interpreted and pool.dtype == torch.bfloat16,
                num_warps=launch.tiling.num_warps,
                num_stages=launch.tiling.num_stages,
                maxnreg=launch.tiling.max_registers or None,
                enable_fp_fusion=True,  # Triton's next default is not to
            )
        merge_rows = 1 if plan.max_query_len == 1 else _MERGE_ROWS
        merge_items[(-(-rows // merge_rows) * q_heads,)](
            part_out,
            part_lse,
            prepared.row_parts,
            plan.query_start,
            out,
            lse,
            rows,
            plan.segments,
            prepared.places,
            **shape,
            TILE_SPLITS=max(1, _MERGE_ELEMENTS // tile_dim(head_dim)),
            MERGE_ROWS=merge_rows,
        )

    def merge_partials(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None = None
    ) -> None:
        check_merge(out, lse, part_out, part_lse, rows)
        if part_lse.numel() == 0:
            return
        tile = _head_tile(out.shape[1], out.shape[2])
        with _on(out):
            merge_part[(part_lse.shape[0], triton.cdiv(out.shape[1], tile["TILE_HEADS"]))](
                out,
                lse,
                part_out,
                part_lse,
                part_lse if rows is None else rows,
                out.shape[1],
                **tile,
                INDEXED=rows is not None,
            )

    def merge_sinks(self, out: Tensor, lse: Tensor, sinks: Tensor) -> None:
        check_merge(out, lse, out, lse, None)
        if sinks.shape != out.shape[1:2] or sinks.device != out.device:
            raise ValueError(f"sinks must be [{out.shape[1]}] on {out.device}, got {list(sinks.shape)} {sinks.device}")
        if lse.numel() == 0:
            return
        tile = _head_tile(out.shape[1], out.shape[2])
        with _on(out):
            merge_sink[(out.shape[0], triton.cdiv(out.shape[1], tile["TILE_HEADS"]))](
                out, lse, sinks.contiguous(), out.shape[1], **tile
            )

    def store_kv(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
        check_pool(pool, layer, k.device.type)
        check_store(k, v, pool, slots)
        if k.shape[0] == 0:
            return
        tile = _head_tile(k.shape[1], k.shape[2])
        with _on(pool):
            store_rows[(k.shape[0], triton.cdiv(k.shape[1], tile["TILE_HEADS"]))](
                k,
                v,
                pool[:, layer],
                slots,
                k.shape[1],
                k.stride(0),
                v.stride(0),
                pool.stride(0),
                BLOCK_TOKENS=pool.shape[4],
                **tile,
            )

    def _gpu(self, device: torch.device) -> Gpu:
        index = -1 if device.index is None else device.index
        if index not in self._gpus:
            self._gpus[index] = describe_gpu(device)
        return self._gpus[index]

    def _partials(self, device: torch.device, kv_heads: int, places: int, head_dim: int) -> tuple[Tensor, Tensor]:
        """part_out [kv_heads, places, head_dim], part_lse [kv_heads, places]: float32, used again by the next call."""
        size = kv_heads * places * (head_dim + 1)
        bucket = triton.next_power_of_2(max(1, size))
        key = (-1 if device.index is None else device.index, bucket)
        memory = self._parts.get(key)
        if memory is None:
            memory = self._parts[key] = torch.empty(bucket, dtype=torch.float32, device=device)
        out_size = kv_heads * places * head_dim
        return memory[:out_size].view(kv_heads, places, head_dim), memory[out_size:size].view(kv_heads, places)


def _describable(layer: Tensor) -> bool:
    """What descriptors ask for: whole tiles of aligned rows."""
    head_dim = layer.shape[4]
    return head_dim == tile_dim(head_dim) and layer.stride(0) % head_dim == 0 and layer.data_ptr() % 16 == 0


def _rows_of(layer: Tensor, tile_keys: int) -> TensorDescriptor:
    """A layer of the pool, [num_blocks, kv_heads, 2, block_tokens, head_dim], as rows of head_dim.

    Rows of other layers lie between a block's and the next one's; nobody asks for them.
    """
    head_dim = layer.shape[4]
    rows = (layer.stride(0) * (layer.shape[0] - 1) + layer[0].numel()) // head_dim
    return TensorDescriptor(layer, [rows, head_dim], [head_dim, 1], [tile_keys, head_dim])


def shape_of(pool: Tensor, q_heads: int, kind: Kind) -> Shape:
    """What tilings for queries over this pool are chosen by."""
    dtype = str(pool.dtype).removeprefix("torch.")
    return Shape(kind, dtype, pool.element_size(), pool.shape[5], q_heads // pool.shape[2], pool.shape[4])


def describe_gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETER
    known = torch.cuda.get_device_properties(device)
    shared_memory = getattr(known, "shared_memory_per_block_optin", known.shared_memory_per_block)
    return Gpu(known.name, (known.major, known.minor), known.multi_processor_count, shared_memory)


def _on(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _head_tile(heads: int, head_dim: int) -> dict[str, int]:
    """Sizes of a program that takes a row and some of its heads."""
    dim = tile_dim(head_dim)
    tile_heads = min(triton.next_power_of_2(heads), max(1, _TILE_ELEMENTS // dim))
    return {"HEAD_DIM": head_dim, "TILE_DIM": dim, "TILE_HEADS": tile_heads}
