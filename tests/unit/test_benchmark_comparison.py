"""The README says what the benchmarks' files say."""

from __future__ import annotations

import re

import pytest

from benchmarks.comparison import BEGIN, END, ROOT, SECTIONS, load, replaced, text


def test_the_readme_has_the_tables_that_the_results_give() -> None:
    readme = (ROOT / "README.md").read_text()
    assert replaced(readme, text()) == readme, "run: python -m benchmarks.comparison"


@pytest.mark.parametrize("name", SECTIONS)
def test_a_table_is_whole(name: str) -> None:
    lines = [line for line in SECTIONS[name](load(name)).splitlines() if line.startswith("|")]
    columns = {line.count("|") for line in lines}
    assert len(columns) == 1
    assert len(lines) > 2
    assert re.search(r"\d", lines[2])


def test_a_missed_goal_is_named() -> None:
    result = dict(load("pooled-vs-vllm"))
    names = [name for name in result["targets"] if name.endswith("_over_the_better")]
    result["targets"] = {name: {"value": 1.0, "goal": 1.35, "ok": False} for name in names}
    assert SECTIONS["pooled-vs-vllm"](result).count("1.00 (goal 1.35)") == len(names)


def test_nothing_but_the_block_is_replaced() -> None:
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb\n", f"{BEGIN}\nnew\n{END}") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    with pytest.raises(SystemExit, match="lacks the marks"):
        replaced("a", "b")
