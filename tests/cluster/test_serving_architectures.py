"""Architectures, served by real processes with their KV over three daemons, under memory pressure.

`make test` takes those with traps, some over shared memory and some over tcp; `make test-exact` takes all over both.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from architectures import ORIGINAL_POSITIONS, SERVED, VOCAB_SIZE, served
from cluster_process import Cluster, Completion
from reference import Answer, Reference

from infinitellm import Client

pytestmark = pytest.mark.cluster

CONFIG = {"instance": {"block_tokens": 16, "max_batch_tokens": 64, "max_num_seqs": 6}}
WORKSPACE = 16  # blocks: two chunks, and the tails of max_num_seqs sequences
BLOCKS = 110  # beside these, in three pools where an rBlock of 16 tokens is 24 KiB
# (tokens of the prompt, of the answer) for so many blocks. The first six take 100 of them and need 68 more to end.
LENGTHS = (
    *((270, 180), (290, 180), (255, 180), (300, 180), (240, 180), (285, 180)),
    *((1, 40), (64, 40), (640, 40), (130, 40), (15, 40), (400, 40), (97, 40), (200, 40), (48, 40), (333, 40)),
)


LONGROPE = ("phi3", "phimoe")
POOL_MIB = {"deepseek-v3": 2}  # 1 for the others; of its larger rBlocks one MiB holds too few for six sequences
WITH_TRAPS = (("gemma3", "shm"), ("gpt-oss", "tcp"), ("mistral", "tcp"), ("phi3", "shm"))
CASES = (
    [(architecture.name, transport) for architecture in SERVED for transport in ("shm", "tcp")]
    if os.environ.get("ALL_ARCHITECTURES")
    else WITH_TRAPS
)


def blocks_of_a_pool(cluster: Cluster) -> int:
    """It depends on the architecture: known when the instance's own daemon has said so to the gManager."""
    deadline = time.monotonic() + 30
    with Client(f"127.0.0.1:{cluster.grpc_port}") as client:
        while time.monotonic() < deadline:
            total = max(daemon.use.total for daemon in client.cluster_status().kvdaemons)
            if total:
                return total
            time.sleep(0.1)
    raise AssertionError("no pool has a geometry")


@cache
def reference(name: str, directory: Path) -> Reference:
    """One for both transports; ``directory`` is where the checkpoint is written."""
    return Reference(served(name).write(directory / name), ORIGINAL_POSITIONS if name in LONGROPE else None)


@cache
def expected_answer(reference: Reference, prompt: tuple[int, ...], count: int) -> Answer:
    return reference.generate(prompt, count)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("name", "transport"), CASES)
def test_sixteen_requests_at_once_and_one_alone(name: str, transport: str, models: Path, tmp_path: Path):
    transformers = reference(name, models)
    pool_mib = str(POOL_MIB.get(name, 1))
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", pool_mib, "--dtype", "float32")
    with Cluster(models / name, tmp_path / "run", *arguments, "--transport", transport, config=CONFIG) as cluster:

        def complete(prompt: list[int], count: int) -> Completion:
            return cluster.complete(prompt, max_tokens=count, ignore_eos=True, logprobs=1)

        share = (3 * blocks_of_a_pool(cluster) - WORKSPACE) / BLOCKS
        lengths = [(min(round(length * share), 1400), round(count * share)) for length, count in LENGTHS]
        prompts = [random.Random(n).choices(range(VOCAB_SIZE), k=length) for n, (length, _) in enumerate(lengths)]
        counts = [count for _, count in lengths]
        with ThreadPoolExecutor(len(prompts)) as pool:
            first = pool.map(complete, prompts[:6], counts[:6])
            time.sleep(0.2)  # the six that outgrow the memory together come first
            others = pool.map(complete, prompts[6:], counts[6:])
            answers = [*first, *others]
        prompts.append(random.Random(99).choices(range(VOCAB_SIZE), k=700))
        counts.append(60)
        answers.append(complete(prompts[-1], counts[-1]))
        scored = cluster.complete(prompts[-1], max_tokens=0, echo=True, logprobs=1, ignore_eos=True)
        cluster.wait_until_no_block_is_held()
        logs = "".join(log.read_text() for log in cluster.run_dir.rglob("*.log"))
        assert "request preempted" in logs, "memory was meant to be short"
    alone = expected_answer(transformers, tuple(prompts[-1]), counts[-1])
    assert scored.token_logprobs[0] is None
    alone.check_prompt([[token] for token in prompts[-1][1:]], [[logprob] for logprob in scored.token_logprobs[1:]])
    exact = 0
    for prompt, count, answer in zip(prompts, counts, answers, strict=True):
        expected = expected_answer(transformers, tuple(prompt), count)
        assert len(answer.token_ids) == count
        assert list(answer.token_ids[: expected.exact]) == expected.tokens[: expected.exact]
        for position in range(expected.exact):
            expected.check_logprobs(position, answer.token_ids[position:][:1], answer.token_logprobs[position:][:1])
        exact += expected.exact
    assert exact >= 0.7 * sum(counts), "margins too small to show much; choose another seed"
