"""Nobody lacks memory, and a long request's attention runs on several daemons all the same; its tokens are the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from cluster_process import Cluster
from moving import DEADLINE_S, Mover, Stream
from reference import Reference
from test_serving import prompt_of
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.cluster

_CONTEXT, _TOKENS = 2048, 800
# Attention is nearly all of a step. What these two cores do beside it is not to decide whether answers hide.
_CONFIG = {
    "instance": {"max_batch_tokens": 512, "max_num_seqs": 2},
    "gmanager": {"plan_interval_s": 0.2, "policy": {"hide": 1.0, "still_hide": 1.0, "settle_s": 0.5}},
}


def write_model(path: Path) -> None:
    """32 KiB of KV a token, few weights; attention so flat that every block of the context counts."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=128,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(8.0)
    model.save_pretrained(path)


def test_a_long_request_is_spread_for_speed(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model)
    prompt = prompt_of(_CONTEXT, seed=61)
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "128", "--dtype", "float32")
    with Cluster(model, tmp_path / "c", *arguments, config=_CONFIG) as cluster:
        stream = Stream(cluster, prompt, _TOKENS)
        stream.wait_for_tokens(1)
        spread = spread_blocks(cluster, stream)
        before = len(stream.token_ids)
        tokens = stream.finish()
        assert sum(spread.values()) >= 4, spread
        expected = Reference(model).generate(prompt, _TOKENS)
        expected.check_tokens(tokens)
        assert expected.exact > before + 50, "too few tokens of those computed in several places can be compared"
        Mover(cluster).check_ledgers()


def spread_blocks(cluster: Cluster, stream: Stream) -> dict[str, int]:
    """Blocks of the only request on other daemons than its own, by daemon, once there are some."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        for request in cluster.status().requests:
            if found := {part.kvdaemon_id: part.num_blocks for part in request.placement if not part.local}:
                return found
        assert stream.running, f"it was never spread\n{cluster.logs()}"
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.05)
