"""Micro-attention of every implementation against float64."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise

import oracle
import pytest
import torch
from attention_cases import Case, Segment, context, make_case, make_plan
from torch import Tensor

from kernels import AttentionKernels

# The oracle computes with the same rounded inputs, so only arithmetic and the rounding of the result differ. Sums of
# float32 over a few hundred keys and scores of magnitude about 5 err by some units of 2**-24 times their magnitude.
FLOAT32_TOLERANCE = 4e-6
# A result in 16 bits is rounded once more: half a unit in the last place, relative.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Triton's interpreter cuts off where it should round to bfloat16.
INTERPRETER_ROUNDING = {**ROUNDING, torch.bfloat16: 2.0**-7}
# Where products are of pairs of bfloat16, prefill rounds weights to them (kernels/cpu/src/prefill.h), as
# the oracle then does. A few that float32 holds on the other side of the middle between two are rounded the other way.
ROUNDING_SET = "avx512-bf16"
PAIRED_DIMS = 32  # a head is whole vectors of pairs
DECODED_ROWS = 32  # of queries times heads of a group: no prefill
ROUNDED_ALIKE = 0.95
# On a GPU's tensor cores the weights, at most 1, are rounded to the dtype of the values they multiply.
WEIGHT_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check(kernels: AttentionKernels, case: Case, out_dtype: torch.dtype = torch.float32) -> None:
    out, lse = case.run(kernels, out_dtype)
    rounded = rounded_segments(kernels, case)
    expected_out, expected_lse = oracle.attention(case.q, case.pool, case.plan, case.params, rounded)
    tolerance, rounding = FLOAT32_TOLERANCE, ROUNDING[out_dtype]
    # The cap multiplies the rounding error of tanh, which is at most 1.
    lse_tolerance = FLOAT32_TOLERANCE + case.params.softcap * 2.0**-22
    if kernels.name == "triton":
        tolerance += WEIGHT_ROUNDING[case.pool.dtype] * float(expected_out.abs().max() + 1)
        rounding = INTERPRETER_ROUNDING[out_dtype]
    if rounded:
        assert_nearly_all_close(out, expected_out, tolerance, rounding * 1.01)
        assert_nearly_all_close(lse, expected_lse, lse_tolerance, 1e-6)
        tolerance, lse_tolerance = 2.0**-8 * float(case.pool.nan_to_num(0).abs().max()), 2.0**-8
        expected_out, expected_lse = oracle.attention(case.q, case.pool, case.plan, case.params)
    torch.testing.assert_close(out.double(), expected_out, atol=tolerance, rtol=rounding * 1.01)
    torch.testing.assert_close(lse.double(), expected_lse, atol=lse_tolerance, rtol=1e-6)


def rounded_segments(kernels: AttentionKernels, case: Case) -> set[int]:
    """Those of which the kernels round weights."""
    if getattr(kernels, "instruction_set", None) != ROUNDING_SET or case.pool.dtype != torch.bfloat16:
        return set()
    group, starts = case.q.shape[1] // case.pool.shape[2], case.plan.query_start.tolist()
    return {
        segment
        for segment, (start, end) in enumerate(pairwise(starts))
        if (end - start) * group > DECODED_ROWS and case.pool.shape[-1] % PAIRED_DIMS == 0
    }


def assert_nearly_all_close(found: Tensor, expected: Tensor, atol: float, rtol: float) -> None:
    # Where nothing is seen both are -inf.
    close = torch.isclose(found.double(), expected, atol=atol, rtol=rtol)
    assert close.double().mean() >= ROUNDED_ALIKE


@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("rows", [1, 40])
def test_lengths_around_the_block_size(kernels: AttentionKernels, keys: int, rows: int) -> None:
    check(kernels, make_case([context(keys, min(keys, rows))]))


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_grouped_heads(kernels: AttentionKernels, group: int, rows: int) -> None:
    check(kernels, make_case([context(100, rows)], group=group))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_decoding_bfloat16(kernels: AttentionKernels, group: int, head_dim: int) -> None:
    """Where keys and values are read as pairs: all sizes of register tiles, and a last block that is not full."""
    check(kernels, make_case([context(150)], group=group, head_dim=head_dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("window", [0, 100])
def test_prefill_bfloat16(kernels: AttentionKernels, group: int, head_dim: int, window: int) -> None:
    """Several tiles of keys and, with groups, of rows, the last of them not full."""
    case = make_case([context(430, 90)], group=group, head_dim=head_dim, window=window, dtype=torch.bfloat16)
    check(kernels, case)


@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 96, 128, 256, 20])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims(kernels: AttentionKernels, head_dim: int, rows: int, dtype: torch.dtype) -> None:
    check(kernels, make_case([context(90, rows)], head_dim=head_dim, dtype=dtype, kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("wide_out", [True, False])
def test_dtypes(kernels: AttentionKernels, dtype: torch.dtype, rows: int, wide_out: bool) -> None:
    check(kernels, make_case([context(150, rows)], dtype=dtype), torch.float32 if wide_out else dtype)


@pytest.mark.parametrize("block_tokens", [16, 24, 128])
@pytest.mark.parametrize("rows", [1, 70])
def test_block_sizes(kernels: AttentionKernels, block_tokens: int, rows: int) -> None:
    if kernels.name == "triton" and block_tokens == 24:
        pytest.skip("the Triton kernels take powers of two")
    check(kernels, make_case([context(150, rows, block_tokens)], block_tokens=block_tokens, dtype=torch.bfloat16))


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_block_lists(kernels: AttentionKernels, window: int, rows: int, dtype: torch.dtype) -> None:
    """Long enough to be split over threads or GPU programs, some of which see nothing of the window."""
    segments = [context(600, rows, 16), context(400, 1, 16)]
    check(kernels, make_case(segments, block_tokens=16, window=window, dtype=dtype))


@pytest.mark.parametrize("window", [1, 5, 64, 70, 1000])
@pytest.mark.parametrize("rows", [1, 60])
def test_sliding_window(kernels: AttentionKernels, window: int, rows: int) -> None:
    check(kernels, make_case([context(300, rows)], window=window))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcap(kernels: AttentionKernels, softcap: float, rows: int, dtype: torch.dtype) -> None:
    check(kernels, make_case([context(130, rows)], softcap=softcap, dtype=dtype))


@pytest.mark.parametrize("window", [0, 90])
def test_ragged_batch(kernels: AttentionKernels, window: int) -> None:
    """Decode and prefill segments, segments without rows and without blocks, in one call."""
    segments = [
        context(200),
        Segment(0, 10, (0,)),
        context(130, 70),
        Segment(5, 7, ()),
        context(65, 4),
        Segment(40, 100, ()),
        context(1),
    ]
    check(kernels, make_case(segments, window=window, dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 90])
def test_blocks_with_gaps(kernels: AttentionKernels, rows: int) -> None:
    """What is missing lies in other pools; blocks after the last query are not seen at all."""
    check(kernels, make_case([Segment(rows, 300, (64, 192, 256, 320, 448))]))


def test_rows_before_the_first_block(kernels: AttentionKernels) -> None:
    """Some rows of a chunk see nothing of this pool: out 0, lse -inf."""
    case = make_case([Segment(100, 0, (64,)), Segment(3, 10, (64,))])
    out, lse = case.run(kernels)
    assert torch.isneginf(lse[:64]).all()
    assert (out[:64] == 0).all()
    check(kernels, case)


def test_window_hides_every_block(kernels: AttentionKernels) -> None:
    out, lse = make_case([Segment(2, 200, (0, 64)), Segment(40, 200, (0, 64))], window=20).run(kernels)
    assert torch.isneginf(lse).all()
    assert (out == 0).all()


def test_nothing_to_do(kernels: AttentionKernels) -> None:
    case = make_case([context(5, 3)])
    nothing = dataclasses.replace(case, q=case.q[:0], plan=make_plan([], []))
    assert nothing.run(kernels)[0].numel() == 0
    out, lse = dataclasses.replace(case, plan=make_plan([], [])).run(kernels)
    assert (out == 0).all()
    assert torch.isneginf(lse).all()


def test_rows_of_no_segment_see_nothing(kernels: AttentionKernels) -> None:
    case = make_case([context(5, 3)])
    plan = make_plan([Segment(1, 4, (0,))], [int(case.plan.block_ids[0])], row_offset=1)
    check(kernels, dataclasses.replace(case, plan=plan))


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(kernels: AttentionKernels, seed: int) -> None:
    """Some segments of any length, with any of the blocks before their queries, in any shape of model."""
    chance = random.Random(seed)
    block_tokens = chance.choice([16, 32, 64])
    segments = []
    for _ in range(chance.randint(1, 5)):
        rows, pos = (
            chance.choice([1, 1, 1, 2, 9, 45]),
            chance.choice([0, chance.randint(0, 40), chance.randint(0, 500)]),
        )
        blocks = range(0, pos + rows, block_tokens)
        segments.append(Segment(rows, pos, tuple(sorted(chance.sample(blocks, chance.randint(0, len(blocks)))))))
    case = make_case(
        segments,
        kv_heads=chance.choice([1, 2]),
        group=chance.choice([1, 2, 3, 4, 7, 8, 17]),
        head_dim=chance.choice([16, 24, 64, 72]),
        block_tokens=block_tokens,
        dtype=chance.choice([torch.float32, torch.bfloat16, torch.float16]),
        window=chance.choice([0, 0, 1, 30, 200]),
        softcap=chance.choice([0.0, 0.0, 20.0]),
        seed=seed,
    )
    check(kernels, case)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(0, 1), (1, 3), (2, 4)])
def test_a_range_of_kv_heads(kernels: AttentionKernels, rows: int, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    """A tensor-parallel rank computes on a view of the blocks; the other heads, NaN here, are not looked at."""
    case = make_case([context(150, rows), context(70)], kv_heads=4, dtype=dtype)
    first, end = heads
    case.pool[:, :, :first] = case.pool[:, :, end:] = float("nan")
    q = case.q[:, 2 * first : 2 * end].contiguous()
    check(kernels, dataclasses.replace(case, q=q, pool=case.pool[:, :, first:end]))


@pytest.mark.parametrize("rows", [1, 40])
def test_strided_queries(kernels: AttentionKernels, rows: int) -> None:
    """A slice of a fused projection: rows lie apart."""
    case = make_case([context(70, rows)])
    fused = torch.full((rows, 3 * case.q[0].numel()), float("nan"))
    fused[:, : case.q[0].numel()] = case.q.flatten(1)
    check(kernels, dataclasses.replace(case, q=fused[:, : case.q[0].numel()].unflatten(1, case.q.shape[1:])))


@pytest.mark.parametrize("rows", [1, 40])
def test_large_scores_do_not_overflow(kernels: AttentionKernels, rows: int) -> None:
    """Scores in the thousands: float32 holds their logarithms to about 2**-12, so out is compared loosely."""
    case = make_case([context(130, rows)])
    case = dataclasses.replace(case, params=dataclasses.replace(case.params, scale=300.0))
    out, lse = case.run(kernels)
    expected_out, expected_lse = oracle.attention(case.q, case.pool, case.plan, case.params)
    torch.testing.assert_close(out.double(), expected_out, atol=5e-3, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_chunk_sizes_agree(kernels: AttentionKernels, chunk: int) -> None:
    """A prompt of 150 tokens, computed in chunks: each row's result is the same as in one piece."""
    whole = make_case([context(150, 150)], group=1, kv_heads=1)
    expected = oracle.attention(whole.q, whole.pool, whole.plan, whole.params)
    starts = range(0, 150, chunk) if chunk > 1 else (0, 63, 64, 149)
    for start in starts:
        rows = min(chunk, 150 - start)
        plan = make_plan([Segment(rows, start, (0, 64, 128))], whole.plan.block_ids.tolist())
        out, lse = dataclasses.replace(whole, q=whole.q[start : start + rows], plan=plan).run(kernels)
        torch.testing.assert_close(out.double(), expected[0][start : start + rows], atol=FLOAT32_TOLERANCE, rtol=0)
        torch.testing.assert_close(lse.double(), expected[1][start : start + rows], atol=FLOAT32_TOLERANCE, rtol=1e-6)


