"""``python -m benchmarks.smoke`` as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.cluster
def test_a_quick_run_measures_both_placements_and_writes_the_file(tmp_path: Path):
    file = tmp_path / "smoke.json"
    command = [sys.executable, "-m", "benchmarks.smoke", "--quick", "--contexts", "2048", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "repetition 2/2, remote" in done.stderr
    assert "placement" in done.stdout

    result = json.loads(file.read_text())
    assert list(result) == ["name", "machine", "commit", "rows", "summary", "targets"]
    local, remote = result["rows"]
    assert (local["placement"], remote["placement"]) == ("local", "remote")
    for row in (local, remote):
        assert (row["context"], row["repetitions"]) == (2048, 2)
        assert row["local_mib"] + row["remote_mib"] > 8  # the prompt's 32 rBlocks, and generated tokens
        for figure in ("ttft_s", "tpot_ms"):
            assert 0 < row[f"{figure}_min"] <= row[figure] <= row[f"{figure}_max"]
        assert row["prefill_tokens_per_s"] == pytest.approx(2048 / row["ttft_s"])
    assert local["remote_share"] == 0
    assert 0.65 < remote["remote_share"] < 0.85
    assert result["summary"] == {
        "ttft_remote_over_local_2048": pytest.approx(remote["ttft_s"] / local["ttft_s"]),
        "tpot_remote_over_local_2048": pytest.approx(remote["tpot_ms"] / local["tpot_ms"]),
    }
