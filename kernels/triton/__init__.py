"""Attention kernels for GPUs, in Triton. With TRITON_INTERPRET=1 set before the import they run on CPU tensors."""

from kernels.triton.kernels import TritonKernels

__all__ = ["TritonKernels"]
