"""Chooses tokens from rows of logits, without a copy of them in another dtype: compiled on the CPU, else by torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_SCALE = 3e38  # of float32: a temperature near 0 is greedy, not a NaN
_TORCH_ELEMENTS = 1 << 20  # converted at a time


def argmax(logits: Tensor) -> list[int]:
    """The first of the most probable tokens of each row.

    Args:
        logits: [n, vocab_size].
    """
    from kernels.cpu.sampling import choose, is_native

    if is_native(logits):
        return choose(logits, None, None)
    return torch_argmax(logits)


def draw(logits: Tensor, temperatures: Sequence[float], uniforms: Sequence[float]) -> list[int]:
    """Inverse transform sampling: the first token at which the cumulative probability exceeds the row's number.

    Args:
        logits: [n, vocab_size].
        temperatures: of each row, positive.
        uniforms: of each row, in [0, 1).
    """
    from kernels.cpu.sampling import choose, is_native

    if is_native(logits):
        return choose(logits, [min(math.log2(math.e) / t, _LARGEST_SCALE) for t in temperatures], uniforms)
    return torch_draw(logits, temperatures, uniforms)


def torch_argmax(logits: Tensor) -> list[int]:
    """``argmax`` in plain torch."""
    tokens: list[int] = []
    for rows in _parts(logits):
        tokens += rows.float().argmax(dim=-1).tolist()
    return tokens


def torch_draw(logits: Tensor, temperatures: Sequence[float], uniforms: Sequence[float]) -> list[int]:
    """``draw`` in plain torch, float64."""
    tokens: list[int] = []
    for rows in _parts(logits):
        part = slice(len(tokens), len(tokens) + len(rows))
        temperature = torch.tensor(temperatures[part], dtype=torch.float64, device=logits.device)[:, None]
        uniform = torch.tensor(uniforms[part], dtype=torch.float64, device=logits.device)[:, None]
        shifted = rows.double() - rows.double().amax(dim=-1, keepdim=True)
        cumulative = torch.softmax(shifted / temperature, dim=-1).cumsum(dim=-1)
        index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        tokens += index.clamp_max(logits.shape[1] - 1)[:, 0].tolist()
    return tokens


def _parts(logits: Tensor) -> Sequence[Tensor]:
    """A few rows at a time: their copies stay in the cache."""
    return torch.split(logits, max(1, _TORCH_ELEMENTS // logits.shape[1])) if len(logits) else ()
