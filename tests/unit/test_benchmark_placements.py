"""How benchmarks.smoke sizes its pools and knows the right answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.long_request import ANSWER_TOKENS, MAX_TOKENS, expected_tokens
from benchmarks.placements import LENDERS, SHARES, plan_placements
from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError
from services.launcher.needle.spec import needle_spec
from services.launcher.needle.task import make_task

GEOMETRY = PoolGeometry(layers=4, kv_heads=2, block_tokens=64, head_dim=128, dtype="bfloat16")  # 256 KiB a block


@pytest.mark.parametrize("context", [4096, 16384, 49152])
def test_pools_hold_a_quarter_beside_the_instance(context: int):
    plan = plan_placements(Path("model"), GEOMETRY, context, MAX_TOKENS)
    blocks = GEOMETRY.blocks_for(context)
    workspace = 1 + 2 * (plan.chunk_tokens // 64 + 1)
    blocks_per_mib = 4
    assert abs(plan.remote.pool_mib * blocks_per_mib - workspace - blocks / SHARES) <= blocks_per_mib / 2
    assert LENDERS * plan.remote.pool_mib * blocks_per_mib > blocks * LENDERS / SHARES + MAX_TOKENS / 64
    assert plan.local.pool_mib * blocks_per_mib >= workspace + GEOMETRY.blocks_for(context + MAX_TOKENS)
    assert plan.local.overlay == plan.remote.overlay
    assert (plan.local.kvdaemons, plan.remote.kvdaemons) == (0, LENDERS)


def test_a_context_too_short_to_be_split_is_refused():
    with pytest.raises(ConfigError, match="longer context"):
        plan_placements(Path("model"), GEOMETRY, 512, MAX_TOKENS)


def test_the_checkpoint_goes_on_with_what_followed_the_needle():
    vocabulary = needle_spec("std").vocabulary
    task = make_task(vocabulary, 2000, 0.4, seed=1)
    tokens = expected_tokens(vocabulary, task, ANSWER_TOKENS + 64)
    assert len(tokens) == ANSWER_TOKENS + 64
    assert tokens[:ANSWER_TOKENS] == task.expected_token_ids
    prompt = task.prompt_token_ids
    needle = next(at for at in range(2000) if prompt[at : at + ANSWER_TOKENS] == task.expected_token_ids)
    assert tokens == prompt[needle : needle + len(tokens)]
