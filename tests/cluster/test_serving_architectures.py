"""Architectures, served by real processes with their KV over three daemons, under memory pressure.

`make test` takes those with traps, some over shared memory and some over tcp; `make test-exact` takes all over both.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from architectures import ORIGINAL_POSITIONS, SERVED, VOCAB_SIZE, served
from cluster_process import Cluster, Completion
from reference import Reference

pytestmark = pytest.mark.cluster

# An rBlock of 16 tokens is 24 KiB, so three pools of 1 MiB hold 126 of them, 16 of which are the workspace.
CONFIG = {"instance": {"block_tokens": 16, "max_batch_tokens": 64, "max_num_seqs": 6}}
# (tokens of the prompt, of the answer). The first six take 100 blocks and need 68 more to end.
LENGTHS = (
    *((270, 180), (290, 180), (255, 180), (300, 180), (240, 180), (285, 180)),
    *((1, 40), (64, 40), (640, 40), (130, 40), (15, 40), (400, 40), (97, 40), (200, 40), (48, 40), (333, 40)),
)


LONGROPE = ("phi3", "phimoe")
WITH_TRAPS = (("gemma3", "shm"), ("gpt-oss", "tcp"), ("mistral", "tcp"), ("phi3", "shm"))
CASES = (
    [(architecture.name, transport) for architecture in SERVED for transport in ("shm", "tcp")]
    if os.environ.get("ALL_ARCHITECTURES")
    else WITH_TRAPS
)


@pytest.mark.parametrize(("name", "transport"), CASES)
def test_sixteen_requests_at_once_and_one_alone(name: str, transport: str, tmp_path: Path):
    path = served(name).write(tmp_path / name)
    prompts = [random.Random(n).choices(range(VOCAB_SIZE), k=length) for n, (length, _) in enumerate(LENGTHS)]
    counts = [count for _, count in LENGTHS]
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "1", "--dtype", "float32")
    with Cluster(path, tmp_path / "run", *arguments, "--transport", transport, config=CONFIG) as cluster:

        def complete(prompt: list[int], count: int) -> Completion:
            return cluster.complete(prompt, max_tokens=count, ignore_eos=True, logprobs=1)

        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(complete, prompts, counts))
        prompts.append(random.Random(99).choices(range(VOCAB_SIZE), k=700))
        counts.append(60)
        answers.append(complete(prompts[-1], counts[-1]))
        cluster.wait_until_no_block_is_held()
        logs = "".join(log.read_text() for log in cluster.run_dir.rglob("*.log"))
        assert "request preempted" in logs, "memory was meant to be short"
    reference = Reference(path, ORIGINAL_POSITIONS if name in LONGROPE else None)
    for prompt, count, answer in zip(prompts, counts, answers, strict=True):
        expected = reference.generate(prompt, count)
        expected.check_tokens(answer.token_ids)
        for position in range(expected.exact):
            expected.check_logprobs(position, answer.token_ids[position:][:1], answer.token_logprobs[position:][:1])