@pytest.mark.parametrize("rows", [2, 60])
def test_splits_merge_in_any_order(kernels: AttentionKernels, rows: int) -> None:
    """The context dealt out over three pools, one of them without any of it: merged, it is the whole."""
    whole = make_case([context(350, rows)], window=250)
    ids, positions = whole.plan.block_ids.tolist(), whole.plan.block_pos.tolist()
    parts: list[tuple[Tensor, Tensor]] = []
    for chosen in ([0, 3, 4], [], [1, 2, 5]):
        segment = Segment(rows, 350 - rows, tuple(positions[i] for i in chosen))
        part = dataclasses.replace(whole, plan=make_plan([segment], [ids[i] for i in chosen]))
        parts.append(part.run(kernels))
    expected = oracle.attention(whole.q, whole.pool, whole.plan, whole.params)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        out, lse = (tensor.clone() for tensor in parts[order[0]])
        for index in order[1:]:
            kernels.merge_partials(out, lse, *parts[index])
        torch.testing.assert_close(out.double(), expected[0], atol=FLOAT32_TOLERANCE, rtol=0)
        torch.testing.assert_close(lse.double(), expected[1], atol=FLOAT32_TOLERANCE, rtol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3])
def test_a_prompts_rows_are_the_same_however_they_are_split(
    kernels: AttentionKernels, group: int, head_dim: int
) -> None:
    """Rounded or not, a weight is the same in whichever memory and chunk: only the order of additions differs."""
    if kernels.name == "triton":
        pytest.skip("its weights are rounded relative to the largest of each block")
    whole = make_case([context(430, 120)], group=group, head_dim=head_dim, dtype=torch.bfloat16)
    expected_out, expected_lse = whole.run(kernels)
    ids, positions = whole.plan.block_ids.tolist(), whole.plan.block_pos.tolist()
    for first in (0, 60):
        merged: list[Tensor] = []
        for chosen in ([0, 3, 4], [1, 2, 5, 6]):
            segment = Segment(60, 310 + first, tuple(positions[i] for i in chosen))
            plan = make_plan([segment], [ids[i] for i in chosen])
            part = dataclasses.replace(whole, q=whole.q[first : first + 60], plan=plan).run(kernels)
            if merged:
                kernels.merge_partials(*merged, *part)
            else:
                merged = list(part)
        torch.testing.assert_close(merged[0], expected_out[first : first + 60], atol=FLOAT32_TOLERANCE, rtol=0)
        torch.testing.assert_close(merged[1], expected_lse[first : first + 60], atol=FLOAT32_TOLERANCE, rtol=1e-6)
