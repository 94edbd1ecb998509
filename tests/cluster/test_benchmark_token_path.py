"""``python -m benchmarks.token_path`` as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.cluster
def test_a_quick_run_accounts_for_every_process_of_both_versions(tmp_path: Path):
    file = tmp_path / "path.json"
    # The other version is this one as well: what is shown is that it is started from its own directory and measured.
    command = [sys.executable, "-m", "benchmarks.token_path", "--quick", "--against", str(ROOT), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = {row["part"]: row for row in result["rows"]}
    assert {"gateway", "kvdaemon", "gmanager", "etcd", "instance, first thread", "instance, engine"} <= set(rows)
    assert all(row["repetitions"] == 2 for row in rows.values())
    for part in ("gateway", "instance, engine"):
        assert rows[part]["this_us_per_token"] > 0
        assert rows[part]["other_us_per_token"] > 0
        ratio = rows[part]["this_us_per_token"] / rows[part]["other_us_per_token"]
        assert rows[part]["this_over_other"] == pytest.approx(ratio)
    assert result["summary"]["gateway_us_per_token"] == rows["gateway"]["this_us_per_token"]


def test_a_tree_that_is_none_is_refused(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.token_path", "--against", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "there is no services/ in it" in done.stderr
