"""What devices with memory of their own have in common: tensors for them are packed into one buffer, and cross at once.

A step's plan is a dozen small tensors. One copy for all costs what one of them would.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from services.dataplane.device import Device

_ALIGNMENT = 64  # bytes; more than any dtype and any kernel's widest load asks for


class StagedDevice(Device):
    """A device that is reached through staging memory."""

    @abstractmethod
    def _staging(self, size: int) -> Tensor:
        """[size] uint8 in host memory, from which ``_cross`` can copy; free again when that is done."""

    @abstractmethod
    def _cross(self, staged: Tensor) -> Tensor:
        """Staging memory, [size] uint8, on the device. What is computed next waits for it."""

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        starts = packed_starts(sizes)
        if not starts[-1]:
            return [tensor.to(self.tensors) for tensor in tensors]
        staged = self._staging(starts[-1])
        for tensor, start, size in zip(tensors, starts, sizes, strict=False):
            if size:
                staged[start : start + size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        packed = self._cross(staged)
        return [
            packed[start : start + size].view(tensor.dtype).view(tensor.shape)
            for tensor, start, size in zip(tensors, starts, sizes, strict=False)
        ]


def packed_starts(sizes: Sequence[int]) -> list[int]:
    """Where parts of these sizes in bytes begin in one buffer, and the buffer's size behind them."""
    return list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
