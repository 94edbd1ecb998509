"""Chooses the best implementation of the kernels for a device."""

from __future__ import annotations

import logging

import torch

from kernels.cpu import CpuKernels, find_library
from kernels.interface import AttentionKernels
from kernels.reference import ReferenceKernels

_log = logging.getLogger(__name__)


def load(device: str | torch.device, num_threads: int = 1) -> AttentionKernels:
    """Kernels for tensors on ``device``; one instance per thread that computes.

    Args:
        device: "cpu", "cuda", "cuda:1", ...
        num_threads: threads of the compiled CPU kernel, the caller's included; other kernels ignore it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        # Imported here: Triton is not installed where there is no GPU it supports.
        from kernels.triton import TritonKernels

        return TritonKernels()
    if kind == "cpu" and find_library() is not None:
        return CpuKernels(num_threads=num_threads)
    if kind == "cpu":
        _log.warning(
            "the compiled CPU kernel was not built, so attention runs in plain torch, many times slower; "
            "install a C compiler and run `python setup.py build_ext --inplace` or `pip install -e .` again"
        )
    return ReferenceKernels()
