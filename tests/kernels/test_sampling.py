"""Choosing tokens: compiled and by torch, the same."""

from __future__ import annotations

import os

import pytest
import torch

from kernels import sampling
from kernels.cpu import find_library

pytestmark = pytest.mark.skipif(find_library() is None, reason="the compiled CPU kernels were not built")
VOCABULARIES = (1, 5, 16, 511, 512, 513, 5000)


@pytest.fixture(params=["", "avx2", "baseline"], autouse=True)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "INFINITE_LLM_CPU_ISA", request.param)


def random_logits(rows: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    return (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_argmax_takes_the_first_of_equals(vocabulary: int, dtype: torch.dtype):
    logits = random_logits(20, vocabulary, dtype)
    assert sampling.argmax(logits) == sampling.torch_argmax(logits)
    logits[:, vocabulary // 2] = logits[:, -1] = 50.0
    assert sampling.argmax(logits) == [vocabulary // 2] * 20
    assert sampling.argmax(torch.full((1, vocabulary), -torch.inf, dtype=dtype)) == [0]
    assert sampling.argmax(logits[:0]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_draws_are_those_of_float64(vocabulary: int, dtype: torch.dtype):
    logits = random_logits(200, vocabulary, dtype)
    logits[:, vocabulary // 3] = -torch.inf
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    for temperature in (0.3, 1.0, 5.0):
        got = sampling.draw(logits, [temperature] * 200, uniforms)
        expected = sampling.torch_draw(logits, [temperature] * 200, uniforms)
        assert sum(a != b for a, b in zip(got, expected, strict=True)) <= 1  # rounding at the edge between two tokens


def test_the_ends_of_the_distribution():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -200.0]]).repeat(3, 1)
    last = 1 - 2**-53
    for draw in (sampling.draw, sampling.torch_draw):
        assert draw(logits, [1.0, 1.0, 1e-40], [0.0, last, 0.5]) == [0, 2, 2]


def test_a_row_is_drawn_alike_in_any_company():
    logits = random_logits(50, 3000, torch.float32)
    uniforms = [n / 50 for n in range(50)]
    together = sampling.draw(logits, [0.8] * 50, uniforms)
    assert together == [sampling.draw(logits[n : n + 1], [0.8], [uniforms[n]])[0] for n in range(50)]
