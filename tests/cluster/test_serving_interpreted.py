"""What runs on a GPU, end to end without one: daemons and an instance whose Triton kernels are interpreted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from cluster_process import Cluster
from greedy import greedy
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.cluster

# Per rBlock of 16 tokens 64 KiB: 16 in a pool of 1 MiB, 6 of them the instance's workspace.
_CONFIG = {"instance": {"block_tokens": 16, "max_batch_tokens": 32, "max_num_seqs": 2}}


def test_triton_kernels_over_three_daemons_give_the_tokens_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = _write_tiny_llama(tmp_path / "tiny")
    prompt = random.Random(3).choices(range(128), k=480)  # 30 blocks
    expected, margins = greedy(model)(prompt, 4)
    assert min(margins) > 1e-3, "margins too small to show anything; choose another seed"
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "1", "--dtype", "float32")
    with Cluster(model, tmp_path / "run", *arguments, "--device", "interpreter", config=_CONFIG) as cluster:
        answer, fullest = cluster.complete_watched(prompt, max_tokens=4, ignore_eos=True)
        assert answer.token_ids == expected
        assert len(fullest) == 3, f"the KV should lie on three daemons: {fullest}"
        cluster.wait_until_no_block_is_held()


def _write_tiny_llama(path: Path) -> Path:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path
