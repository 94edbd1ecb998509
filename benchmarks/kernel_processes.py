"""The attention kernel in processes of its own, each on a core: what memories and cores give with no system around."""

from __future__ import annotations

import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Literal, Self

from benchmarks.kernel_cpu_cases import PagedCase
from kernels.cpu import CpuKernels
from services.core.blocks import PoolGeometry

_START_TIMEOUT_S = 120.0

Work = Literal["attend", "read"]


class KernelProcess:
    """One process, pinned to one core, with one decoding sequence's keys and values in a pool like a daemon's.

    Args:
        context: tokens of the sequence.
        group: query heads for each KV head.
    """

    def __init__(self, core: int, context: int, group: int, geometry: PoolGeometry) -> None:
        spawning = mp.get_context("spawn")
        self._pipe, far = spawning.Pipe()
        self._process = spawning.Process(target=_work, args=(far, core, context, group, geometry), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self._receive(_START_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def begin(self, work: Work, passes: int) -> None:
        """Starts to go through all layers so often: attention over the context, or only reading it."""
        self._pipe.send((work, passes))

    def median_s(self, timeout_s: float) -> float:
        """The median pass of what was begun last, in seconds.

        Raises:
            TimeoutError: no answer came.
        """
        return self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> float:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"the kernel's process gave no answer within {timeout_s:g} s")
        answer: float = self._pipe.recv()
        return answer


def together_s(processes: Sequence[KernelProcess], work: Work, passes: int, timeout_s: float) -> float:
    """All of them at the same time: the median pass of the slowest, in seconds."""
    for process in processes:
        process.begin(work, passes)
    return max(process.median_s(timeout_s) for process in processes)


def _work(pipe: Connection, core: int, context: int, group: int, geometry: PoolGeometry) -> None:
    os.sched_setaffinity(0, {core})
    kernels = CpuKernels(1)
    case = PagedCase(context, geometry.head_dim, group, geometry.kv_heads, layers=geometry.layers)
    pipe.send(0.0)
    while True:
        work, passes = pipe.recv()
        do = case.attend if work == "attend" else case.read
        times: list[float] = []
        for _ in range(passes):
            started = time.perf_counter()
            for layer in range(geometry.layers):
                do(kernels, layer)
            times.append(time.perf_counter() - started)
        pipe.send(statistics.median(times))
