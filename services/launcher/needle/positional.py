"""Attention to one fixed offset: the weights of a shift head.

A rotary pair of frequency w turns keys by w * position. With constant keys and a query turned back by w * offset, the
key at distance d scores a * cos(w (d - offset)) in that pair. Summed over the fast pairs with weights a_j >= 0:

    score(D) = sum_j a_j cos(w_j D),    D = d - offset;    peak = score(0) = sum_j a_j

Exactness needs a *deficit*, peak - score(D), of tens of nats at every integer D != 0 that a context allows; one offset
where all pairs nearly line up again would be enough to spoil it. The weights below maximise the smallest deficit. They
are the solution of a zero-sum game (weights against offsets) by multiplicative weights on a set of offsets that grew by
the worst ones of a scan over every integer up to 2.2 million, until the scan found none worse; bfloat16 numbers, with
the softmax' factor head_dim ** -0.5 not yet applied. ``smallest_deficit`` does the scan again; the tests hold the
constants against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_SCAN_STEP = 100_000  # offsets at a time: bounds the memory of the scan


@dataclass(frozen=True, slots=True)
class PositionalKernel:
    """Raw scores (before the factor head_dim ** -0.5) of a shift head; all are exact in bfloat16.

    Attributes:
        weights: a_j of the fastest rotary pairs, in order.
        sink: score of a BOS, half-way between the peak and the best wrong offset: a query attends to it if its offset
            reaches back before the sequence's start.
        sink_at_bos: what a query that is BOS itself adds to ``sink``, so that it lies above the peak by the same half.
    """

    weights: tuple[float, ...]
    sink: float
    sink_at_bos: float

    @property
    def peak(self) -> float:
        return sum(self.weights)


# head_dim 128, theta 1e24: deficit 0.159 of the peak, 94 of 591 nats.
STD_KERNEL = PositionalKernel(
    weights=(2192, 528, 426, 428, 418, 396, 212, 264, 245, 282, 240, 241, 296, 231, 79.5, 204),
    sink=6144,
    sink_at_bos=1088,
)

# head_dim 64, theta 1e22: deficit 0.087 of the peak, 94 of 1074 nats.
MINI_KERNEL = PositionalKernel(weights=(1584, 1048, 904, 908, 908, 716, 708, 684, 516, 612), sink=8192, sink_at_bos=896)


def rotary_frequencies(head_dim: int, theta: float) -> Array:
    """Radians per position of every rotary pair, ``[head_dim // 2]``, fastest first; pair j is dims j and j + half."""
    return theta ** -(np.arange(0, head_dim, 2) / head_dim)


def smallest_deficit(kernel: PositionalKernel, frequencies: Array, max_offset: int) -> float:
    """Smallest peak - score(D) over every integer 1 <= D <= max_offset, as a part of the peak."""
    weights = np.array(kernel.weights) / kernel.peak
    pairs = frequencies[: len(weights)]
    smallest = np.inf
    for start in range(1, max_offset + 1, _SCAN_STEP):
        offsets = np.arange(start, min(start + _SCAN_STEP, max_offset + 1), dtype=np.float64)
        smallest = min(smallest, float(((1.0 - np.cos(offsets[:, None] * pairs)) @ weights).min()))
    return smallest
