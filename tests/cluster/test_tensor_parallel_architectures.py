"""Which architectures two ranks compute together, and that they compute the whole model's logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import architecture_rank
import pytest
from architectures import SERVED

pytestmark = pytest.mark.cluster

NO_PLAN = {"stablelm", "gpt-oss", "gpt2", "opt"}
WHOLE_ATTENTION = {"phi3", "phimoe", "olmo2", "olmo3", "deepseek-v3"}


def test_logits_of_two_ranks_are_the_whole_models_or_the_architecture_is_refused(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(architecture_rank.__file__), str(rank), "2", str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=(tmp_path / f"rank-{rank}.log").open("w"),
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=250)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    logs = (tmp_path / "rank-0.log").read_text() + (tmp_path / "rank-1.log").read_text()
    assert [rank.returncode for rank in ranks] == [0, 0], logs[-3000:]
    told = {line["name"]: line for line in map(json.loads, printed[0].splitlines())}
    assert list(told) == [architecture.name for architecture in SERVED]
    for name, line in told.items():
        if name in NO_PLAN:
            assert "transformers has no tensor-parallel plan" in line["refused"], name
        elif name in WHOLE_ATTENTION:
            assert "gives each of 2 ranks 4 of 4 query heads" in line["refused"], name
        else:
            assert line.get("error", 1.0) < 1e-4, line
