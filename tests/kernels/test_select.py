"""Choosing an implementation, and refusing what native code could not survive."""

from __future__ import annotations

import dataclasses
import logging
import os

import pytest
import torch
from attention_cases import context, int32, make_case

import kernels.select
from kernels.cpu import CpuKernels, find_library

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="about the CPU kernels")
built = pytest.mark.skipif(find_library() is None, reason="the compiled CPU kernels were not built")


@built
def test_the_compiled_kernels_serve_the_cpu() -> None:
    chosen = kernels.select.load("cpu", num_threads=2)
    assert isinstance(chosen, CpuKernels)
    assert chosen.instruction_set in ("avx512", "avx2", "baseline")


def test_without_a_compiler_plain_torch_serves_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels.select, "find_library", lambda: None)
    with caplog.at_level(logging.WARNING):
        assert kernels.select.load(torch.device("cpu")).name == "reference"
    assert "setup.py build_ext --inplace" in caplog.text


@built
def test_wrong_arguments_are_refused() -> None:
    cpu, case = CpuKernels(), make_case([context(70, 3)])
    for wrong, message in (
        (dataclasses.replace(case, q=case.q.bfloat16()), "pool's dtype"),
        (dataclasses.replace(case, q=case.q[:, :3]), "multiple of 2 heads"),
        (dataclasses.replace(case, q=case.q.transpose(1, 2).contiguous().transpose(1, 2)), "contiguous"),
        (dataclasses.replace(case, pool=case.pool.double()), "float32, bfloat16 or float16"),
        (dataclasses.replace(case, pool=case.pool[..., :16]), "contiguous inside a block"),
        (dataclasses.replace(case, params=dataclasses.replace(case.params, layer=2)), "layer must be in 0..1"),
        (dataclasses.replace(case, plan=dataclasses.replace(case.plan, block_ids=int32([0, 4]))), "block_ids"),
        (dataclasses.replace(case, plan=dataclasses.replace(case.plan, query_start=int32([0, 4]))), "query_start"),
        (dataclasses.replace(case, plan=dataclasses.replace(case.plan, block_start=int32([0, 3]))), "block_start"),
        (dataclasses.replace(case, plan=dataclasses.replace(case.plan, query_pos=int32([0, 3]))), "2 segments"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.run(cpu)
    kv = torch.zeros(1, 2, 32)
    with pytest.raises(ValueError, match="outside"):
        cpu.store_kv(kv, kv, case.pool, torch.tensor([4 * 64]), layer=0)
    with pytest.raises(ValueError, match="outside"):
        cpu.merge_partials(kv, torch.zeros(1, 2), kv.clone(), torch.zeros(1, 2), torch.tensor([1]))
    with pytest.raises(ValueError, match="num_threads"):
        CpuKernels(num_threads=0)
