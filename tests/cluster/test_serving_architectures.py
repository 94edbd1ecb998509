"""Architectures with traps, served by real processes with their KV over three daemons, under memory pressure."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from architectures import ORIGINAL_POSITIONS, VOCAB_SIZE, served
from cluster_process import Cluster
from reference import Reference

pytestmark = pytest.mark.cluster

# An rBlock of 16 tokens is 24 KiB, so three pools of 1 MiB hold 126 of them, 16 of which are the workspace.
CONFIG = {"instance": {"block_tokens": 16, "max_batch_tokens": 64, "max_num_seqs": 6}}
# (tokens of the prompt, of the answer). The first six take 100 blocks and need 68 more to end.
LENGTHS = (
    *((270, 180), (290, 180), (255, 180), (300, 180), (240, 180), (285, 180)),
    *((1, 40), (64, 40), (640, 40), (130, 40), (15, 40), (400, 40), (97, 40), (200, 40), (48, 40), (333, 40)),
)


@pytest.mark.parametrize(
    ("name", "short_positions"),
    [("gemma3", None), ("gpt-oss", None), ("mistral", None), ("phi3", ORIGINAL_POSITIONS)],
)
def test_sixteen_requests_at_once(name: str, short_positions: int | None, tmp_path: Path):
    path = served(name).write(tmp_path / name)
    prompts = [random.Random(n).choices(range(VOCAB_SIZE), k=length) for n, (length, _) in enumerate(LENGTHS)]
    counts = [count for _, count in LENGTHS]
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "1", "--dtype", "float32")
    with Cluster(path, tmp_path / "run", *arguments, config=CONFIG) as cluster:

        def complete(prompt: list[int], count: int) -> list[int]:
            return cluster.complete(prompt, max_tokens=count, ignore_eos=True).token_ids

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(complete, prompts, counts))
        cluster.wait_until_no_block_is_held()
        logs = "".join(log.read_text() for log in cluster.run_dir.rglob("*.log"))
        assert "request preempted" in logs, "memory was meant to be short"
    reference = Reference(path, short_positions)
    for prompt, count, tokens in zip(prompts, counts, answers, strict=True):
        reference.generate(prompt, count).check_tokens(tokens)
