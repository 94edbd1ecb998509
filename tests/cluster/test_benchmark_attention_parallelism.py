"""``python -m benchmarks.attention_parallelism``: all three methods compute attention, and send what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.attention_methods import METHODS
from benchmarks.attention_parallelism import DIST, RING, TP, check_agreement
from benchmarks.attention_ranks import Ranks
from benchmarks.decode_layer import GEOMETRY, HEAD_DIM, HEADS, fill_blocks, make_query, share_of
from kernels.cpu import find_library

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(find_library() is None, reason="the compiled CPU kernels were not built"),
]

BLOCKS = 16
TOKENS = BLOCKS * GEOMETRY.block_tokens


def expected() -> torch.Tensor:
    """Attention over the same blocks, as torch computes it in float32."""
    pool = torch.empty(BLOCKS, *GEOMETRY.block_shape, dtype=torch.bfloat16)
    fill_blocks(pool, range(BLOCKS))
    keys, values = pool[:, 0].float().permute(2, 1, 0, 3, 4).flatten(2, 3)  # [heads, tokens, head_dim]
    scores = torch.einsum("hd,hkd->hk", make_query()[0].float(), keys) * HEAD_DIM**-0.5
    return torch.einsum("hk,hkd->hd", scores.softmax(-1), values).flatten()


@pytest.mark.parametrize("processes", [2, 3])
def test_every_method_computes_attention_and_sends_what_it_must(tmp_path: Path, processes: int) -> None:
    right = expected()
    output = HEADS * HEAD_DIM * 2
    hops = sum(rank * len(share_of(BLOCKS, rank, processes)) for rank in range(processes))
    sent = {
        DIST: (processes - 1) * (2 * output + HEADS * 4),
        TP: (processes - 1) * output,
        RING: hops * (GEOMETRY.block_bytes + 4),
    }
    cores = sorted(os.sched_getaffinity(0))
    with Ranks(processes, cores, "tcp", tmp_path) as ranks, ranks.context(TOKENS):
        for _ in range(2):  # each method also after all the others
            for method in METHODS:
                measured = ranks.measure(method, 2)
                torch.testing.assert_close(torch.tensor(measured[0].out), right, atol=0.01, rtol=0.01)
                assert sum(rank.sent_bytes for rank in measured) == sent[method]


def test_a_quick_run_records_the_ratios(tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    command = [sys.executable, "-m", "benchmarks.attention_parallelism", "--quick", "--contexts", "1024"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == set(METHODS)
    for row in rows.values():
        assert 0 < row["time_over_dist_min"] <= row["time_over_dist"] <= row["time_over_dist_max"]
    assert result["targets"]["ring_over_dist_1024_2"]["value"] == rows[RING]["time_over_dist"]
    assert result["targets"]["tp_over_dist_1024_2"]["value"] == rows[TP]["time_over_dist"]


def test_results_that_differ_void_the_measurement() -> None:
    base = [0.5, -1.0]
    check_agreement({DIST: base, RING: [0.505, -1.0], TP: [0.5, -0.99]})
    with pytest.raises(SystemExit, match="RingAttention and DistAttention computed different results"):
        check_agreement({DIST: base, RING: [0.53, -1.0]})
    with pytest.raises(SystemExit, match="tensor parallelism"):
        check_agreement({DIST: base, TP: [float("nan"), -1.0]})
