"""Merging partial states, attention sinks, and writing keys and values."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

from kernels import AttentionKernels, empty_partial

TOLERANCE = 2e-6  # a few units of 2**-24 for values of magnitude about 4


def random_partial(rows: int, heads: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """out [rows, heads, dim] and lse [rows, heads]; the second row's state is empty."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(rows, heads, dim, generator=generator)
    lse = 10 * torch.randn(rows, heads, generator=generator)
    out[1:2], lse[1:2] = 0.0, -math.inf
    return out, lse


@pytest.mark.parametrize("dim", [32, 80, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge(kernels: AttentionKernels, dim: int, dtype: torch.dtype) -> None:
    out, lse = random_partial(5, 3, dim, 1)
    part_out, part_lse = random_partial(5, 3, dim, 2)
    part_out = part_out.to(dtype)
    part_lse[2] = -math.inf
    part_out[2] = 0.0
    expected_out, expected_lse = oracle.merge([(out, lse), (part_out, part_lse)])
    kernels.merge_partials(out, lse, part_out, part_lse)
    torch.testing.assert_close(out.double(), expected_out, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE, rtol=1e-6)


def test_merge_into_chosen_rows(kernels: AttentionKernels) -> None:
    out, lse = random_partial(6, 2, 32, 1)
    part_out, part_lse = random_partial(3, 2, 32, 2)
    rows = torch.tensor([5, 1, 3])
    before_out, before_lse = out.clone(), lse.clone()
    expected_out, expected_lse = oracle.merge([(out[rows], lse[rows]), (part_out, part_lse)])
    kernels.merge_partials(out, lse, part_out, part_lse, rows)
    torch.testing.assert_close(out[rows].double(), expected_out, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(lse[rows].double(), expected_lse, atol=TOLERANCE, rtol=1e-6)
    for untouched in (0, 2, 4):
        assert torch.equal(out[untouched], before_out[untouched])
        assert torch.equal(lse[untouched], before_lse[untouched])


def test_the_empty_partial_is_neutral(kernels: AttentionKernels) -> None:
    part = random_partial(4, 2, 48, 3)
    out, lse = empty_partial(4, 2, 48)
    kernels.merge_partials(out, lse, *empty_partial(4, 2, 48))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.isneginf(lse).all()
    kernels.merge_partials(out, lse, *part)
    kernels.merge_partials(out, lse, *empty_partial(4, 2, 48))
    torch.testing.assert_close(out, part[0], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(lse, part[1], atol=1e-6, rtol=1e-6)


def test_merging_no_rows(kernels: AttentionKernels) -> None:
    out, lse = random_partial(2, 2, 32, 1)
    before = out.clone()
    kernels.merge_partials(out, lse, *empty_partial(0, 2, 32), torch.empty(0, dtype=torch.int64))
    assert torch.equal(out, before)


def test_sinks(kernels: AttentionKernels) -> None:
    """A sink takes its share of the weight and gives nothing; a row that saw no key keeps out 0."""
    out, lse = random_partial(4, 3, 32, 4)
    sinks = torch.tensor([0.5, -3.0, 8.0], dtype=torch.bfloat16)
    zeros = torch.zeros_like(out)
    expected_out, expected_lse = oracle.merge([(out, lse), (zeros, sinks.float().expand(4, -1))])
    kernels.merge_sinks(out, lse, sinks)
    torch.testing.assert_close(out.double(), expected_out, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE, rtol=1e-6)


@pytest.mark.parametrize("head_dim", [32, 80, 20])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_kv(kernels: AttentionKernels, head_dim: int, source: torch.dtype, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    pool = torch.zeros(4, 2, 3, 2, 16, head_dim, dtype=dtype)
    fused = torch.randn(3, 6, head_dim, generator=generator).to(source)
    fused[0, 0, :4] = torch.tensor([0.0, -0.0, 3e-6, 60000.0])  # a subnormal and a large half
    k, v = fused[:, :3], fused[:, 3:]
    slots = torch.tensor([3 * 16 + 15, 0, 1 * 16 + 4])
    expected = pool.clone()
    for row, (block, offset) in enumerate([(3, 15), (0, 0), (1, 4)]):
        expected[block, 1, :, 0, offset] = k[row].to(dtype)
        expected[block, 1, :, 1, offset] = v[row].to(dtype)
    kernels.store_kv(k, v, pool, slots, layer=1)
    # Triton's interpreter cuts off where it should round to bfloat16.
    cuts_off = kernels.name == "triton" and dtype == torch.bfloat16 != source
    torch.testing.assert_close(pool, expected, atol=0, rtol=2.0**-7 if cuts_off else 0)
    before = pool.clone()
    kernels.store_kv(k[:0], v[:0], pool, slots[:0], layer=0)
    assert torch.equal(pool, before)


def test_store_kv_of_a_range_of_heads(kernels: AttentionKernels) -> None:
    """A tensor-parallel rank writes its own heads and nobody else's."""
    generator = torch.Generator().manual_seed(7)
    pool = torch.zeros(3, 2, 4, 2, 16, 32)
    k, v = (torch.randn(5, 2, 32, generator=generator) for _ in range(2))
    expected = pool.clone()
    expected[2, 1, 1:3, 0, 3:8], expected[2, 1, 1:3, 1, 3:8] = k.transpose(0, 1), v.transpose(0, 1)
    kernels.store_kv(k, v, pool[:, :, 1:3], torch.arange(5) + 2 * 16 + 3, layer=1)
    assert torch.equal(pool, expected)
