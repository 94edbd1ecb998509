"""The implementations under test.

Triton decides when a kernel is defined whether it will be compiled or interpreted, so its interpreter needs a process
of its own: test_triton_interpreter.py runs these tests again with TRITON_INTERPRET=1, and then only for Triton.
"""

from __future__ import annotations

import os

import pytest
import torch

from kernels import AttentionKernels
from kernels.cpu import CpuKernels, find_library
from kernels.reference import ReferenceKernels

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("triton",) if INTERPRETER else ("reference", "cpu", "cpu-avx512", "cpu-avx2", "cpu-baseline", "cpu-threads")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=NAMES)
def kernels(request: pytest.FixtureRequest) -> AttentionKernels:
    name: str = request.param
    if name == "reference":
        return ReferenceKernels()
    if name == "triton":
        from kernels.triton import TritonKernels

        return TritonKernels()
    if find_library() is None:
        pytest.skip("the compiled CPU kernels were not built")
    if name == "cpu-threads":
        return CpuKernels(num_threads=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFINITE_LLM_CPU_ISA", name.partition("-")[2])
        return CpuKernels()
