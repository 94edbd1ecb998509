"""Memory for what every step reads from end to end."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 4096
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux


class HugePages:
    """Places tensors one behind the other in memory that the system is asked to give in huge pages.

    Reading weights from there takes a fraction of the address translations, which is worth a sixth where memory is the
    limit; and what is prefetched beyond the end of one tensor is the next one. Memory is given back when no tensor that
    was placed in a chunk is left.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def place(self, tensor: Tensor) -> Tensor:
        """The same elements, contiguous."""
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return tensor.contiguous()
        if self._used + size > len(self._chunk):
            memory = mmap.mmap(-1, -(-size // _CHUNK_BYTES) * _CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if _ADVICE is not None:
                memory.madvise(_ADVICE)
            self._chunk = torch.frombuffer(memory, dtype=torch.uint8)
            self._used = 0
        place = self._chunk[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return place.copy_(tensor)
