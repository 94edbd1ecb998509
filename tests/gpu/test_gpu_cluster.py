"""Clusters whose processes share one GPU: real checkpoints, exact tokens, a needle at 128K."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from cluster_process import Cluster
from random_llama import write_random_llama
from reference import Reference

from services.launcher.needle.checkpoint import write_checkpoint
from services.launcher.needle.spec import needle_spec
from services.launcher.needle.task import make_task

pytestmark = pytest.mark.cluster

# Two instances and three daemons on one GPU.
_PLACES = ("--device", "cuda", "--instances", "2", "--kvdaemons", "1")


@pytest.mark.parametrize("memory", ["cuda", "cpu"])
def test_the_tokens_of_transformers(tmp_path: Path, memory: str) -> None:
    """Over three pools, of which one lies on the GPU or in host memory; then eight requests at once."""
    model = tmp_path / "llama"
    write_random_llama(model, logit_scale=4.0)
    reference = Reference(model)
    arguments = (*_PLACES, "--memory-device", memory, "--pool-mib", "2", "--dtype", "float32")
    config = {"instance": {"max_batch_tokens": 128, "max_num_seqs": 4}}
    with Cluster(model, tmp_path / "run", *arguments, config=config) as cluster:
        prompt = random.Random(1).choices(range(512), k=1800)
        answer, placement = cluster.complete_watched(prompt, max_tokens=100, ignore_eos=True)
        reference.generate(prompt, 100).check_tokens(answer.token_ids)
        assert len(placement) == 3, f"the KV should lie on three daemons: {placement}"
        cluster.wait_until_no_block_is_held()
        answers: dict[int, list[int]] = {}
        prompts = {seed: random.Random(seed).choices(range(512), k=20 + 37 * seed) for seed in range(2, 10)}

        def ask(seed: int) -> None:
            answers[seed] = cluster.complete(prompts[seed], max_tokens=40, ignore_eos=True).token_ids

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        for seed, prompt in prompts.items():
            reference.generate(prompt, 40).check_tokens(answers[seed])
        cluster.wait_until_no_block_is_held()


def test_a_needle_in_a_haystack_of_128k(tmp_path: Path) -> None:
    """8 KiB of KV a token, 1 GiB in all; 400 MiB a pool."""
    model = tmp_path / "needle"
    spec = needle_spec("std", layers=8)
    write_checkpoint(model, spec, "bfloat16")
    config = {"instance": {"max_batch_tokens": 4096, "max_num_seqs": 2}}
    with Cluster(model, tmp_path / "run", *_PLACES, "--pool-mib", "400", config=config) as cluster:
        for depth, missing in ((0.1, False), (0.9, False), (0.5, True)):
            task = make_task(spec.vocabulary, 128_000, depth, seed=int(10 * depth), missing=missing)
            answer, placement = cluster.complete_watched(list(task.prompt_token_ids), max_tokens=16)
            assert answer.token_ids == list(task.expected_token_ids)
            assert len(placement) == 3, f"the KV should lie on three daemons: {placement}"
        cluster.wait_until_no_block_is_held()
