"""``python -m benchmarks.kernel_gpu`` in a small run: what it measures and how its numbers belong together.

In Triton's interpreter; the clock and the sizes are those of the test.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton_interpreter.py", allow_module_level=True)

from benchmarks.harness import main
from benchmarks.kernel_gpu import QUESTION, add_arguments, measure
from benchmarks.kernel_gpu_cases import PagedCase
from kernels.triton import TritonKernels
from kernels.triton.tiling import INTERPRETER, Kind, Tiling
from kernels.triton.tune import plan_of, tune
from kernels.triton.tuning import CACHE_VARIABLE, TilingCache


def cpu_clock(work: Callable[[], None]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return seconds


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("STEP_BYTES", 1), ("COPY_BYTES", 1 << 16), ("PRODUCT_SIDE", 32)):
        monkeypatch.setattr(f"benchmarks.kernel_gpu_cases.{name}", value)
    monkeypatch.setattr("benchmarks.kernel_gpu.find_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("benchmarks.kernel_gpu._MANY", 3)
    monkeypatch.setattr("benchmarks.kernel_gpu._GOAL_CONTEXT", 128)
    monkeypatch.setattr("benchmarks.kernel_gpu._GOAL_DIM", 32)
    monkeypatch.setattr("benchmarks.kernel_gpu._GOAL_CHUNK", 16)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))


def test_a_small_run_measures_every_part(small: None, tmp_path: Path) -> None:
    sizes = "--kv-heads 1 --contexts 128 64 --prefill-contexts 128 --chunks 16 --head-dims 32 --groups 4"
    file = tmp_path / "kernel.json"
    arguments = ["--quick", "--tune", "never", *sizes.split(), "--json", str(file)]
    assert main("kernel_gpu", QUESTION, partial(measure, clock=cpu_clock), add_arguments, arguments) == 0
    result = json.loads(file.read_text())
    decode = [row for row in result["rows"] if row["part"] == "decode"]
    assert [(row["batch"], row["context"]) for row in decode] == [
        ("one", 128), ("one", 64), ("many", 64), ("ragged", 128)
    ]  # fmt: skip
    for row in decode:
        assert 0 < row["of_copy_min"] <= row["of_copy"] <= row["of_copy_max"]
        assert ("of_flash" in row) == (row["batch"] != "ragged")
    prefill = result["rows"][-1]
    assert (prefill["part"], prefill["rows"], prefill["context"]) == ("prefill", 16, 128)
    assert {name: target["value"] for name, target in result["targets"].items()} == {
        "decode_group4_128_of_copy": decode[0]["of_copy"],
        "decode_group4_128_of_flash": decode[0]["of_flash"],
        "prefill_group4_16x128": prefill["of_product"],
    }


def test_a_wrong_result_ends_the_run(small: None) -> None:
    case = PagedCase([256, 64], 32, 2, 1, torch.device("cpu"), rows=3)
    case.check(TritonKernels())

    class Wrong(TritonKernels):
        def micro_attention(self, q, pool, plan, params, out, lse) -> None:
            super().micro_attention(q, pool, plan, params, out, lse)
            out[-1] += 0.1

    with pytest.raises(SystemExit, match="out is off by"):
        case.check(Wrong())


def test_sizes_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the GPU's events replaced: each size computes the same, the one that takes least is kept."""

    class Event:
        now = 0.0

        def __init__(self, enable_timing: bool) -> None:
            self._at = 0.0

        def record(self) -> None:
            Event.now += 1.0 + launched[-1].num_stages
            self._at = Event.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, after: Event) -> float:
            return after._at - self._at

    launched: list[Tiling] = []

    class Kernels(TritonKernels):
        def __init__(self, tilings: dict[Kind, Tiling]) -> None:
            super().__init__(tilings)
            launched.extend(tilings.values())

        def micro_attention(self, q, pool, plan, params, out, lse) -> None:
            super().micro_attention(q, pool, plan, params, out, lse)
            if launched[-1].num_stages == 2 and launched[-1].num_warps == 4:
                out += 1.0  # the fastest are wrong

    for name, value in (("_WARM_UP", 1), ("_SAMPLES", 1), ("_CALLS", 1), ("_PREFILL_ROWS", 5)):
        monkeypatch.setattr(f"kernels.triton.tune.{name}", value)
    monkeypatch.setattr("kernels.triton.tune.TritonKernels", Kernels)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("kernels.triton.kernels.INTERPRETER", dataclasses.replace(INTERPRETER, multiprocessors=1))
    pool = torch.randn(2, 1, 1, 2, 16, 16).bfloat16()
    found = tune(pool, 2, TilingCache(tmp_path), [Kind.DECODE])
    assert len({(tiling.num_stages, tiling.num_warps) for tiling in launched}) >= 5
    assert found[Kind.DECODE].num_stages == 3
    assert tune(pool, 2, TilingCache(tmp_path), [Kind.DECODE]) == found
    found = tune(pool, 2, TilingCache(tmp_path), [Kind.PREFILL])
    assert found[Kind.PREFILL].num_stages == 2
    assert found[Kind.PREFILL].num_warps == 8


def test_plans_are_of_whole_sequences() -> None:
    plan = plan_of([128, 64], 2, 64, torch.device("cpu"))
    assert plan.query_start.tolist() == [0, 2, 4]
    assert plan.query_pos.tolist() == [126, 62]
    assert plan.block_start.tolist() == [0, 2, 3]
    assert sorted(plan.block_ids.tolist()) == [0, 1, 2]
    assert plan.block_pos.tolist() == [0, 64, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main("kernel_gpu", QUESTION, measure, add_arguments, ["--quick"])
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err
