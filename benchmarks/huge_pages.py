"""``python -m benchmarks.huge_pages``: what is it worth that a pool lies in huge pages?

One token's attention on one thread over the same blocks in pools of pages of 4 KiB, of such pages that the system was
asked to put together to 2 MiB, and, with ``--reserved``, of huge pages that were reserved (``sysctl
vm.nr_hugepages=600`` suffices, and 0 gives them back).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from benchmarks.harness import Ratio, Run, main
from benchmarks.kernel_cpu import layer_by_layer, peer
from benchmarks.kernel_cpu_cases import PagedCase
from kernels.cpu import CpuKernels
from services.core.errors import InfiniteLLMError
from services.dataplane.kv_pool import Pages

QUESTION = "what is it worth that a pool lies in huge pages?"
REPETITIONS = 7
# context, head_dim, query heads for each KV head, KV heads, sequences
CASES = ((256, 64, 3, 4, 64), (65536, 64, 1, 8, 1), (65536, 128, 4, 8, 1), (65536, 128, 8, 8, 1))
QUICK_CASES = ((1024, 64, 1, 2, 1),)


def measure(run: Run) -> None:
    kernels = CpuKernels(1)
    kinds = [Pages.SMALL, Pages.TOGETHER, *([Pages.RESERVED] if run.options.reserved else [])]
    for context, head_dim, group, kv_heads, sequences in QUICK_CASES if run.quick else CASES:
        try:
            cases = {kind: PagedCase(context, head_dim, group, kv_heads, sequences, pages=kind) for kind in kinds}
        except InfiniteLLMError as error:
            raise SystemExit(f"huge_pages: {error}") from error
        small = cases[Pages.SMALL]
        peers = [
            peer(f"{work} {kind.value}", partial(layer_by_layer, partial(call, kernels), range(small.layers)))
            for kind, case in cases.items()
            for work, call in (("kernel", case.attend), ("read loop", case.read))
        ]
        results = run.alternate(peers, REPETITIONS)
        gigabytes = small.layers * small.layer_bytes * 1e-9
        for kind in kinds[1:]:
            kernel, loop = (
                Ratio.of_speeds(results[f"{work} {kind.value}"], results[f"{work} small"])
                for work in ("kernel", "read loop")
            )
            run.row(
                {
                    "head_dim": head_dim,
                    "group": group,
                    "sequences": sequences,
                    "context": context,
                    "pages": kind.value,
                    "small_gb_per_s": gigabytes / results["kernel small"].median,
                    "gb_per_s": gigabytes / results[f"kernel {kind.value}"].median,
                    **kernel.cells("of_small"),
                    **loop.cells("read_loop"),
                }
            )
        for case in cases.values():
            case.close()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reserved", action="store_true", help="a pool of reserved huge pages, too")


if __name__ == "__main__":
    sys.exit(main("huge_pages", QUESTION, measure, _add_arguments))
