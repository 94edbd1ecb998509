"""``python -m benchmarks.kernel_cpu``: how near does the compiled CPU kernel come to what the machine can do?

Decoding is held against a loop that reads the same memory and does nothing else, and against torch's flash attention
over contiguous keys and values; two threads against one; prefill chunks against torch's own matrix products; linear
layers with packed weights against torch's; and the calls of a layer with a plan that was seen before against those with
a new one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.harness import Peer, Ratio, Run, main
from benchmarks.kernel_cpu_cases import ContiguousCase, LayerCase, LinearCase, PagedCase, ProductsCase
from kernels.cpu import CpuKernels

QUESTION = "how near does the compiled CPU kernel come to the memory's bandwidth and to torch's matrix products?"
# What is measured unless the command line says otherwise: in full, and with --quick.
DEFAULTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "contexts": ((1024, 4096, 16384, 65536, 262144), (1024,)),
    "thread_contexts": ((4096, 65536), (1024,)),
    "prefill_contexts": ((4096, 16384, 65536), (256,)),
    "chunks": ((512, 2048), (128,)),
    "linear_rows": ((1, 4, 16, 64, 512), (1, 16)),
    "head_dims": ((128, 64), (64,)),
    "groups": ((1, 4, 8), (1, 4)),
}
PARTS = ("decode", "threads", "prefill", "linear", "call")
REPETITIONS = 7
_GOAL_GROUPS = (1, 4)
_LINEAR = (896, 4864)  # inputs and outputs, and the other way round
_SHORT = 16  # sequences, where many short ones share what one long one has otherwise
_CACHE_BYTES = 16 << 20  # a layer that a last-level cache may hold is also measured there
SAMPLE_BYTES = 64 << 20  # read at least for one sample
_ATTEMPTS = 3
_CALLS = 300

Clock = Callable[[], float]


def layer_by_layer(call: Callable[[int], None], layers: Sequence[int]) -> None:
    for layer in layers:
        call(layer)


def peer(name: str, work: Callable[[], None], clock: Clock = time.thread_time) -> Peer:
    """Seconds of the best of a few attempts.

    On one thread they are seconds of processor time: turns that other processes take do not count, though what they do
    to memory and caches does.
    """

    def measure() -> float:
        seconds = []
        for _ in range(_ATTEMPTS):
            start = clock()
            work()
            seconds.append(clock() - start)
        return min(seconds)

    return Peer(name, measure)


def measure_decode(run: Run) -> None:
    """One token of one sequence, on one thread.

    ``memory``: layer after layer, as a step goes, all layers together more than a cache holds. ``cache``: one layer
    again and again. The read loop reads the same blocks; ``contiguous`` is the read loop over as many bytes in a row.
    """
    kernels = CpuKernels(1)
    options = run.options
    for head_dim in options.head_dims:
        for context in options.contexts:
            for group in options.groups:
                case = PagedCase(context, head_dim, group, options.kv_heads)
                flat = ContiguousCase(case)
                _decode(run, case, flat, kernels, "memory", range(case.layers))
                if case.layer_bytes <= _CACHE_BYTES:
                    _decode(run, case, flat, kernels, "cache", [0] * max(1, SAMPLE_BYTES // case.layer_bytes))
                case.close()


def _decode(
    run: Run, case: PagedCase, flat: ContiguousCase, kernels: CpuKernels, state: str, layers: Sequence[int]
) -> None:
    peers = (
        peer("read loop", partial(layer_by_layer, partial(case.read, kernels), layers)),
        peer("contiguous", partial(layer_by_layer, partial(flat.read, kernels), layers)),
        peer("kernel", partial(layer_by_layer, partial(case.attend, kernels), layers)),
        peer("flash", partial(layer_by_layer, flat.flash, layers)),
    )
    results = run.alternate(peers, REPETITIONS)
    gigabytes = len(layers) * case.layer_bytes * 1e-9
    of_read = Ratio.of_speeds(results["kernel"], results["read loop"])
    of_contiguous = Ratio.of_speeds(results["kernel"], results["contiguous"])
    of_flash = Ratio.of_speeds(results["kernel"], results["flash"])
    run.row(
        {
            "part": "decode",
            "state": state,
            "head_dim": case.head_dim,
            "group": case.group,
            "context": case.context,
            "gb_per_s": gigabytes / results["kernel"].median,
            "read_gb_per_s": gigabytes / results["read loop"].median,
            **of_read.cells("of_read"),
            **of_contiguous.cells("of_contiguous"),
            **of_flash.cells("of_flash"),
        }
    )
    if case.group in _GOAL_GROUPS and state == "memory":
        name = f"decode_dim{case.head_dim}_group{case.group}_{case.context}"
        run.target(f"{name}_of_read", of_read.median, at_least=0.7)
        run.target(f"{name}_of_flash", of_flash.median, at_least=2.0)


def measure_threads(run: Run) -> None:
    """Two threads, on one long sequence and on many short ones, by the clock on the wall."""
    options = run.options
    head_dim = options.head_dims[0]
    for context in options.thread_contexts:
        for group in options.groups:
            for sequences in (1, _SHORT):
                case = PagedCase(max(64, context // sequences), head_dim, group, options.kv_heads, sequences)
                _threads(run, case)
                case.close()


def _threads(run: Run, case: PagedCase) -> None:
    peers = []
    for threads in (1, 2):
        kernels = CpuKernels(threads)
        for name, call in (("read loop", case.read), ("kernel", case.attend)):
            work = partial(layer_by_layer, partial(call, kernels), range(case.layers))
            peers.append(peer(f"{name} {threads}", work, time.perf_counter))
    results = run.alternate(peers, REPETITIONS)
    two_of_one = Ratio.of_speeds(results["kernel 2"], results["kernel 1"])
    of_read = Ratio.of_speeds(results["kernel 2"], results["read loop 2"])
    run.row(
        {
            "part": "threads",
            "head_dim": case.head_dim,
            "group": case.group,
            "context": case.context,
            "sequences": case.sequences,
            "gb_per_s": case.layers * case.layer_bytes * 1e-9 / results["kernel 2"].median,
            **two_of_one.cells("two_of_one"),
            **of_read.cells("of_read"),
            **Ratio.of_speeds(results["read loop 2"], results["read loop 1"]).cells("read_two_of_one"),
        }
    )
    if case.group in _GOAL_GROUPS:
        # Either goal will do: 1.8 times one thread, or 85 % of what two threads read.
        name = f"threads_group{case.group}_{case.sequences}x{case.context}_of_goal"
        run.target(name, max(two_of_one.median / 1.8, of_read.median / 0.85), at_least=1.0)


def measure_prefill(run: Run) -> None:
    """The last rows of a context, four query heads that share their keys, on one thread.

    The kernel's rate counts the pairs of row and key that are visible; torch's products compute all pairs.
    """
    kernels = CpuKernels(1)
    options = run.options
    for head_dim in options.head_dims:
        for rows in options.chunks:
            for context in options.prefill_contexts:
                case = PagedCase(context, head_dim, 4, 1, rows=min(rows, context), layers=1)
                products = ProductsCase(case.rows, context, head_dim)
                peers = (peer("kernel", partial(case.attend, kernels, 0)), peer("products", products.multiply))
                results = run.alternate(peers, REPETITIONS)
                flop = 4 * head_dim * case.group * case.visible_pairs
                ratio = Ratio.of_speeds(
                    results["kernel"], results["products"], case.group * case.visible_pairs / products.pairs
                )
                run.row(
                    {
                        "part": "prefill",
                        "head_dim": head_dim,
                        "rows": case.rows,
                        "context": context,
                        "gflop_per_s": flop * 1e-9 / results["kernel"].median,
                        **ratio.cells("of_products"),
                    }
                )
                run.target(f"prefill_dim{head_dim}_{case.rows}x{context}_of_products", ratio.median, at_least=0.6)
                case.close()


def measure_linear(run: Run) -> None:
    """A linear layer's product of some rows, on one thread; weights come from memory."""
    for dtype in (torch.bfloat16, torch.float32):
        for inputs, outputs in (_LINEAR, _LINEAR[::-1]):
            layers = 1 + SAMPLE_BYTES // (inputs * outputs * dtype.itemsize)
            for rows in run.options.linear_rows:
                case = LinearCase(rows, inputs, outputs, dtype, layers)
                used = range(layers if rows < 64 else 1)  # with many rows it is arithmetic that counts
                peers = (
                    peer("kernel", partial(layer_by_layer, case.multiply, used)),
                    peer("torch", partial(layer_by_layer, case.multiply_by_torch, used)),
                )
                results = run.alternate(peers, REPETITIONS)
                seconds = results["kernel"].median / len(used)
                run.row(
                    {
                        "part": "linear",
                        "dtype": str(dtype).removeprefix("torch."),
                        "inputs": inputs,
                        "outputs": outputs,
                        "rows": rows,
                        "gb_per_s": inputs * outputs * dtype.itemsize * 1e-9 / seconds,
                        "gflop_per_s": 2 * rows * inputs * outputs * 1e-9 / seconds,
                        **Ratio.of_speeds(results["kernel"], results["torch"]).cells("of_torch"),
                    }
                )


