"""A GPU's kernels and ways on the CPU: what tests run where there is no GPU.

Triton interprets its kernels, and tensors that a GPU would have in memory of its own are copies. So whatever would be
left on the wrong side, or read before it is there, is wrong here too.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kernels import AttentionKernels
from services.core.errors import ConfigError
from services.dataplane.device import Download
from services.dataplane.host_device import HostMemoryDevice, tensor_bytes
from services.dataplane.staged_device import StagedDevice

_VARIABLE = "TRITON_INTERPRET"


class InterpretedDevice(StagedDevice, HostMemoryDevice):
    """
    Raises:
        ConfigError: Triton was not told before the process started that it is to interpret.
    """

    name = "interpreter"
    records = True

    def __init__(self) -> None:
        if os.environ.get(_VARIABLE) != "1":
            raise ConfigError(
                f"device interpreter: set {_VARIABLE}=1 in the environment; it is for tests, a thousand times slower "
                "than device cpu"
            )

    def load_kernels(self, num_threads: int) -> AttentionKernels:
        from kernels.triton import TritonKernels  # not installed everywhere

        return TritonKernels()

    def _staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def _cross(self, staged: Tensor) -> Tensor:
        crossed = staged.clone()
        staged.fill_(0xFF)  # it is another's as soon as it has been read
        return crossed

    def download(self, tensor: Tensor) -> Download:
        return _UnderWay(tensor.clone(memory_format=torch.contiguous_format))


class _UnderWay(Download):
    """Never there before somebody waits for it."""

    def __init__(self, copy: Tensor) -> None:
        self._copy = copy
        self._arrived = False

    @property
    def arrived(self) -> bool:
        return self._arrived

    def wait(self) -> memoryview:
        self._arrived = True
        return tensor_bytes(self._copy)
