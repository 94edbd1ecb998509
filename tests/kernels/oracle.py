"""Attention written down directly, dense and in float64: what every implementation is compared with."""

from __future__ import annotations

import math
from collections.abc import Set

import torch
from torch import Tensor

from kernels import AttentionPlan, LayerParams


def attention(
    q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, rounded: Set[int] = frozenset()
) -> tuple[Tensor, Tensor]:
    """Row by row, head by head. Answers out [rows, q_heads, head_dim] and lse [rows, q_heads], float64.

    Weights of segments that are ``rounded`` are rounded to bfloat16, at whichever power of two they are kept.
    """
    rows, q_heads, head_dim = q.shape
    group = q_heads // pool.shape[2]
    out = torch.zeros(rows, q_heads, head_dim, dtype=torch.float64)
    lse = torch.full((rows, q_heads), -math.inf, dtype=torch.float64)
    for segment in range(plan.segments):
        listed = range(int(plan.block_start[segment]), int(plan.block_start[segment + 1]))
        for row in range(int(plan.query_start[segment]), int(plan.query_start[segment + 1])):
            position = int(plan.query_pos[segment]) + row - int(plan.query_start[segment])
            slots = [
                (int(plan.block_ids[entry]), offset)
                for entry in listed
                for offset in range(pool.shape[4])
                if is_visible(int(plan.block_pos[entry]) + offset, position, params.window)
            ]
            if not slots:
                continue
            blocks, offsets = (list(x) for x in zip(*slots, strict=True))
            keys = pool[blocks, params.layer, :, 0, offsets].double()  # [keys, kv_heads, head_dim]
            values = pool[blocks, params.layer, :, 1, offsets].double()
            for head in range(q_heads):
                scores = params.scale * keys[:, head // group] @ q[row, head].double()
                if params.softcap > 0:
                    scores = params.softcap * torch.tanh(scores / params.softcap)
                maximum = (
                    scores.max() if segment not in rounded else math.log(2) * torch.ceil(scores.max() / math.log(2))
                )
                weights = torch.exp(scores - maximum)
                if segment in rounded:
                    weights = weights.bfloat16().double()
                lse[row, head] = maximum + torch.log(weights.sum())
                out[row, head] = weights @ values[:, head // group] / weights.sum()
    return out, lse


def is_visible(key: int, query: int, window: int) -> bool:
    return key <= query and (window == 0 or key > query - window)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The state of all parts' keys together, float64, from (out [rows, heads, dim], lse [rows, heads])."""
    outs = torch.stack([out.double() for out, _ in parts])
    lses = torch.stack([lse.double() for _, lse in parts])
    total = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - total).nan_to_num(0.0)  # -inf - -inf: nothing was seen at all
    return (weights.unsqueeze(-1) * outs).sum(0), total
