"""Nobody lacks memory, and a long request's attention runs on several daemons all the same; its tokens are the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cluster_process import Cluster
from moving import DEADLINE_S, Mover, Stream
from random_llama import write_random_llama
from reference import Reference
from test_serving import prompt_of

pytestmark = pytest.mark.cluster

_CONTEXT, _TOKENS = 2048, 800
# 32 KiB of KV a token and few weights: attention is nearly all of a step.
_MODEL = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 128, "num_key_value_heads": 8}
# What these two cores do beside it is not to decide whether answers hide.
_CONFIG = {
    "instance": {"max_batch_tokens": 512, "max_num_seqs": 2},
    "gmanager": {"plan_interval_s": 0.2, "policy": {"hide": 1.0, "still_hide": 1.0, "settle_s": 0.5}},
}


def test_a_long_request_is_spread_for_speed(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_random_llama(model, 8.0, **_MODEL)
    prompt = prompt_of(_CONTEXT, seed=61)
    arguments = ("--instances", "1", "--kvdaemons", "2", "--pool-mib", "128", "--dtype", "float32")
    with Cluster(model, tmp_path / "c", *arguments, config=_CONFIG) as cluster:
        stream = Stream(cluster, prompt, _TOKENS)
        stream.wait_for_tokens(1)
        wait_until_spread(cluster, stream)
        before = len(stream.token_ids)
        tokens = stream.finish()
        expected = Reference(model).generate(prompt, _TOKENS)
        expected.check_tokens(tokens)
        assert expected.exact > before + 50, "too few tokens of those computed in several places can be compared"
        Mover(cluster).check_ledgers()


def wait_until_spread(cluster: Cluster, stream: Stream) -> None:
    """Until blocks of the only request lie on other daemons than its own; how many, the planner makes of speeds that it
    measures."""
    deadline = time.monotonic() + DEADLINE_S
    while not any(not part.local for request in cluster.status().requests for part in request.placement):
        assert stream.running, f"it was never spread\n{cluster.logs()}"
        assert time.monotonic() < deadline, cluster.logs()
        time.sleep(0.05)
