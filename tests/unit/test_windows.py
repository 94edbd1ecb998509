"""Sliding windows: daemons are not asked for what no row sees, and the probe notices what a layer leaves out."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from architectures import VOCAB_SIZE, WINDOW, Architecture, served
from engine_daemon import Query
from engine_rig import EngineRig
from torch import Tensor

from kernels import AttentionPlan, LayerParams
from kernels.reference import ReferenceKernels
from services.core.blocks import BlockHandle, BlockRef
from services.core.errors import UnsupportedModelError
from services.core.sequence import Request, SamplingParams, Sequence
from services.instance.batch import build_batch
from services.instance.model import load_model
from services.instance.probe import probe
from services.instance.rotary import RotaryRegimes
from services.instance.scheduler import Scheduled
from services.rmanager.block_table import BlockTable, Home

PROMPT = random.Random(1).choices(range(VOCAB_SIZE), k=600)


def queries_of(path: Path, max_tokens: int) -> list[Query]:
    """What lenders are asked while a prompt of nine blocks, four of them on lenders, is computed and continued."""
    with EngineRig(path, local_blocks=14, lenders=(3, 2)) as rig:
        rig.submit("r", PROMPT, max_tokens)
        rig.wait("r")
        assert len(rig.tokens("r")) == max_tokens
        rig.check_nothing_held()
        assert [stats.cached for stats in rig.stats()[1:]] == [3, 1]
        return [query for daemon in rig.lenders for query in daemon.queries]


def test_nobody_is_asked_beyond_the_window(tmp_path: Path):
    """Blocks on lenders lie at the prompt's beginning: prefill may read some of them, decode none."""
    queries = queries_of(served("mistral").write(tmp_path / "mistral"), 30)
    assert all(query.window == WINDOW and query.distance < WINDOW for query in queries)
    assert not [query for query in queries if query.rows == 1]


def test_what_nobody_sees_takes_no_room_in_a_daemons_window(tmp_path: Path):
    """Plans without queries were never answered: after some hundred steps no block could be written any more."""
    with EngineRig(served("mistral").write(tmp_path / "mistral"), local_blocks=14, lenders=(6, 5)) as rig:
        rig.submit("r", PROMPT, 200)
        rig.wait("r")
        assert len(rig.tokens("r")) == 200
        assert {rig.bytes_under_way(f"lender-{number}") for number in range(2)} == {0}
        rig.check_nothing_held()


def test_layers_without_a_window_ask_at_every_step(tmp_path: Path):
    queries = queries_of(served("gemma2").write(tmp_path / "gemma2"), 30)
    decode = [query for query in queries if query.rows == 1]
    assert {(query.layer, query.window) for query in decode} == {(1, 0)}
    assert len(decode) == 2 * 29  # both lenders; the first token comes from prefill
    assert all(query.distance < WINDOW for query in queries if query.window)


def test_the_nearest_key_of_any_sequence_decides():
    """Two sequences with blocks on one daemon; a window asks it if it is longer than the smaller distance."""
    request = Request("r", (1,) * 700, 700, SamplingParams(0.0, 0, 1), 0.0, 1)
    scheduled, tables = [], []
    for computed, last_remote in ((640, 1), (576, 3)):
        sequence = Sequence(request)
        sequence.computed = computed
        table = BlockTable(64)
        for index in range(computed // 64 + 1):
            handle = BlockHandle(index, 1)
            if index <= last_remote:
                table.append_remote(BlockRef("lender", handle), segment_handle=computed)
            else:
                table.append_local(handle, Home.WORKSPACE)
        scheduled.append(Scheduled(sequence, 2))
        tables.append(table)
    near, far = 576 - (4 * 64 - 1), 640 - (2 * 64 - 1)
    for reach, rows in ((near, []), (near + 1, [2, 3]), (far, [2, 3]), (far + 1, [0, 1, 2, 3]), (0, [0, 1, 2, 3])):
        shares = build_batch(scheduled, tables, RotaryRegimes(None, 1000), reach).shares
        assert [(share.distance, share.rows.tolist()) for share in shares] == ([(near, rows)] if rows else [])


class LeavesOut(ReferenceKernels):
    """Kernels that do not know one of a layer's parameters."""

    def __init__(self, what: str) -> None:
        self._what = what

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        wrong = {"window": replace(params, window=0), "softcap": replace(params, softcap=0.0)}
        super().micro_attention(q, pool, plan, wrong.get(self._what, params), out, lse)

    def merge_sinks(self, out: Tensor, lse: Tensor, sinks: Tensor) -> None:
        if self._what != "sinks":
            super().merge_sinks(out, lse, sinks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "what"), [("gemma2", "window"), ("gemma2", "softcap"), ("gpt-oss", "sinks"), ("gpt-oss", "window")]
)
def test_the_probe_notices_what_is_left_out(name: str, what: str, dtype: str, tmp_path: Path):
    model = load_model(served(name).write(tmp_path / name), dtype, None)
    probe(model, LeavesOut("nothing"), 64, dtype)
    with pytest.raises(UnsupportedModelError, match="differs from eager attention"):
        probe(model, LeavesOut(what), 64, dtype)


def test_a_layer_that_does_not_ask_for_its_window_is_noticed(tmp_path: Path):
    model = load_model(served("gemma2").write(tmp_path / "gemma2"), "float32", None)
    model.module.model.layers[2].self_attn.sliding_window = None  # type: ignore[union-attr,index]
    with pytest.raises(UnsupportedModelError, match="differs from eager attention"):
        probe(model, ReferenceKernels(), 64, "float32")


def test_a_window_too_long_to_try_must_be_the_declared_one(tmp_path: Path):
    settings = {"sliding_window": 4096, "max_position_embeddings": 8192}
    model = load_model(Architecture("long", "MistralConfig", settings).write(tmp_path / "long"), "float32", None)
    probe(model, ReferenceKernels(), 64, "float32")
    model.module.config.sliding_window = None  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match="asks for a window of 4096 tokens in layer 0"):
        probe(model, ReferenceKernels(), 64, "float32")


def test_keys_wider_than_values_are_kept_in_blocks_of_the_wider(tmp_path: Path):
    model = load_model(served("deepseek-v3").write(tmp_path / "deepseek"), "float32", None)
    assert (model.shape.head_dim, model.shape.kv_heads) == (24, 4)
    model = load_model(served("gemma4").write(tmp_path / "gemma4"), "float32", None)
    assert model.shape.head_dim == 32
    assert model.shape.attention.windows == (WINDOW, WINDOW, 0)
