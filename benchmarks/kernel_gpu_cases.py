"""What ``python -m benchmarks.kernel_gpu`` measures with: memory on the GPU, queries, plans, and a clock for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kernels import AttentionKernels, LayerParams
from kernels.reference import ReferenceKernels
from kernels.triton.tune import plan_of

BLOCK_TOKENS = 64
STEP_BYTES = 1 << 30  # all layers together: many times what a GPU's cache holds
COPY_BYTES = 1 << 30
PRODUCT_SIDE = 8192
_CHECKED_ROWS = 32  # at either end of a chunk
_SAMPLE_SECONDS = 0.02


class PagedCase:
    """Sequences of these lengths in a pool of their own, and one row or chunk of queries at the end of each."""

    def __init__(
        self,
        contexts: list[int],
        head_dim: int,
        group: int,
        kv_heads: int,
        device: torch.device,
        rows: int = 1,
        layers: int = 0,
    ) -> None:
        self.contexts, self.head_dim, self.group, self.kv_heads, self.rows = contexts, head_dim, group, kv_heads, rows
        blocks = sum(context // BLOCK_TOKENS for context in contexts)
        self.layer_bytes = blocks * BLOCK_TOKENS * kv_heads * head_dim * 2 * 2
        self.layers = layers or max(2, -(-STEP_BYTES // self.layer_bytes))
        shape = (blocks, self.layers, kv_heads, 2, BLOCK_TOKENS, head_dim)
        self.pool = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
        self.plan = plan_of(contexts, rows, BLOCK_TOKENS, device)
        q_shape = (rows * len(contexts), kv_heads * group, head_dim)
        self.q = torch.empty(q_shape, dtype=torch.bfloat16, device=device).normal_()
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(q_shape[:2], device=device)
        self._params = [LayerParams(layer, head_dim**-0.5) for layer in range(self.layers)]

    def attend(self, kernels: AttentionKernels) -> None:
        """Micro-attention of all layers, one after another."""
        for params in self._params:
            kernels.micro_attention(self.q, self.pool, self.plan, params, self.out, self.lse)

    def check(self, kernels: AttentionKernels) -> None:
        """Compares the last layer's first and last rows with the reference.

        Raises:
            SystemExit: they differ by more than bfloat16 explains.
        """
        params = self._params[-1]
        kernels.micro_attention(self.q, self.pool, self.plan, params, self.out, self.lse)
        count = min(self.rows, _CHECKED_ROWS)
        for first in {0, self.rows - count}:
            some = [number * self.rows + first + row for number in range(len(self.contexts)) for row in range(count)]
            index = torch.tensor(some, device=self.q.device)
            plan = dataclasses.replace(
                self.plan,
                query_start=(torch.arange(len(self.contexts) + 1) * count).to(self.plan.query_start),
                query_pos=self.plan.query_pos + first,
                max_query_len=count,
            )
            expected = torch.empty(len(some), *self.q.shape[1:], device=self.q.device)
            expected_lse = torch.empty(expected.shape[:2], device=self.q.device)
            ReferenceKernels().micro_attention(self.q[index], self.pool, plan, params, expected, expected_lse)
            error = float((self.out[index].float() - expected).abs().max() / expected.abs().max())
            lse_error = float((self.lse[index] - expected_lse).abs().max())
            if not error <= 0.03 or not lse_error <= 0.01:
                raise SystemExit(
                    f"kernel_gpu: contexts {self.contexts}, head_dim {self.head_dim}, group {self.group}, {self.rows} "
                    f"rows: out is off by {error:.2g} of its largest, lse by {lse_error:.2g}"
                )

    @property
    def flop(self) -> float:
        """Of one layer: of the pairs of a query row and a key that it sees."""
        pairs = sum(context - self.rows + row + 1 for context in self.contexts for row in range(self.rows))
        return 4.0 * self.head_dim * self.group * self.kv_heads * pairs


class FlashCase:
    """Torch's flash attention over as many contiguous keys and values; all sequences are of one length.

    A group's query heads are rows of one head, which is the same for decoding: each key is read once.
    """

    def __init__(self, like: PagedCase) -> None:
        sequences, device = len(like.contexts), like.q.device
        shape = (like.layers, 2, sequences, like.kv_heads, like.contexts[0], like.head_dim)
        self._kv = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()
        q_shape = (sequences, like.kv_heads, like.group, like.head_dim)
        self._q = torch.empty(q_shape, dtype=torch.bfloat16, device=device).normal_()

    def attend(self) -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for kv in self._kv:
                scaled_dot_product_attention(self._q, kv[0], kv[1])


class CopyCase:
    """A copy on the device: as many bytes are read as are written."""

    def __init__(self, device: torch.device) -> None:
        self._from = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)
        self.bytes = 2 * COPY_BYTES

    def copy(self) -> None:
        self._to.copy_(self._from)


class ProductCase:
    """A square matrix product in bfloat16, of random numbers."""

    def __init__(self, device: torch.device) -> None:
        shape = (PRODUCT_SIDE, PRODUCT_SIDE)
        self._a, self._b = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
        self._out = torch.empty_like(self._a)
        self.flop = 2.0 * PRODUCT_SIDE**3

    def multiply(self) -> None:
        torch.mm(self._a, self._b, out=self._out)


def gpu_clock(work: Callable[[], None]) -> Callable[[], float]:
    """Captures work in a CUDA graph; answers what replays it for a while and says the seconds of one replay.

    So the time is the GPU's alone: a launch from Python takes longer than a layer of a short sequence.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # compiles what is to be compiled
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def seconds(replays: int) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        for _ in range(replays):
            graph.replay()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) * 1e-3 / replays

    replays = max(1, min(1000, round(_SAMPLE_SECONDS / seconds(1))))
    return lambda: seconds(replays)
