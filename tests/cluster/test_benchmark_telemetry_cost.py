"""``python -m benchmarks.telemetry_cost`` as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.cluster
def test_a_quick_run_compares_both_clusters(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    command = [sys.executable, "-m", "benchmarks.telemetry_cost", "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = {row["telemetry"]: row for row in result["rows"]}
    assert rows.keys() == {"on", "off"}
    assert all(row["tokens_per_s"] > 0 and row["repetitions"] == 2 for row in rows.values())
    assert result["targets"]["on_over_off"]["goal"] == 0.98
    assert result["summary"]["requests"] == 3 * 64
    assert result["summary"]["scrapes"] > 0
