"""Attention kernels for processors: C with a plain ABI (src/), called through ctypes with the GIL released."""

from kernels.cpu.kernels import CpuKernels
from kernels.cpu.library import find_library

__all__ = ["CpuKernels", "find_library"]
