"""vLLM's own load generator, unmodified, against the gateway: ``python -m benchmarks.vllm_bench``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.vllm import DEFAULT_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.cluster
@pytest.mark.skipif(
    not (ROOT / DEFAULT_ENVIRONMENT / "bin" / "python").exists(), reason="vLLM's environment is not there: make peers"
)
def test_vllms_load_generator_gets_every_token_over_both_apis(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [sys.executable, "-m", "benchmarks.vllm_bench", "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr  # it ends the benchmark where an answer fails or has other tokens
    rows = {row["backend"]: row for row in json.loads(file.read_text())["rows"]}
    assert {backend: row["requests"] for backend, row in rows.items()} == {"openai": 16, "openai-chat": 16}
    assert all(row["output_tokens_per_s"] > 0 and row["ttft_ms"] > 0 for row in rows.values())


@pytest.mark.cluster
def test_an_environment_without_vllm_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.vllm_bench", "--quick", "--environment", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 1
    assert f"{tmp_path} is no virtual environment with vLLM: create it with 'make peers'" in done.stderr
