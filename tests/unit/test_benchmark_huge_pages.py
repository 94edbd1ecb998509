"""``python -m benchmarks.huge_pages`` where there are huge pages, and where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import huge_pages
from benchmarks.harness import main
from benchmarks.kernel_cpu_cases import PagedCase
from kernels.cpu import find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="the compiled CPU kernels were not built")


def test_a_quick_run_compares_two_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two pools of small pages: what is compared, not what comes out."""
    asked = []

    def case(*shape: int, huge_pages: bool) -> PagedCase:
        asked.append(huge_pages)
        return PagedCase(*shape, layers=2)

    monkeypatch.setattr(huge_pages, "PagedCase", case)
    file = tmp_path / "huge.json"
    assert main("huge_pages", huge_pages.QUESTION, huge_pages.measure, None, ["--quick", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert asked == [False, True]
    assert row["huge_of_small_min"] <= row["huge_of_small"] <= row["huge_of_small_max"]
    assert row["gb_per_s"] > 0 < row["huge_gb_per_s"]


def test_without_enough_memory_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "QUICK_CASES", ((1 << 24, 128, 1, 64, 8),))
    monkeypatch.setattr("benchmarks.kernel_cpu_cases.STEP_BYTES", 2 << 20)
    with pytest.raises(SystemExit, match="MiB of memory are available"):
        main("huge_pages", huge_pages.QUESTION, huge_pages.measure, None, ["--quick"])
