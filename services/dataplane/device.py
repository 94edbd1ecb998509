"""Where a process's pool, model and kernels are: the one seam between the system and a GPU.

Plans, tokens and messages are made in host memory, whatever computes. A ``Device`` brings them to the tensors of its
kernels and answers back. On the CPU both are the same memory and nothing is copied. On a GPU (``StagedDevice``) copies
go through pinned memory on streams of their own, and nothing waits for the stream that computes but ``settle``.

Each thread that uses a device enters it first (``enter_thread``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AttentionKernels, AttentionPlan
from services.dataplane.kv_pool import Grant, Mapping, Pool


class Download(ABC):
    """A tensor on its way to host memory."""

    @property
    @abstractmethod
    def arrived(self) -> bool:
        """Whether ``wait`` would answer at once."""

    @abstractmethod
    def wait(self) -> memoryview:
        """Its bytes. Nobody else writes to them as long as the answer is held."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Work that can be done again, with the same tensors.

    Attributes:
        replay: does it; what it reads and writes lies where it lay when it was recorded.
        outputs: what it answers, each time.
    """

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


class Stopwatch(ABC):
    """Takes times of what a thread lets the device compute."""

    @abstractmethod
    def mark(self) -> None:
        """Notes when all that was asked for until now is done."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets the marks."""

    @abstractmethod
    def take(self) -> list[float]:
        """Takes the marks away, in seconds from the first of them; the device has settled since."""


class Device(ABC):
    """See the module's docstring.

    Attributes:
        name: as in the configuration.
        tensors: where the pool's and the model's tensors are.
        records: whether ``record`` gains anything.
    """

    name: str
    records: bool = False
    tensors: torch.device

    @abstractmethod
    def load_kernels(self, num_threads: int) -> AttentionKernels:
        """For one thread. ``num_threads``: of kernels on the CPU."""

    @abstractmethod
    def make_pool(self, pool_bytes: int, huge_pages: bool = False) -> Pool:
        """
        Args:
            huge_pages: in those that the system has reserved; means nothing in a GPU's memory.

        Raises:
            ConfigError: there is not that much memory.
        """

    @abstractmethod
    def map_pool(self, grant: Grant) -> Mapping:
        """Another process's pool, as tensors of this device can look at it.

        Raises:
            ConfigError: it lies elsewhere, or cannot be mapped here.
            PeerLostError: it is not what a daemon passes.
        """

    @abstractmethod
    def enter_thread(self) -> None:
        """The calling thread uses the device from now on."""

    @abstractmethod
    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same tensors on the device; they may be changed or given up at once, but for the CPU's own.

        What the thread computes next waits for them, the thread does not.
        """

    @abstractmethod
    def fill(self, target: Tensor, content: Tensor) -> None:
        """Copies host memory to a part of the device's, both contiguous, and answers when it is there."""

    @abstractmethod
    def download(self, tensor: Tensor) -> Download:
        """Begins to bring a tensor to host memory, as it is when all that was computed before is done.

        The CPU's is the tensor's own memory.
        """

    @abstractmethod
    def settle(self) -> None:
        """Answers when all that the thread let the device compute is done.

        Raises:
            RuntimeError: the device has failed, and does nothing more for this process.
        """

    @abstractmethod
    def trim(self) -> None:
        """Gives memory back that nothing uses now: others may have the device, too."""

    @abstractmethod
    def stopwatch(self) -> Stopwatch: ...

    @abstractmethod
    def record(self, work: Callable[[], Sequence[Tensor]]) -> Recording:
        """Does work that asks the device only, maybe twice, and keeps what it asks for."""


class BlockBytes:
    """The blocks of a pool as bytes in host memory.

    Args:
        pool: [num_blocks, ...], contiguous.
    """

    def __init__(self, pool: Tensor, device: Device) -> None:
        self._bytes = pool.view(len(pool), -1).view(torch.uint8)
        self._device = device

    def read(self, block: int) -> memoryview:
        """A block's content: [layers, kv_heads, 2, block_tokens, head_dim]; on the CPU the pool's own memory."""
        return self._device.download(self._bytes[block]).wait()

    def write(self, block: int, content: memoryview) -> None:
        """Fills a block, and answers when it is filled."""
        self._device.fill(self._bytes[block], torch.frombuffer(content, dtype=torch.uint8))


def upload_plan(plan: AttentionPlan, device: Device) -> AttentionPlan:
    """The plan with its tensors on the device."""
    query_start, query_pos, block_start, block_ids, block_pos = device.upload(
        [plan.query_start, plan.query_pos, plan.block_start, plan.block_ids, plan.block_pos]
    )
    return AttentionPlan(query_start, query_pos, block_start, block_ids, block_pos, plan.max_query_len)
