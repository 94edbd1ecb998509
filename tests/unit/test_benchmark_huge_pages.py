"""``python -m benchmarks.huge_pages`` compares what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import huge_pages
from benchmarks.harness import main
from benchmarks.kernel_cpu_cases import PagedCase
from kernels.cpu import find_library
from services.dataplane.kv_pool import Pages

pytestmark = pytest.mark.skipif(find_library() is None, reason="the compiled CPU kernels were not built")


def run(*arguments: str) -> int:
    return main("huge_pages", huge_pages.QUESTION, huge_pages.measure, huge_pages._add_arguments, list(arguments))


def test_a_quick_run_compares_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of small pages: what is compared, not what comes out."""
    asked = []

    def case(*shape: int, pages: Pages) -> PagedCase:
        asked.append(pages)
        return PagedCase(*shape, layers=2)

    monkeypatch.setattr(huge_pages, "PagedCase", case)
    file = tmp_path / "huge.json"
    assert run("--quick", "--reserved", "--json", str(file)) == 0
    rows = json.loads(file.read_text())["rows"]
    assert asked == [Pages.SMALL, Pages.TOGETHER, Pages.RESERVED]
    assert [row["pages"] for row in rows] == ["together", "reserved"]
    for row in rows:
        assert row["of_small_min"] <= row["of_small"] <= row["of_small_max"]
        assert row["gb_per_s"] > 0 < row["small_gb_per_s"]


def test_without_enough_memory_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "QUICK_CASES", ((1 << 24, 128, 1, 64, 8),))
    monkeypatch.setattr("benchmarks.kernel_cpu_cases.STEP_BYTES", 2 << 20)
    with pytest.raises(SystemExit, match="MiB of memory are available"):
        run("--quick")
