"""``python -m benchmarks.kernel_cpu`` in a small run: what it measures and how its numbers belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Ratio, Samples, main
from benchmarks.kernel_cpu import QUESTION, add_arguments, measure
from benchmarks.kernel_cpu_cases import ContiguousCase, PagedCase, ProductsCase
from kernels.cpu import CpuKernels, find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="the compiled CPU kernels were not built")


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer layers, so that all is over soon, and torch's threads as they were before."""
    monkeypatch.setattr("benchmarks.kernel_cpu_cases.STEP_BYTES", 2 << 20)
    monkeypatch.setattr("benchmarks.kernel_cpu.SAMPLE_BYTES", 2 << 20)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)


def test_a_quick_run_measures_every_part(tmp_path: Path) -> None:
    file = tmp_path / "kernel.json"
    assert main("kernel_cpu", QUESTION, measure, add_arguments, ["--quick", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    parts = ("decode", "threads", "prefill", "linear")
    rows = {part: [row for row in result["rows"] if row["part"] == part] for part in parts}
    assert [(row["state"], row["group"]) for row in rows["decode"]] == [
        ("memory", 1), ("cache", 1), ("memory", 4), ("cache", 4)
    ]  # fmt: skip
    assert [(row["sequences"], row["group"]) for row in rows["threads"]] == [(1, 1), (16, 1), (1, 4), (16, 4)]
    assert [(row["rows"], row["context"]) for row in rows["prefill"]] == [(128, 256)]
    assert [(row["dtype"], row["rows"]) for row in rows["linear"]] == [
        (dtype, count) for dtype in ("bfloat16", "float32") for _ in range(2) for count in (1, 16)
    ]
    assert all(0 < row["of_torch_min"] <= row["of_torch"] <= row["of_torch_max"] for row in rows["linear"])
    for row in rows["decode"]:
        for name in ("of_read", "of_contiguous", "of_flash"):
            assert 0 < row[f"{name}_min"] <= row[name] <= row[f"{name}_max"]
    targets = result["targets"]
    assert targets["decode_dim64_group4_1024_of_read"]["value"] == rows["decode"][2]["of_read"]
    assert targets["prefill_dim64_128x256_of_products"]["value"] == rows["prefill"][0]["of_products"]
    assert result["summary"]["known_plan_of_new"] > 0


def test_ratios_compare_within_a_repetition() -> None:
    ratio = Ratio.of_speeds(Samples((1.0, 2.0, 4.0)), Samples((2.0, 3.0, 4.0)), work=2.0)
    assert ratio.values == (4.0, 3.0, 2.0)
    assert ratio.cells("x") == {"x": 3.0, "x_min": 2.0, "x_max": 4.0}


def test_cases_are_of_the_same_work() -> None:
    """The pool's blocks in the plan's order are what attention gives, and contiguous keys take as many bytes."""
    case = PagedCase(256, 64, 4, 2, layers=2)
    assert sorted(case.plan.block_ids.tolist()) == [0, 1, 2, 3]
    assert case.layer_bytes == 256 * 2 * 64 * 2 * 2
    assert ContiguousCase(case).layer_bytes == case.layer_bytes
    kernels = CpuKernels()
    case.attend(kernels, 1)
    keys, values = case.pool[case.plan.block_ids.long(), 1].float().permute(2, 1, 0, 3, 4).flatten(2, 3)
    scores = torch.einsum("hgd,hkd->hgk", case.q.float().view(2, 4, 64), keys) * 64**-0.5
    expected = torch.einsum("hgk,hkd->hgd", scores.softmax(-1), values).view(1, 8, 64)
    torch.testing.assert_close(case.out.float(), expected, atol=1e-2, rtol=1e-2)
    assert case.visible_pairs == 256
    chunk = PagedCase(256, 64, 4, 1, rows=128, layers=1)
    assert chunk.visible_pairs == sum(range(129, 257))
    assert ProductsCase(128, 256, 64).pairs == 128 * 256
