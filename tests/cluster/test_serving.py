"""The whole system, real processes: requests whose KV cache no single pool holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cluster_process import Cluster
from greedy import Reference

from services.launcher.needle.spec import needle_spec
from services.launcher.needle.task import make_task

pytestmark = pytest.mark.cluster

# One float32 rBlock of random_llama is 128 KiB (4 layers, 2 KV heads, K and V, 64 tokens, head_dim 32): 16 in 2 MiB.
SMALL_ENGINE = {"instance": {"max_batch_tokens": 128, "max_num_seqs": 4}}


@pytest.fixture(scope="module")
def three_pools(random_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One instance with its daemon and two more, each too small for the prompts sent to them."""
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "2", "--dtype", "float32")
    with Cluster(random_llama, tmp_path_factory.mktemp("run") / "c", *arguments, config=SMALL_ENGINE) as cluster:
        yield cluster


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(512), k=length)


def assert_same_tokens(got: list[int], expected: list[int], margins: list[float]) -> None:
    """Equal up to the first position whose two best logits are so close that rounding may decide."""
    cut = next((i for i, margin in enumerate(margins) if margin < 1e-3), len(expected))
    assert cut > len(expected) // 2, "the prompt's margins are too small to show anything; choose another seed"
    assert got[:cut] == expected[:cut]


def test_kv_over_three_daemons_gives_the_tokens_of_transformers(three_pools: Cluster, greedy_reference: Reference):
    prompt = prompt_of(1500, seed=1)
    expected, margins = greedy_reference(prompt, 300)
    answer, fullest = three_pools.complete_watched(prompt, max_tokens=300, ignore_eos=True)
    assert_same_tokens(answer.token_ids, expected, margins)
    assert len(fullest) == 3, f"the KV should lie on three daemons: {fullest}"
    assert max(fullest.values()) <= sum(fullest.values()) / 2, f"no daemon should hold more than half: {fullest}"
    three_pools.wait_until_no_block_is_held()


def test_many_requests_at_once_do_not_disturb_each_other(three_pools: Cluster, greedy_reference: Reference):
    prompts = [prompt_of(length, seed=10 + length) for length in (3, 40, 64, 65, 200, 333, 500, 700)]
    expected = [greedy_reference(prompt, 24) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: three_pools.complete(prompt, max_tokens=24, ignore_eos=True), prompts))
    for answer, (tokens, margins) in zip(answers, expected, strict=True):
        assert_same_tokens(answer.token_ids, tokens, margins)
    three_pools.wait_until_no_block_is_held()


def test_decoding_beyond_the_local_pool_spills(three_pools: Cluster, greedy_reference: Reference):
    prompt = prompt_of(100, seed=2)
    answer = three_pools.complete(prompt, max_tokens=900, ignore_eos=True)
    expected, margins = greedy_reference(prompt, 900)
    assert len(answer.token_ids) == 900
    cut = next((i for i, margin in enumerate(margins) if margin < 1e-3), len(expected))
    assert cut > 50
    assert answer.token_ids[:cut] == expected[:cut]
    three_pools.wait_until_no_block_is_held()


def test_a_repeated_prompt_attaches_to_the_cached_blocks(three_pools: Cluster):
    prompt = prompt_of(640, seed=4)  # ten full blocks: the last one is computed again for its last token
    first = three_pools.complete(prompt, max_tokens=8, ignore_eos=True)
    second = three_pools.complete(prompt, max_tokens=8, ignore_eos=True)
    assert second.token_ids == first.token_ids
    three_pools.wait_until_no_block_is_held()


def test_temperature_draws_the_same_tokens_for_the_same_seed(three_pools: Cluster):
    prompt = prompt_of(70, seed=5)
    draws = [
        three_pools.complete(prompt, max_tokens=16, ignore_eos=True, temperature=0.8, seed=seed).token_ids
        for seed in (7, 7, 8)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_a_client_that_disconnects_frees_its_blocks_everywhere(three_pools: Cluster):
    for count, _ in enumerate(three_pools.stream(prompt_of(1400, seed=6), max_tokens=600, ignore_eos=True)):
        if count == 3:
            break  # leaves the stream's context, which closes the connection
    three_pools.wait_until_no_block_is_held()


def test_a_context_beyond_the_clusters_memory_is_refused_by_name(three_pools: Cluster):
    response = three_pools.request(prompt_of(4000, seed=7), max_tokens=4)
    assert response.status_code == 400, response.text
    assert "rBlocks" in response.json()["error"]["message"]
    three_pools.wait_until_no_block_is_held()


def test_four_times_one_pool_is_refused_by_one_daemon(random_llama: Path, tmp_path: Path):
    """... and answered by a pool of daemons: three_pools has served such prompts, here with exactly 4x."""
    prompt = prompt_of(64 * 64, seed=8)  # 64 rBlocks; a pool of 2 MiB holds 16
    alone = ("--instances", "1", "--kvdaemons", "0", "--pool-mib", "2", "--dtype", "float32")
    with Cluster(random_llama, tmp_path / "alone", *alone, config=SMALL_ENGINE) as cluster:
        response = cluster.request(prompt, max_tokens=4)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "add KV daemons" in error["message"]
        cluster.wait_until_no_block_is_held()
    pooled = ("--instances", "1", "--kvdaemons", "4", "--pool-mib", "2", "--dtype", "float32")
    with Cluster(random_llama, tmp_path / "pooled", *pooled, config=SMALL_ENGINE) as cluster:
        answer = cluster.complete(prompt, max_tokens=4, ignore_eos=True)
        assert len(answer.token_ids) == 4
        cluster.wait_until_no_block_is_held()


@pytest.fixture(scope="module")
def needle_cluster(needle_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two instances and two memory-only daemons; 8 KB of KV a token, 16 MiB a pool: 2K tokens each."""
    arguments = ("--instances", "2", "--kvdaemons", "2", "--pool-mib", "16")
    config = {"instance": {"max_batch_tokens": 256, "max_num_seqs": 4}}
    with Cluster(needle_model, tmp_path_factory.mktemp("run") / "n", *arguments, config=config) as cluster:
        yield cluster


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
def test_a_needle_is_found_at_every_depth(needle_cluster: Cluster, depth: float):
    task = make_task(needle_spec("std", layers=8).vocabulary, 4000, depth, seed=int(depth * 10))
    answer = needle_cluster.complete(task.prompt_token_ids, max_tokens=16, logprobs=2)
    assert answer.token_ids == list(task.expected_token_ids)
    assert answer.finish_reason == "stop"
    for top in answer.top_logprobs:  # a difference of log-probabilities is a difference of logits
        best, second = sorted(top.values(), reverse=True)[:2]
        assert best - second >= 15.9


def test_a_missing_key_gives_the_end_of_the_text_at_once(needle_cluster: Cluster):
    task = make_task(needle_spec("std", layers=8).vocabulary, 4000, 0.5, seed=77, missing=True)
    answer = needle_cluster.complete(task.prompt_token_ids, max_tokens=16)
    assert answer.token_ids == list(task.expected_token_ids)
    assert len(answer.token_ids) == 1
    needle_cluster.wait_until_no_block_is_held()
