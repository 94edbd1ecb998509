"""The pool's memory as the worker thread sees it: blocks of the present geometry, and attention over them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kernels import AttentionKernels, LayerParams
from kernels.cpu.answering import CompiledQueries
from services.core.blocks import DTYPE_BYTES, PoolGeometry
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
        self._answer = torch.empty(0, dtype=torch.uint8)

    def use(self, geometry: PoolGeometry) -> None:
        """Looks at the memory as blocks of this geometry from now on."""
        if geometry != self._geometry:
            self._blocks = self._pool.as_tensor(geometry)
            self._bytes = BlockBytes(self._blocks, self._device)
            self._geometry = geometry

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

    def context_tokens(self, plan: StepPlan) -> float:
        """Tokens of all blocks of a plan, divided by the number of layers: one layer's share of a step's work."""
        assert self._geometry is not None
        return len(plan.attention.block_ids) * self._geometry.block_tokens / self._geometry.layers

    def compiled_queries(self, plan: StepPlan, q_heads: int, out_dtype: str) -> CompiledQueries | None:
        """What compiled code needs to answer the plan's queries, if the kernels have such code."""
        assert self._geometry is not None
        return self._kernels.compiled_queries(self._blocks, plan.attention, q_heads, _TORCH_DTYPES[out_dtype])

    def attend(
        self, query: Header, payload: memoryview, plan: StepPlan, max_answer_bytes: int
    ) -> tuple[memoryview, memoryview]:
        """Computes one layer's partial state over the plan's blocks.

        Args:
            payload: q, [rows, q_heads, head_dim] of ``query.dtype``.
            max_answer_bytes: the longest message that the asker takes.

        Returns:
            out, [rows, q_heads, head_dim] of ``query.out_dtype``, and lse, [rows, q_heads] float32, as bytes.

        Raises:
            InvalidRequestError: the query does not fit the plan or the pool.
        """
        assert self._geometry is not None
        _check(query, payload, plan, self._geometry)
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
                self._blocks,
                plan.attention,
                LayerParams(query.layer, query.scale, query.window, query.softcap),
                answer[:out_bytes].view(_TORCH_DTYPES[query.out_dtype]).view(shape),
                answer[lse_start:].view(torch.float32).view(shape[:2]),
            )
        content = self._device.download(answer).wait()
        return content[:out_bytes], content[lse_start:]


def _check(query: Header, payload: memoryview, plan: StepPlan, geometry: PoolGeometry) -> None:
    expected = query.rows * query.q_heads * query.head_dim * DTYPE_BYTES[query.dtype]
    wrong = ""
    if query.step != plan.step or query.rows != plan.rows:
        wrong = f"{query.rows} rows of step {query.step}, but the plan has {plan.rows} rows and is for step {plan.step}"
    elif query.layer >= geometry.layers:
        wrong = f"layer {query.layer} of {geometry.layers}"
    elif query.q_heads == 0 or query.q_heads % geometry.kv_heads:
        wrong = f"{query.q_heads} query heads over {geometry.kv_heads} KV heads"
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
