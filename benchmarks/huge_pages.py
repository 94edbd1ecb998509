"""``python -m benchmarks.huge_pages``: what is it worth that a pool lies in huge pages?

One token's attention on one thread over the same blocks in two pools, of pages of 4 KiB and of huge pages of 2 MiB. The
latter must have been reserved: ``sysctl vm.nr_hugepages=600`` suffices, and 0 gives them back.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.harness import Ratio, Run, main
from benchmarks.kernel_cpu import layer_by_layer, peer
from benchmarks.kernel_cpu_cases import PagedCase
from kernels.cpu import CpuKernels
from services.core.errors import InfiniteLLMError

QUESTION = "what is it worth that a pool lies in huge pages?"
REPETITIONS = 7
# context, head_dim, query heads for each KV head, KV heads, sequences
CASES = ((256, 64, 3, 4, 64), (65536, 64, 1, 8, 1), (65536, 128, 4, 8, 1), (65536, 128, 8, 8, 1))
QUICK_CASES = ((1024, 64, 1, 2, 1),)


def measure(run: Run) -> None:
    kernels = CpuKernels(1)
    for context, head_dim, group, kv_heads, sequences in QUICK_CASES if run.quick else CASES:
        try:
            small, huge = (
                PagedCase(context, head_dim, group, kv_heads, sequences, huge_pages=pages) for pages in (False, True)
            )
        except InfiniteLLMError as error:
            raise SystemExit(f"huge_pages: {error}") from error
        layers = range(small.layers)
        peers = [
            peer(f"{work} {name}", partial(layer_by_layer, partial(call, kernels), layers))
            for name, case in (("small", small), ("huge", huge))
            for work, call in (("kernel", case.attend), ("read loop", case.read))
        ]
        results = run.alternate(peers, REPETITIONS)
        gigabytes = small.layers * small.layer_bytes * 1e-9
        run.row(
            {
                "head_dim": head_dim,
                "group": group,
                "sequences": sequences,
                "context": context,
                "gb_per_s": gigabytes / results["kernel small"].median,
                "huge_gb_per_s": gigabytes / results["kernel huge"].median,
                **Ratio.of_speeds(results["kernel huge"], results["kernel small"]).cells("huge_of_small"),
                **Ratio.of_speeds(results["read loop huge"], results["read loop small"]).cells("read_loop"),
            }
        )
        small.close()
        huge.close()


if __name__ == "__main__":
    sys.exit(main("huge_pages", QUESTION, measure))
