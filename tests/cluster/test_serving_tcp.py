"""The whole system over TCP, RDMA and torch.distributed, each over an emulated link."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_process import Cluster
from test_serving import SMALL_ENGINE, assert_same_tokens, prompt_of

pytestmark = pytest.mark.cluster

LATENCY_S = 2e-3
LAYERS, TOKENS = 4, 24


@pytest.mark.parametrize("transport", ["tcp", "rdma", "gloo"])
def test_kv_over_three_daemons(
    transport: str,
    random_llama: Path,
    greedy_reference: Callable[[list[int], int], tuple[list[int], list[float]]],
    tmp_path: Path,
):
    """The tokens are transformers', and each one takes as long as its layers' round trips over the emulated link."""
    if transport == "rdma":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed: pip install infinite-llm[rdma]")
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "2", "--dtype", "float32")
    over = ("--transport", transport, "--link", f"10gbit,{LATENCY_S * 1e3}ms")
    prompt = prompt_of(1500, seed=1)
    expected, margins = greedy_reference(prompt, TOKENS)
    with Cluster(random_llama, tmp_path / "c", *arguments, *over, config=SMALL_ENGINE) as cluster:
        assert f"{transport}:127.0.0.1:" in cluster.logs()
        begin = time.monotonic()
        answer = cluster.complete(prompt, max_tokens=TOKENS, ignore_eos=True)
        assert time.monotonic() - begin >= TOKENS * LAYERS * 2 * LATENCY_S
        assert_same_tokens(answer.token_ids, expected, margins)
        cluster.wait_until_no_block_is_held()
