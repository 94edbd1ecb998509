"""The pool's memory as the worker thread sees it: blocks of the present geometry, and attention over them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kernels import AttentionKernels, LayerParams
from kernels.cpu.answering import CompiledQueries
from services.core.blocks import DTYPE_BYTES, HeadRange, PoolGeometry
from services.core.errors import InvalidRequestError
from services.dataplane.device import BlockBytes, Device, upload_plan
from services.dataplane.host_device import HostDevice
from services.dataplane.kv_pool import Pool
from services.dataplane.wire import HEADER_BYTES, Header
from services.kvdaemon.segments import StepPlan

_ALIGNMENT = 64  # bytes, of lse behind out
_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PoolView:
    """Owned by the worker thread. The bytes that ``attend`` and ``read`` answer are reused by the next call.

    Args:
        device: that has the pool and the kernels; the CPU where none is given.
    """

    def __init__(self, pool: Pool, kernels: AttentionKernels, device: Device | None = None) -> None:
        self._pool = pool
        self._kernels = kernels
        self._device = device or HostDevice()
        self._geometry: PoolGeometry | None = None
        self._blocks: Tensor  # [num_blocks, layers, kv_heads, 2, block_tokens, head_dim]
        self._bytes: BlockBytes  # the same memory
        self._parts: dict[HeadRange, Tensor] = {}  # of _blocks; kept, as kernels know a pool by its tensor
        self._answer = torch.empty(0, dtype=torch.uint8)

    def use(self, geometry: PoolGeometry) -> None:
        """Looks at the memory as blocks of this geometry from now on."""
        if geometry != self._geometry:
            self._blocks = self._pool.as_tensor(geometry)
            self._bytes = BlockBytes(self._blocks, self._device)
            self._geometry = geometry
            self._parts.clear()

    def write(self, block: int, content: memoryview) -> None:
        """Fills a block. ``content``: block_bytes bytes, [layers, kv_heads, 2, block_tokens, head_dim]."""
        self._bytes.write(block, content)

    def read(self, block: int) -> memoryview:
        """The contents of a block, as ``write`` takes them."""
        return self._bytes.read(block)

    def place(self, plan: StepPlan) -> StepPlan:
        """The plan where the kernels can read it."""
        return replace(plan, attention=upload_plan(plan.attention, self._device))

    def settle(self) -> None:
        """
        Raises:
            RuntimeError: the device has failed for good.
        """
        self._device.settle()

    def context_tokens(self, plan: StepPlan, heads: HeadRange) -> float:
        """Tokens of all blocks of a plan, divided by the number of layers: one layer's share of a step's work. Of some
        heads' only, it is that part of them."""
        geometry = self._geometry
        assert geometry is not None
        part = (heads.end - heads.first) / geometry.kv_heads
        return len(plan.attention.block_ids) * geometry.block_tokens / geometry.layers * part

    def compiled_queries(
        self, plan: StepPlan, heads: HeadRange, q_heads: int, out_dtype: str
    ) -> CompiledQueries | None:
        """What compiled code needs to answer the plan's queries of these KV heads, if the kernels have such code."""
        return self._kernels.compiled_queries(self._part(heads), plan.attention, q_heads, _TORCH_DTYPES[out_dtype])

    def _part(self, heads: HeadRange) -> Tensor:
        """[num_blocks, layers, heads, 2, block_tokens, head_dim], the pool's own memory."""
        part = self._parts.get(heads)
        if part is None:
            part = self._parts[heads] = self._blocks[:, :, heads.first : heads.end]
        return part

    def attend(
        self, query: Header, payload: memoryview, plan: StepPlan, heads: HeadRange, max_answer_bytes: int
    ) -> tuple[memoryview, memoryview]:
        """Computes one layer's partial state over the plan's blocks.

        Args:
            payload: q, [rows, q_heads, head_dim] of ``query.dtype``.
            heads: KV heads that the query heads read.
            max_answer_bytes: the longest message that the asker takes.

        Returns:
            out, [rows, q_heads, head_dim] of ``query.out_dtype``, and lse, [rows, q_heads] float32, as bytes.

        Raises:
            InvalidRequestError: the query does not fit the plan or the pool.
        """
        assert self._geometry is not None
        _check(query, payload, plan, heads, self._geometry)
        shape = (query.rows, query.q_heads, query.head_dim)
        out_bytes = math.prod(shape) * DTYPE_BYTES[query.out_dtype]
        lse_bytes = query.rows * query.q_heads * 4
        if HEADER_BYTES + out_bytes + lse_bytes > max_answer_bytes:
            raise InvalidRequestError(
                f"QUERY of {query.rows} rows: its answer is longer than the {max_answer_bytes} bytes of a message"
            )
        lse_start = -(-out_bytes // _ALIGNMENT) * _ALIGNMENT
        if len(self._answer) < lse_start + lse_bytes:
            self._answer = torch.empty(lse_start + lse_bytes, dtype=torch.uint8, device=self._device.tensors)
        answer = self._answer[: lse_start + lse_bytes]
        if query.rows:
            (q,) = self._device.upload([torch.frombuffer(payload, dtype=_TORCH_DTYPES[query.dtype]).view(shape)])
            self._kernels.micro_attention(
                q,
                self._part(heads),
                plan.attention,
                LayerParams(query.layer, query.scale, query.window, query.softcap),
                answer[:out_bytes].view(_TORCH_DTYPES[query.out_dtype]).view(shape),
                answer[lse_start:].view(torch.float32).view(shape[:2]),
            )
        content = self._device.download(answer).wait()
        return content[:out_bytes], content[lse_start:]


def _check(query: Header, payload: memoryview, plan: StepPlan, heads: HeadRange, geometry: PoolGeometry) -> None:
    kv_heads = heads.end - heads.first
    expected = query.rows * query.q_heads * query.head_dim * DTYPE_BYTES[query.dtype]
    wrong = ""
    if query.step != plan.step or query.rows != plan.rows:
        wrong = f"{query.rows} rows of step {query.step}, but the plan has {plan.rows} rows and is for step {plan.step}"
    elif query.layer >= geometry.layers:
        wrong = f"layer {query.layer} of {geometry.layers}"
    elif query.q_heads == 0 or query.q_heads % kv_heads:
        wrong = f"{query.q_heads} query heads over {kv_heads} KV heads"
    elif query.head_dim != geometry.head_dim:
        wrong = f"head_dim {query.head_dim}; the pool's is {geometry.head_dim}"
    elif query.dtype != geometry.dtype or query.out_dtype not in ("float32", geometry.dtype):
        wrong = f"dtypes {query.dtype} and {query.out_dtype}; the pool holds {geometry.dtype}"
    elif not math.isfinite(query.scale) or not math.isfinite(query.softcap):
        wrong = f"scale {query.scale} and softcap {query.softcap} must be finite"
    elif len(payload) != expected:
        wrong = f"{len(payload)} bytes; its shape takes {expected}"
    if wrong:
        raise InvalidRequestError(f"QUERY that cannot be answered: {wrong}")
