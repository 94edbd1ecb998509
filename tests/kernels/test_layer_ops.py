"""The operations of a decoder layer, against the same mathematics in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels.cpu import find_library
from kernels.cpu.layer_ops import CpuLayerOps
from kernels.layer_ops import (
    Activation,
    HeadNorms,
    LayerOps,
    LayerParts,
    LinearOp,
    Rotation,
    RowReadingLinearOp,
    TorchLayerOps,
    load,
)

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3}  # of the largest value; bfloat16 rounds at 2**-8
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("torch", "cpu", "cpu-avx512-bf16", "cpu-avx512", "cpu-avx2", "cpu-baseline", "cpu-threads")


@pytest.fixture(scope="module", params=NAMES)
def ops(request: pytest.FixtureRequest) -> LayerOps:
    name: str = request.param
    if name == "torch":
        return TorchLayerOps()
    if find_library() is None:
        pytest.skip("the compiled CPU kernels were not built")
    if name == "cpu-threads":
        return CpuLayerOps(num_threads=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFINITE_LLM_CPU_ISA", name.partition("-")[2])
        return CpuLayerOps()


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear_of(ops: LayerOps, weight: Tensor, bias: Tensor | None) -> LinearOp:
    linear = ops.linear(weight, bias)
    if linear is None:
        own = isinstance(ops, CpuLayerOps) and ops.panel_columns(weight.dtype) > 0
        assert not own
        assert weight.dtype is torch.bfloat16
        assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        pytest.skip("torch has no packed products of bfloat16 for this processor")
    return linear


def check(got: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """``expected``: float64; ``roundings``: of what is passed on between operations."""
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= roundings * TOLERANCE[got.dtype] * expected.abs().max()


def exact_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (1, 48), (3, 67), (2, 768), (300, 256), (0, 16)])
def test_norm(ops: LayerOps, rows: int, dim: int, dtype: torch.dtype):
    x, weight = random(1, rows, dim, dtype=dtype), random(dim, dtype=dtype, seed=1)
    for eps, offset in ((1e-6, 0.0), (0.3, 1.0)):
        norm = ops.norm(weight, eps, offset)
        before = x.clone()
        if rows:
            check(norm(x), exact_norm(x, weight, eps, offset))
        assert norm(x).shape == x.shape
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum_leaves_the_sum(ops: LayerOps, dtype: torch.dtype):
    x, delta = random(1, 5, 100, dtype=dtype), random(1, 5, 100, dtype=dtype, seed=1)
    weight = random(100, dtype=dtype, seed=2)
    total = x + delta
    answer = ops.norm(weight, 1e-5, 0.0).add(delta, x)
    assert torch.equal(delta, total)
    check(answer, exact_norm(total, weight, 1e-5, 0.0))


def rotated(heads: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> Tensor:
    """[rows, heads, head_dim] float64, one pair of elements at a time."""
    answer, n = heads.clone(), cos.shape[1]
    for i in range(n // 2):
        first, second = (i, i + n // 2) if rotation is Rotation.HALVES else (2 * i, 2 * i + 1)
        at = (2 * i, 2 * i) if rotation is Rotation.PAIRS else (i, i)
        at = (i, i + n // 2) if rotation is Rotation.HALVES else at
        a, b = heads[..., first], heads[..., second]
        answer[..., first] = a * cos[:, None, at[0]] - b * sin[:, None, at[0]]
        answer[..., second] = b * cos[:, None, at[1]] + a * sin[:, None, at[1]]
    return answer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", Rotation)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 32), (64, 20), (18, 6), (40, 40)])
def test_heads(ops: LayerOps, head_dim: int, rotary_dim: int, rotation: Rotation, dtype: torch.dtype):
    rows, count = 3, 5
    x = random(rows, count * head_dim + 7, dtype=dtype)
    cos, sin = (random(1, rows, rotary_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = random(count, head_dim, dtype=dtype, seed=3)
    for norms, turns in itertools.product((None, HeadNorms(weight, 0.2, 1.0)), (False, True)):
        got = x.clone()
        angles = (cos, sin) if turns else (None, None)
        ops.heads(count, head_dim, rotation, norms)(got, *angles)
        heads = x[:, : count * head_dim].unflatten(1, (count, head_dim)).double()
        if norms is not None:
            heads = exact_norm(heads, weight, 0.2, 1.0).to(dtype).double()  # rounded before it turns
        if turns:
            heads = rotated(heads, cos[0].double(), sin[0].double(), rotation)
        check(got[:, : count * head_dim], heads.flatten(1))
        assert torch.equal(got[:, count * head_dim :], x[:, count * head_dim :])


def activated(x: Tensor, activation: Activation) -> Tensor:
    if activation is Activation.SILU:
        return x * torch.sigmoid(x)
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", Activation)
def test_gate(ops: LayerOps, activation: Activation, dtype: torch.dtype):
    both = random(1, 4, 2 * 83, dtype=dtype) * 8
    both[0, 0, 0], both[0, 0, 1], both[0, 0, 2] = 90.0, -90.0, 0.0
    gate, up = both.chunk(2, dim=-1)
    check(ops.gate(activation)(gate, up), activated(gate.double(), activation) * up.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 8, 13, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (48, 64), (96, 100), (130, 257)])
def test_linear(ops: LayerOps, inputs: int, outputs: int, rows: int, dtype: torch.dtype):
    weight, bias = random(outputs, inputs, dtype=dtype), random(outputs, dtype=dtype, seed=1)
    x = random(1, rows, inputs, dtype=dtype, seed=2)
    for used in (None, bias):
        linear = linear_of(ops, weight, used)
        exact = x.double() @ weight.double().T + (0 if used is None else used.double())
        check(linear(x), exact)
        assert linear(x[:, :0]).shape == (1, 0, outputs)
        if isinstance(linear, RowReadingLinearOp):
            indices = torch.tensor([[outputs - 1, 0]])
            assert torch.equal(linear.weight_rows(indices), weight[indices])
            for outside in (-1, outputs):
                with pytest.raises((ValueError, IndexError)):
                    linear.weight_rows(torch.tensor([0, outside]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_many_long_rows(ops: LayerOps, dtype: torch.dtype):
    """More rows than are computed at a time beside a panel, of words that no tile divides, and several groups of
    panels."""
    inputs, outputs, rows = 4130, 1100, 300
    weight, bias = random(outputs, inputs, dtype=dtype), random(outputs, dtype=dtype, seed=1)
    x = random(rows, inputs, dtype=dtype, seed=2)
    linear = linear_of(ops, weight, bias)
    result = linear(x)
    check(result, x.double() @ weight.double().T + bias.double())
    if isinstance(linear, RowReadingLinearOp):  # not torch's
        assert torch.equal(linear(x[:3]), result[:3]), "depends on the number of rows"


@pytest.mark.parametrize("rows", [1, 40])
def test_a_product_of_very_long_rows(ops: LayerOps, rows: int):
    """Of which not even those of one block stay in the second-level cache."""
    inputs, outputs, dtype = 20_000, 40, torch.bfloat16
    weight, x = random(outputs, inputs, dtype=dtype), random(rows, inputs, dtype=dtype, seed=1)
    linear = linear_of(ops, weight, None)
    check(linear(x), x.double() @ weight.double().T)


NORMS = list(itertools.product((False, True), repeat=4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
def test_whole_layer(ops: LayerOps, rows: int, dtype: torch.dtype):
    """Every combination of norms, with and without biases, head norms and a multiplier."""
    for number in range(len(NORMS)):
        check_layer(ops, rows, 48, 128, number, dtype)


def test_a_layer_of_many_long_rows(ops: LayerOps):
    check_layer(ops, 300, 2080, 1088, len(NORMS) - 1, torch.bfloat16)


def check_layer(ops: LayerOps, rows: int, hidden: int, inner: int, number: int, dtype: torch.dtype) -> None:
    """``number``: of the combination."""
    heads, kv_heads, head_dim = 4, 2, 32
    present, biased, multiplier = NORMS[number], number % 2 == 0, (1.0, 0.3)[number % 3 == 0]
    shapes = [
        ((heads + 2 * kv_heads) * head_dim, hidden),
        (hidden, heads * head_dim),
        (2 * inner, hidden),
        (hidden, inner),
    ]
    weights = [random(*shape, dtype=dtype, seed=n) * (0.2 * (48 / hidden) ** 0.5) for n, shape in enumerate(shapes)]
    biases = [random(shape[0], dtype=dtype, seed=10 + n) for n, shape in enumerate(shapes)]
    norm_weights = [random(hidden, dtype=dtype, seed=20 + n) for n in range(4)]
    head_weights = random(heads + kv_heads, head_dim, dtype=dtype, seed=30)
    x = random(1, rows, hidden, dtype=dtype, seed=40)
    attended = random(rows, heads, head_dim, dtype=dtype, seed=41)
    cos, sin = (random(1, rows, head_dim, dtype=dtype, seed=seed) for seed in (42, 43))
    activation = list(Activation)[number % 2]
    head_norms = HeadNorms(head_weights, 1e-5, 0.0) if number % 2 else None
    products = zip(weights, biases, strict=True)
    qkv, output, gate_up, down = (linear_of(ops, weight, bias if biased else None) for weight, bias in products)
    norms = [ops.norm(w, 1e-5, 1.0) if has else None for w, has in zip(norm_weights, present, strict=True)]
    turn = ops.heads(heads + kv_heads, head_dim, Rotation.HALVES, head_norms)
    layer = ops.layer(
        LayerParts(norms[0], qkv, turn, output, norms[1], norms[2], gate_up, activation, down, norms[3], multiplier)
    )
    if layer is None:
        pytest.skip(f"{ops.name}: no whole layers with this instruction set")

    def norm(at: int, value: Tensor) -> Tensor:
        return exact_norm(value, norm_weights[at], 1e-5, 1.0) if present[at] else value

    def product(at: int, value: Tensor) -> Tensor:
        return value @ weights[at].double().T + (biases[at].double() if biased else 0)

    expected = product(0, norm(0, x.double()))[0].to(dtype)
    turn(expected, cos, sin)
    check(layer.begin(x, cos, sin), expected.double())
    y = x.double() + multiplier * norm(1, product(1, attended.double().flatten(1)[None]))
    gate, up = product(2, norm(2, y)).chunk(2, dim=-1)
    y = y + multiplier * norm(3, product(3, activated(gate, activation) * up))
    check(layer.finish(x, attended), y, roundings=4)


def test_wrong_tensors_are_refused():
    ops = load("cpu", torch.float32)
    norm = ops.norm(torch.ones(8), 1e-5, 0.0)
    with pytest.raises(ValueError, match="dim"):
        norm(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="dtype"):
        norm(torch.zeros(2, 8, dtype=torch.bfloat16))
    heads = ops.heads(2, 8, Rotation.HALVES, None)
    with pytest.raises(ValueError, match="rows"):
        heads(torch.zeros(3, 15), None, None)
    with pytest.raises(ValueError, match="angle"):
        heads(torch.zeros(3, 16), torch.zeros(2, 8), torch.zeros(2, 8))
    with pytest.raises(ValueError, match="width"):
        heads(torch.zeros(3, 16), torch.zeros(3, 10), torch.zeros(3, 10))
    linear = ops.linear(torch.zeros(4, 6), None)
    assert linear is not None
    with pytest.raises((ValueError, RuntimeError)):
        linear(torch.zeros(2, 5))
