"""Choosing an implementation, and refusing what native code could not survive."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading

import oracle
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
    assert chosen.instruction_set in ("avx512-amx", "avx512-bf16", "avx512", "avx2", "neon-bf16", "baseline")


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
    case.run(cpu)  # what is known to be right already must not let anything else pass
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
    with pytest.raises(ValueError, match="layer must be"):
        cpu.store_kv(kv, kv, case.pool, torch.tensor([3]), layer=2)
    cpu.store_kv(kv, kv, case.pool, torch.tensor([3]), layer=0)
    with pytest.raises(ValueError, match="layer must be"):
        cpu.store_kv(kv, kv, case.pool, torch.tensor([3]), layer=-1)
    with pytest.raises(ValueError, match="num_threads"):
        CpuKernels(num_threads=0)


@built
def test_plans_in_turn_and_anew() -> None:
    """More plans than are kept prepared, each used again after all others, with queries and a pool of its own."""
    cpu = CpuKernels()
    cases = [make_case([context(40 + 3 * number, 2)], seed=number) for number in range(20)]
    expected = [oracle.attention(case.q, case.pool, case.plan, case.params)[0] for case in cases]
    for _ in range(2):
        for case, out in zip(cases, expected, strict=True):
            torch.testing.assert_close(case.run(cpu)[0].double(), out, atol=4e-6, rtol=0)
    first = cases[0]
    other = dataclasses.replace(first, pool=first.pool.flip(0).nan_to_num(0.5), q=2 * first.q)  # the same plan
    out = oracle.attention(other.q, other.pool, other.plan, other.params)[0]
    assert not torch.allclose(out, expected[0], atol=1e-2)
    torch.testing.assert_close(other.run(cpu)[0].double(), out, atol=4e-6, rtol=0)


@built
def test_callers_that_share_threads_do_not_disturb_each_other() -> None:
    """All kernels of a process with as many threads have one team: who finds it taken computes alone."""
    case = make_case([context(600), context(90, 50)], dtype=torch.bfloat16)
    expected = case.run(CpuKernels(1))
    alike = [False] * 4

    def call(number: int) -> None:
        cpu = CpuKernels(3)
        results = [pair for _ in range(50) for pair in zip(case.run(cpu), expected, strict=True)]
        alike[number] = all(torch.allclose(found, of_one, atol=4e-6, rtol=0) for found, of_one in results)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(len(alike))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert all(alike)


@built
@pytest.mark.parametrize("threads", [1, 3])
def test_the_read_loop_reads_all_it_is_told_to(threads: int) -> None:
    cpu, words = CpuKernels(threads), torch.randint(0, 1000, (40, 3, 1024), dtype=torch.int32)
    ids = torch.randperm(40)[:30].int()
    assert cpu.read(words[:, 1], ids, 4096) == int(words[ids.long(), 1].sum())
    assert cpu.read(words[:, 1], ids, 2048) == int(words[ids.long(), 1, :512].sum())
    assert cpu.read(words[:, 1], ids[:0], 4096) == 0
    for wrong_ids, run_bytes in ((ids + 40, 4096), (ids - 40, 4096), (ids, 3 * 4096 + 4)):
        with pytest.raises(ValueError, match="cannot read"):
            cpu.read(words[:, 1], wrong_ids, run_bytes)
