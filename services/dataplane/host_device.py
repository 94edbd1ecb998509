"""The CPU as a device: host memory is the device's, and nothing is copied."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import kernels
from kernels import AttentionKernels
from services.core.errors import ConfigError
from services.dataplane.device import Device, Download, Recording, Stopwatch
from services.dataplane.kv_pool import Grant, KvPool, Mapping, MemoryKind, Pages, map_memory


class HostMemoryDevice(Device):
    """Whatever computes, tensors and pools are in host memory, and a call answers when what it asks for is done."""

    tensors = torch.device("cpu")

    def make_pool(self, pool_bytes: int, huge_pages: bool = False) -> KvPool:
        return KvPool(pool_bytes, Pages.RESERVED if huge_pages else Pages.TOGETHER)

    def map_pool(self, grant: Grant) -> Mapping:
        if grant.kind is not MemoryKind.HOST:
            raise ConfigError(
                f"the daemon's pool lies in GPU memory, and this process computes on {self.name}: give both the same "
                "device"
            )
        return map_memory(grant)

    def enter_thread(self) -> None:
        pass

    def fill(self, target: Tensor, content: Tensor) -> None:
        target.copy_(content)

    def settle(self) -> None:
        pass

    def trim(self) -> None:
        pass

    def stopwatch(self) -> Stopwatch:
        return HostStopwatch()

    def record(self, work: Callable[[], Sequence[Tensor]]) -> Recording:
        return record_by_repeating(work)


class HostDevice(HostMemoryDevice):
    name = "cpu"

    def load_kernels(self, num_threads: int) -> AttentionKernels:
        return kernels.load(self.tensors, num_threads)

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def download(self, tensor: Tensor) -> Download:
        return _There(tensor)


class _There(Download):
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def arrived(self) -> bool:
        return True

    def wait(self) -> memoryview:
        return tensor_bytes(self._tensor)


class HostStopwatch(Stopwatch):
    """Where a call answers when what it asks for is done."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def reset(self) -> None:
        self._marks = []

    def take(self) -> list[float]:
        marks, self._marks = self._marks, []
        return [mark - marks[0] for mark in marks]


def record_by_repeating(work: Callable[[], Sequence[Tensor]]) -> Recording:
    """Where nothing can be recorded: the work is done anew, and its outputs are put where the first ones are."""
    outputs = tuple(work())

    def replay() -> None:
        for output, new in zip(outputs, work(), strict=True):
            output.copy_(new)

    return Recording(replay, outputs)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor in host memory; a copy's where it is not contiguous."""
    content: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return content
