"""The implementations under test.

Triton decides when a kernel is defined whether it will be compiled or interpreted, so its interpreter needs a process
of its own: test_triton_interpreter.py runs these tests again with TRITON_INTERPRET=1, and then only for Triton. With
INFINITE_LLM_TEST_DEVICE=cuda they run for Triton alone, too, compiled and on the GPU (`make test-gpu`).
"""

from __future__ import annotations

import os

import pytest
import torch
from on_device import DEVICE, OnDevice

from kernels import AttentionKernels
from kernels.cpu import CpuKernels, find_library
from kernels.reference import ReferenceKernels

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
SETS = ("avx512-amx", "avx512-bf16", "avx512", "avx2", "baseline")
CPU_NAMES = ("reference", "cpu", *(f"cpu-{name}" for name in SETS), "cpu-threads")
NAMES = ("triton",) if INTERPRETER or DEVICE != "cpu" else CPU_NAMES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU everything that takes the kernels under test is a GPU test."""
    for item in items:
        if DEVICE != "cpu" and "kernels" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


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

        return TritonKernels() if DEVICE == "cpu" else OnDevice(TritonKernels(), DEVICE)
    if find_library() is None:
        pytest.skip("the compiled CPU kernels were not built")
    if name == "cpu-threads":
        return CpuKernels(num_threads=3)
    with pytest.MonkeyPatch.context() as patch:
        wanted = name.partition("-")[2]
        patch.setenv("INFINITE_LLM_CPU_ISA", wanted)
        kernels = CpuKernels()
        if wanted and kernels.instruction_set != wanted:
            pytest.skip(f"this processor has no {wanted}")
        return kernels
