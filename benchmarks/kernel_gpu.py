"""``python -m benchmarks.kernel_gpu``: how near do the Triton kernels come to what the GPU can do?

Decoding is held against a copy on the device and against torch's flash attention over contiguous keys and values,
prefill chunks against torch's own matrix product. Every case is compared with the reference before it is measured.
Sizes of tiles that were not tuned on this GPU yet are tuned first, and kept for whatever runs here later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Peer, Ratio, Run, main
from benchmarks.kernel_gpu_cases import CopyCase, FlashCase, PagedCase, ProductCase, gpu_clock
from kernels.triton import TritonKernels
from kernels.triton.tiling import Kind
from kernels.triton.tune import tune
from kernels.triton.tuning import TilingCache

QUESTION = "how near do the Triton kernels come to the GPU's copy bandwidth, flash attention and matrix products?"
# What is measured unless the command line says otherwise: in full, and with --quick.
DEFAULTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "contexts": ((1024, 4096, 16384, 65536, 262144), (1024, 65536)),
    "prefill_contexts": ((8192, 65536), (8192,)),
    "chunks": ((512, 2048, 8192), (2048,)),
    "head_dims": ((128, 64), (128,)),
    "groups": ((1, 4, 8), (4,)),
}
PARTS = ("decode", "batch", "prefill")
TUNE = ("missing", "again", "never")
REPETITIONS = 5
_GOAL_CONTEXT, _GOAL_DIM, _GOAL_CHUNK = 65536, 128, 8192
_MANY = 32  # sequences
_TUNED_CONTEXT = 65536

Clock = Callable[[Callable[[], None]], Callable[[], float]]


def find_device() -> torch.device:
    if not torch.cuda.is_available():
        print("kernel_gpu: no GPU that torch can use: torch.cuda.is_available() is False", file=sys.stderr)
        raise SystemExit(2)
    return torch.device("cuda", torch.cuda.current_device())


class Bench:
    """The run, the kernels and the yardsticks, which all cases share."""

    def __init__(self, run: Run, device: torch.device, clock: Clock) -> None:
        self.run, self.device, self.clock = run, device, clock
        self.cache = TilingCache()
        self.kernels = TritonKernels(cache=self.cache)
        self.copy = CopyCase(device)
        self.product = ProductCase(device)
        self._copy_peer = Peer("copy", clock(self.copy.copy))
        self._product_peer = Peer("product", clock(self.product.multiply))

    def tune(self, case: PagedCase, kind: Kind) -> None:
        if self.run.options.tune == "never":
            return
        self.run.progress.update(f"tunes {kind.value}, head_dim {case.head_dim}, group {case.group}")
        tune(case.pool, case.kv_heads * case.group, self.cache, [kind], again=self.run.options.tune == "again")

    def decode(self, case: PagedCase, batch: str) -> None:
        case.check(self.kernels)
        equal = len(set(case.contexts)) == 1
        peers = [self._copy_peer, Peer("kernel", self.clock(partial(case.attend, self.kernels)))]
        if equal:
            peers.append(Peer("flash", self.clock(FlashCase(case).attend)))
        results = self.run.alternate(peers, REPETITIONS)
        work = case.layers * case.layer_bytes
        of_copy = Ratio.of_speeds(results["kernel"], results["copy"], work / self.copy.bytes)
        of_flash = Ratio.of_speeds(results["kernel"], results["flash"]) if equal else None
        self.run.row(
            {
                "part": "decode",
                "batch": batch,
                "head_dim": case.head_dim,
                "group": case.group,
                "context": max(case.contexts),
                "us_per_layer": results["kernel"].median / case.layers * 1e6,
                "gb_per_s": work * 1e-9 / results["kernel"].median,
                "copy_gb_per_s": self.copy.bytes * 1e-9 / results["copy"].median,
                **of_copy.cells("of_copy"),
                **(of_flash.cells("of_flash") if of_flash else {}),
            }
        )
        if batch == "one" and case.contexts == [_GOAL_CONTEXT] and case.head_dim == _GOAL_DIM:
            name = f"decode_group{case.group}_{_GOAL_CONTEXT}"
            self.run.target(f"{name}_of_copy", of_copy.median, at_least=0.85)
            if of_flash:
                self.run.target(f"{name}_of_flash", of_flash.median, at_least=1.0)

    def prefill(self, case: PagedCase) -> None:
        case.check(self.kernels)
        peers = (self._product_peer, Peer("kernel", self.clock(partial(case.attend, self.kernels))))
        results = self.run.alternate(peers, REPETITIONS)
        work = case.layers * case.flop
        ratio = Ratio.of_speeds(results["kernel"], results["product"], work / self.product.flop)
        self.run.row(
            {
                "part": "prefill",
                "head_dim": case.head_dim,
                "group": case.group,
                "context": case.contexts[0],
                "rows": case.rows,
                "tflop_per_s": work * 1e-12 / results["kernel"].median,
                "product_tflop_per_s": self.product.flop * 1e-12 / results["product"].median,
                **ratio.cells("of_product"),
            }
        )
        if (case.rows, case.contexts[0], case.head_dim) == (_GOAL_CHUNK, _GOAL_CONTEXT, _GOAL_DIM):
            self.run.target(f"prefill_group{case.group}_{case.rows}x{case.contexts[0]}", ratio.median, at_least=0.6)


def measure_decode(bench: Bench) -> None:
    """One token of one sequence."""
    options = bench.run.options
    for head_dim in options.head_dims:
        for group in options.groups:
            tuned = max(options.contexts, key=lambda context: -abs(context - _TUNED_CONTEXT))
            for context in sorted(options.contexts, key=lambda context: context != tuned):
                case = PagedCase([context], head_dim, group, options.kv_heads, bench.device)
                if context == tuned:
                    bench.tune(case, Kind.DECODE)
                bench.decode(case, "one")


def measure_batch(bench: Bench) -> None:
    """One token each of many sequences of one length, and of a long one beside many short ones."""
    options = bench.run.options
    longest = min(_GOAL_CONTEXT, max(options.contexts))
    batches = {
        "many": [max(64, longest // 16)] * _MANY,
        "ragged": [longest, *[max(64, longest // 64 // 64 * 64 * (1 + number % 3)) for number in range(_MANY - 1)]],
    }
    for group in options.groups:
        for name, contexts in batches.items():
            case = PagedCase(contexts, options.head_dims[0], group, options.kv_heads, bench.device)
            bench.decode(case, name)


def measure_prefill(bench: Bench) -> None:
    """The last rows of a context, one layer."""
    options = bench.run.options
    for head_dim in options.head_dims:
        for group in options.groups:
            for context in sorted(options.prefill_contexts, reverse=True):
                for rows in sorted({min(rows, context) for rows in options.chunks}, reverse=True):
                    # As many query heads whatever the group: a chunk of an 8B model.
                    kv_heads = max(1, options.kv_heads * 4 // group)
                    case = PagedCase([context], head_dim, group, kv_heads, bench.device, rows, layers=1)
                    bench.tune(case, Kind.PREFILL)
                    bench.prefill(case)


def measure(run: Run, clock: Clock = gpu_clock) -> None:
    device = find_device()
    for name, (full, quick) in DEFAULTS.items():
        if getattr(run.options, name) is None:
            setattr(run.options, name, quick if run.quick else full)
    bench = Bench(run, device, clock)
    parts = {"decode": measure_decode, "batch": measure_batch, "prefill": measure_prefill}
    for part in run.options.parts:
        parts[part](bench)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads (default: 8)")
    parser.add_argument("--tune", choices=TUNE, default=TUNE[0], help="which sizes of tiles to measure first")
    for name, (full, _) in DEFAULTS.items():
        text = f"default: {' '.join(map(str, full))}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="+", metavar="N", help=text)


if __name__ == "__main__":
    sys.exit(main("kernel_gpu", QUESTION, measure, add_arguments))
