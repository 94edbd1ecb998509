"""What every implementation of the attention kernels offers.

The algebra has one concept, the *partial state* ``(out, lse)`` of attention over some of a sequence's keys:

    s_i = softcap(scale * q . k_i)          over the visible keys i of the part
    lse = log sum_i exp(s_i)                natural logarithm, float32, [rows, q_heads]
    out = sum_i exp(s_i - lse) v_i          normalised, [rows, q_heads, head_dim]

(DistAttention, arXiv 2401.02669, with the maximum and the sum of the paper folded into one number.) An empty part has
``lse = -inf`` and ``out = 0``. Two parts merge exactly and in any order:

    lse = logaddexp(lse_a, lse_b),   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.cpu.answering import CompiledQueries
    from kernels.cpu.asking import CompiledAsker


@dataclass(frozen=True, slots=True)
class LayerParams:
    """What one layer's attention needs besides tensors.

    Attributes:
        layer: index of the layer in the blocks.
        scale: factor of the scores, usually head_dim ** -0.5.
        window: a query at position p sees keys in (p - window, p]; 0 means all keys up to p.
        softcap: scores become softcap * tanh(score / softcap); 0 means no cap.
    """

    layer: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which query rows meet which blocks: a ragged batch of S segments, the same for all layers of a step.

    A segment is one sequence's rows and those of its blocks that lie in one pool. Its rows stand one after another and
    have consecutive positions. Its blocks need not be consecutive: each has the position of its first token. A key is
    visible if its position is not after the query's (which also hides the unwritten end of a tail block) and lies
    inside the window. All tensors are int32, contiguous and on the pool's device. Implementations keep what they make
    of a plan for the step's other layers: another batch takes another plan object, or the replay of a CUDA graph.

    Attributes:
        query_start: [S + 1] rows of segment s are query_start[s] .. query_start[s + 1].
        query_pos: [S] position of each segment's first row.
        block_start: [S + 1] blocks of segment s are entries block_start[s] .. block_start[s + 1] of the next two.
        block_ids: [B] index of the block in the pool.
        block_pos: [B] position of the block's first token, ascending within a segment.
        max_query_len: longest segment's rows (chooses the decode or the prefill kernel; known without a device sync).
    """

    query_start: Tensor
    query_pos: Tensor
    block_start: Tensor
    block_ids: Tensor
    block_pos: Tensor
    max_query_len: int

    @property
    def segments(self) -> int:
        return self.query_pos.numel()


class AttentionKernels(ABC):
    """Attention over one pool. Implementations hold no state that a caller can see; one instance serves one thread.

    A pool is one tensor ``[num_blocks, layers, kv_heads, 2, block_tokens, head_dim]`` of float32, bfloat16 or float16;
    query head h reads KV head ``h // (q_heads // kv_heads)``. Sums run in float32 whatever the dtype.
    """

    name: str

    @abstractmethod
    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        """Computes the partial state of every query row over its segment's blocks.

        Args:
            q: [rows, q_heads, head_dim] in the pool's dtype, contiguous in the last two dimensions.
            out: [rows, q_heads, head_dim], float32 or the pool's dtype, contiguous; overwritten.
            lse: [rows, q_heads] float32, contiguous; overwritten. Rows without a visible key get out 0, lse -inf.
        """

    def compiled_queries(
        self, pool: Tensor, plan: AttentionPlan, q_heads: int, out_dtype: torch.dtype
    ) -> CompiledQueries | None:
        """What compiled code needs to compute the same as ``micro_attention`` on this plan, where there is such code.

        Args:
            q_heads: of each query; its rows are those of the plan's segments.
            out_dtype: of the partial outputs.
        """
        return None

    def compiled_asker(
        self, rows: Tensor | None, batch_rows: int, step: int, out_dtype: torch.dtype
    ) -> CompiledAsker | None:
        """What sends a step's queries to one daemon and merges its answers, where there is compiled code for it.

        Args:
            rows: [n] int64 (distinct), the batch's rows that the daemon is asked about; None means all, in order.
            out_dtype: of the partial outputs.
        """
        return None

    @abstractmethod
    def merge_partials(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None = None
    ) -> None:
        """Merges another partial state into ``(out, lse)``, in place.

        Args:
            out: [rows, q_heads, head_dim] float32, contiguous.
            lse: [rows, q_heads] float32, contiguous.
            part_out: [n, q_heads, head_dim] float32, bfloat16 or float16, contiguous.
            part_lse: [n, q_heads] float32, contiguous.
            rows: [n] int64 (distinct), the rows of ``out`` that the part belongs to; None means all, in order.
        """

    @abstractmethod
    def store_kv(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
        """Writes new keys and values into their blocks.

        Args:
            k, v: [rows, kv_heads, head_dim], converted to the pool's dtype.
            slots: [rows] int64, block * block_tokens + offset in the block.
        """

    def merge_sinks(self, out: Tensor, lse: Tensor, sinks: Tensor) -> None:
        """Merges one attention sink per head: a key of score ``sinks[h]`` with value zero ([q_heads], any float)."""
        rows = out.shape[0]
        zeros = torch.zeros_like(out)
        self.merge_partials(out, lse, zeros, sinks.float().expand(rows, -1).contiguous())


def empty_partial(rows: int, q_heads: int, head_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The partial state of no keys at all, float32: the neutral element of merging."""
    out = torch.zeros(rows, q_heads, head_dim, dtype=torch.float32, device=device)
    lse = torch.full((rows, q_heads), float("-inf"), dtype=torch.float32, device=device)
    return out, lse
