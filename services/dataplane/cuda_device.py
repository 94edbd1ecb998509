"""A GPU as a device.

Copies run on two streams beside the one that computes, one for each direction, and go through pinned memory. Streams
wait for each other by events on the GPU. The thread waits only where it is told to, and then only for the copy or the
work that it needs. torch's allocator of pinned memory takes a buffer back when the copies that read it are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import kernels
from kernels import AttentionKernels
from services.core.errors import ConfigError
from services.dataplane.cuda_pool import CudaPool, map_cuda_pool
from services.dataplane.device import Download, Recording, Stopwatch
from services.dataplane.device_name import LEAST_CAPABILITY
from services.dataplane.host_device import tensor_bytes
from services.dataplane.kv_pool import Grant, Mapping, Pool
from services.dataplane.staged_device import StagedDevice


class CudaDevice(StagedDevice):
    """A recording is a CUDA graph.

    Args:
        index: of the GPU among those that the process sees.

    Raises:
        ConfigError: there is no such GPU, or it is too old.
    """

    records = True

    def __init__(self, index: int) -> None:
        capabilities = [torch.cuda.get_device_capability(at) for at in range(torch.cuda.device_count())]
        check_gpu(index, torch.version.cuda, capabilities)
        self.name = f"cuda:{index}"
        self.tensors = torch.device("cuda", index)
        self.enter_thread()
        self._up = torch.cuda.Stream(self.tensors)  # type: ignore[no-untyped-call]
        self._down = torch.cuda.Stream(self.tensors)  # type: ignore[no-untyped-call]
        self._graphs = torch.cuda.graph_pool_handle()  # graphs never run at the same time: they share what they free

    def load_kernels(self, num_threads: int) -> AttentionKernels:
        return kernels.load(self.tensors, num_threads)

    def make_pool(self, pool_bytes: int, huge_pages: bool = False) -> Pool:
        return CudaPool(self.tensors, pool_bytes)

    def map_pool(self, grant: Grant) -> Mapping:
        return map_cuda_pool(self.tensors, grant)

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.tensors)

    def fill(self, target: Tensor, content: Tensor) -> None:
        staged = torch.empty(content.shape, dtype=content.dtype, pin_memory=True)
        staged.copy_(content)
        with torch.cuda.stream(self._up):
            target.copy_(staged, non_blocking=True)
        self._up.synchronize()

    def download(self, tensor: Tensor) -> Download:
        source = tensor.contiguous()
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._down.wait_stream(torch.cuda.current_stream(self.tensors))
        with torch.cuda.stream(self._down):
            host.copy_(source, non_blocking=True)
            done = self._down.record_event()
        source.record_stream(self._down)
        return _CudaDownload(host, done)

    def settle(self) -> None:
        torch.cuda.current_stream(self.tensors).synchronize()

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def stopwatch(self) -> Stopwatch:
        return _CudaStopwatch(self.tensors)

    def record(self, work: Callable[[], Sequence[Tensor]]) -> Recording:
        computing = torch.cuda.current_stream(self.tensors)
        self._up.wait_stream(computing)
        with torch.cuda.stream(self._up):  # libraries set themselves up in a first call, which cannot be captured
            work()
        computing.wait_stream(self._up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._graphs):
            outputs = tuple(work())
        return Recording(graph.replay, outputs)

    def _staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def _cross(self, staged: Tensor) -> Tensor:
        computing = torch.cuda.current_stream(self.tensors)
        with torch.cuda.stream(self._up):
            crossed = staged.to(self.tensors, non_blocking=True)
        computing.wait_stream(self._up)
        crossed.record_stream(computing)
        return crossed


class _CudaDownload(Download):
    def __init__(self, host: Tensor, done: torch.cuda.Event) -> None:
        self._host = host
        self._done = done

    @property
    def arrived(self) -> bool:
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> memoryview:
        self._done.synchronize()
        return tensor_bytes(self._host)


class _CudaStopwatch(Stopwatch):
    """Marks are events in the stream that computes. They are used again: a step has hundreds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._marked = 0

    def mark(self) -> None:
        if self._marked == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[self._marked].record(torch.cuda.current_stream(self._device))
        self._marked += 1

    def reset(self) -> None:
        self._marked = 0

    def take(self) -> list[float]:
        marks, self._marked = self._events[: self._marked], 0
        return [marks[0].elapsed_time(mark) / 1000 for mark in marks]


def check_gpu(index: int, built_for: str | None, capabilities: Sequence[tuple[int, int]]) -> None:
    """
    Args:
        built_for: version of CUDA that torch was built for, if any.
        capabilities: of the GPUs that the process sees.

    Raises:
        ConfigError: the one with this index is not there, or too old.
    """
    name = f"device cuda:{index}"
    if built_for is None:
        raise ConfigError(f"{name}: this torch was built without CUDA; install one that was, or set device: cpu")
    if index >= len(capabilities):
        raise ConfigError(
            f"{name}: torch sees {len(capabilities)} GPUs here; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or set "
            "device: cpu"
        )
    if capabilities[index] < LEAST_CAPABILITY:
        have, least = (".".join(map(str, version)) for version in (capabilities[index], LEAST_CAPABILITY))
        raise ConfigError(
            f"{name}: its compute capability is {have}; {least} (Ampere) or newer is needed, or set device: cpu"
        )
