"""The attention kernels in plain torch: what the compiled ones are tested against, and the fallback without them.

Keys are taken a few blocks at a time; each group's partial state is computed densely and merged into the state of the
groups before it, so that no temporary grows with the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.interface import AttentionKernels, AttentionPlan, LayerParams, empty_partial

_KEYS_PER_GROUP = 1024
_MINUS_INFINITY = float("-inf")


class ReferenceKernels(AttentionKernels):
    """Plain torch, on any device. Reads the plan on the host, so it is slow on a GPU."""

    name = "reference"

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        block_tokens = pool.shape[4]
        group_blocks = max(1, _KEYS_PER_GROUP // block_tokens)
        query_start, query_pos = plan.query_start.tolist(), plan.query_pos.tolist()
        block_start = plan.block_start.tolist()
        out.zero_()
        lse.fill_(_MINUS_INFINITY)
        for segment in range(plan.segments):
            rows = slice(query_start[segment], query_start[segment + 1])
            count = rows.stop - rows.start
            if count == 0:
                continue
            first = query_pos[segment]
            positions = torch.arange(first, first + count, device=q.device)
            total, total_lse = empty_partial(count, q.shape[1], q.shape[2], q.device)
            for start in range(block_start[segment], block_start[segment + 1], group_blocks):
                group = slice(start, min(start + group_blocks, block_start[segment + 1]))
                part, part_lse = _dense_partial(
                    q[rows].float(), positions, pool, plan.block_ids[group], plan.block_pos[group], params
                )
                self.merge_partials(total, total_lse, part, part_lse)
            out[rows] = total.to(out.dtype)
            lse[rows] = total_lse

    def merge_partials(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None = None
    ) -> None:
        old_out, old_lse = (out, lse) if rows is None else (out[rows], lse[rows])
        merged_lse = torch.logaddexp(old_lse, part_lse)
        # Where both sides are empty the merged lse is -inf and -inf - -inf is NaN: their weights are zero.
        shift = merged_lse.masked_fill(merged_lse == _MINUS_INFINITY, 0.0)
        old_weight = torch.exp(old_lse - shift).unsqueeze(-1)
        part_weight = torch.exp(part_lse - shift).unsqueeze(-1)
        merged = old_weight * old_out + part_weight * part_out.float()
        if rows is None:
            out.copy_(merged)
            lse.copy_(merged_lse)
        else:
            out[rows] = merged
            lse[rows] = merged_lse

    def store_kv(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
        block_tokens = pool.shape[4]
        blocks = torch.div(slots, block_tokens, rounding_mode="floor")
        offsets = slots - blocks * block_tokens
        pool[blocks, layer, :, 0, offsets] = k.to(pool.dtype)
        pool[blocks, layer, :, 1, offsets] = v.to(pool.dtype)


def _dense_partial(
    q: Tensor, positions: Tensor, pool: Tensor, block_ids: Tensor, block_pos: Tensor, params: LayerParams
) -> tuple[Tensor, Tensor]:
    """Partial state of some rows over a few blocks, all scores at once.

    Args:
        q: [rows, q_heads, head_dim] float32.
        positions: [rows] of the query rows.
        block_ids, block_pos: [blocks] where the blocks lie in the pool, and the position of their first token.

    Returns:
        out [rows, q_heads, head_dim] and lse [rows, q_heads], float32.
    """
    rows, q_heads, head_dim = q.shape
    kv_heads, block_tokens = pool.shape[2], pool.shape[4]
    offsets = torch.arange(block_tokens, device=q.device)
    key_positions = (block_pos.long().unsqueeze(1) + offsets).flatten()  # [keys]
    visible = key_positions <= positions.unsqueeze(1)  # [rows, keys]
    if params.window > 0:
        visible &= key_positions > positions.unsqueeze(1) - params.window

    # [blocks, kv_heads, 2, block_tokens, head_dim] -> [2, kv_heads, keys, head_dim]
    slab = pool[block_ids.long(), params.layer].float()
    keys, values = slab.permute(2, 1, 0, 3, 4).reshape(2, kv_heads, -1, head_dim).unbind(0)
    # What no row sees may never have been written; zero times NaN would be NaN.
    values = values.masked_fill(~visible.any(0).unsqueeze(-1), 0.0)

    grouped = q.reshape(rows, kv_heads, q_heads // kv_heads, head_dim)
    scores = params.scale * torch.einsum("nhgd,hkd->nhgk", grouped, keys)
    if params.softcap > 0:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    scores = scores.masked_fill(~visible[:, None, None, :], _MINUS_INFINITY)

    maximum = scores.amax(-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == _MINUS_INFINITY, 0.0)  # rows that see nothing
    weights = torch.exp(scores - maximum)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("nhgk,hkd->nhgd", weights / total.masked_fill(total == 0, 1.0), values)
    lse = (maximum + torch.log(total)).squeeze(-1)
    return out.reshape(rows, q_heads, head_dim), lse.reshape(rows, q_heads)
