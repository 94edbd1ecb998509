"""Every launch binds its arguments and compiles for Hopper as it would there, on a machine without a GPU."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from attention_cases import context, make_case

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    pytest.skip("the interpreter compiles nothing, a GPU launches what it compiles", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import kernels.triton.kernels
import kernels.triton.prepared
from kernels.triton import TritonKernels
from kernels.triton.tiling import Kind, Tiling


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel would have been launched; all of them are compiled instead."""
    launched: Counter[str] = Counter()

    class Compiled:
        def __init__(self, kernel) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*args: object, **options: object) -> None:
                assert all(number > 0 for number in grid)
                assert self._kernel.warmup(*args, grid=grid, **options).asm["cubin"]
                launched[self._kernel.__name__] += 1

            return launch

    for name in ("attend", "merge_items", "merge_part", "merge_sink", "store_rows"):
        monkeypatch.setattr(kernels.triton.kernels, name, Compiled(getattr(kernels.triton.kernels, name)))
    monkeypatch.setattr(kernels.triton.prepared, "schedule", Compiled(kernels.triton.prepared.schedule))
    monkeypatch.setattr(driver, "_active", Hopper())
    return launched


@pytest.mark.parametrize("descriptors", [False, True])
def test_attention(compiled: Counter[str], descriptors: bool) -> None:
    """One launch for a batch of one kind and two for a mixed one, and a merge; one schedule for all layers."""
    sizes = Tiling(16, 64, 4, 2, 4, descriptors=descriptors)
    kernels = TritonKernels(dict.fromkeys(Kind, sizes))
    case = make_case([context(300), context(20)], head_dim=64, group=4, dtype=torch.bfloat16)
    for _ in range(3):
        case.run(kernels, torch.bfloat16)
    assert compiled == {"schedule": 1, "attend": 3, "merge_items": 3}
    make_case([context(300), context(20, 9)], head_dim=64, group=4, dtype=torch.bfloat16).run(kernels, torch.bfloat16)
    assert compiled == {"schedule": 3, "attend": 5, "merge_items": 4}


def test_merges_and_store(compiled: Counter[str]) -> None:
    kernels = TritonKernels()
    out, lse = torch.zeros(3, 8, 64), torch.zeros(3, 8)
    kernels.merge_partials(out, lse, out.bfloat16(), lse.clone(), torch.tensor([0, 2, 1]))
    kernels.merge_partials(out, lse, out.clone(), lse.clone())
    kernels.merge_sinks(out, lse, torch.zeros(8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="sinks must be"):
        kernels.merge_sinks(out, lse, torch.zeros(7))
    pool, kv = torch.zeros(2, 2, 8, 2, 64, 64, dtype=torch.bfloat16), torch.zeros(3, 8, 64)
    kernels.store_kv(kv, kv, pool, torch.tensor([0, 1, 2]), 1)
    assert compiled == {"merge_part": 2, "merge_sink": 1, "store_rows": 1}