def measure_call(run: Run) -> None:
    """What a layer costs besides attention, ``store_kv`` and ``micro_attention``: one block of one small head."""
    case = LayerCase(CpuKernels(1))
    calls = [0, 1] * _CALLS  # of layers
    peers = (
        peer("new plan", partial(layer_by_layer, case.call_with_new_plan, calls)),
        peer("known plan", partial(layer_by_layer, case.call, calls)),
    )
    results = run.alternate(peers, REPETITIONS)
    for name, samples in results.items():
        run.row({"part": "call", "plan": name, "microseconds": samples.median / len(calls) * 1e6})
    run.summary("known_plan_of_new", Ratio.of_speeds(results["known plan"], results["new plan"]).median)


def measure(run: Run) -> None:
    torch.set_num_threads(1)
    for name, (full, quick) in DEFAULTS.items():
        if getattr(run.options, name) is None:
            setattr(run.options, name, quick if run.quick else full)
    measures = (measure_decode, measure_threads, measure_prefill, measure_linear, measure_call)
    for part, measure_part in zip(PARTS, measures, strict=True):
        if part in run.options.parts:
            measure_part(run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads in decoding (default: 8)")
    for name, (full, _) in DEFAULTS.items():
        text = f"default: {' '.join(map(str, full))}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="+", metavar="N", help=text)


if __name__ == "__main__":
    sys.exit(main("kernel_cpu", QUESTION, measure, add_arguments))
