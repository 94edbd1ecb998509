"""The passes over a loaded model: what they recognise, that nothing changes, and what they leave alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from architectures import SERVED, VOCAB_SIZE, Architecture, served
from own_products import has_own_products
from torch import Tensor, nn

from kernels import AttentionPlan, LayerParams, layer_ops
from kernels.cpu import CpuKernels, find_library
from kernels.cpu.layer_ops import CpuLayerOps
from kernels.layer_ops import TorchLayerOps
from kernels.layer_stack import LeftAttention, StackedLayer
from services.core.errors import ConfigError, UnsupportedModelError
from services.instance.config import InstanceConfig
from services.instance.dist_attention import AttentionContext, DistAttention, StepTensors
from services.instance.model import Model, load_model
from services.instance.passes import PASSES, PassName, linears
from services.instance.passes.apply import apply_passes
from services.instance.passes.layers import PlainLayer, WholeLayer
from services.instance.passes.linears import FusedLinear, LinearPart, PackedEmbedding
from services.instance.passes.whole_model import WholeModel
from services.runtime.config import parse_config

native = pytest.mark.skipif(find_library() is None, reason="the compiled CPU kernels were not built")
# Of 3 layers: what each pass does. Products gone, products packed, norms, MLPs, attention modules, layers, the model.
APPLIED = {
    "llama": (9, 13, 7, 3, 3, 3, 1),
    "qwen2": (9, 13, 7, 3, 3, 3, 1),
    "qwen3": (9, 13, 13, 3, 3, 3, 1),
    "gemma2": (9, 13, 13, 3, 3, 3, 0),  # a factor of the embeddings, a cap of the logits
    "gemma3": (9, 13, 19, 3, 3, 3, 1),
    "phi3": (0, 13, 7, 3, 3, 3, 1),
    "olmo2": (9, 13, 13, 3, 0, 0, 0),  # norms over all heads together
    "granite": (9, 13, 7, 3, 3, 3, 0),
    "mixtral": (6, 7, 7, 0, 3, 3, 1),
    "cohere2": (9, 13, 0, 3, 3, 0, 0),  # attention and MLP side by side
    "starcoder2": (6, 13, 0, 0, 3, 3, 1),
    "gpt2": (0, 1, 0, 0, 0, 0, 0),
}


class Mixing(AttentionContext):
    """Attention of a kind: each row sees the rows before it, alike. What it is told is part of the answer."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        counts = torch.arange(1, len(q) + 1)[:, None, None]
        seen = ((v * k[..., :1].tanh()).cumsum(0) / counts).repeat_interleave(groups, dim=1)
        told = 1 + params.scale + params.window / 1000 + params.softcap / 10
        sunk = 0 if sinks is None else sinks.tanh()[None, :, None]
        return (seen * q[..., :1].tanh() * told + sunk).to(q.dtype)


def logits_of(model: Model) -> Tensor:
    """Of 40 rows; the last 20 are of the long rotary regime where there are two."""
    Mixing().attach_to(model.module)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, model.shape.vocab_size, (40,), generator=generator)
    rows, positions = torch.tensor([0, 7, 39]), torch.cat([torch.arange(20), torch.arange(230, 250)])
    return model.forward(tokens, positions, rows, torch.arange(40) >= 20)


def load(architecture: Architecture, directory: Path, dtype: str = "float32") -> Model:
    return load_model(architecture.write(directory / architecture.name), dtype, None)


@pytest.mark.parametrize("architecture", SERVED, ids=lambda architecture: architecture.name)
def test_nothing_changes(architecture: Architecture, tmp_path: Path):
    model = load(architecture, tmp_path)
    expected = logits_of(model)
    apply_passes(model)
    got = logits_of(model)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("count", range(len(PASSES) + 1))
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_each_pass_can_be_left_out(name: str, count: int, tmp_path: Path):
    """Up to some pass, and without that pass but with all behind it."""
    model = load(served(name), tmp_path)
    expected = logits_of(model)
    for names in (PASSES[:count], PASSES[:count] + PASSES[count + 1 :]):
        rewritten = copy.deepcopy(model)
        assert tuple(apply_passes(rewritten, names)) == names
        assert (logits_of(rewritten) - expected).abs().max() <= 1e-4 * expected.abs().max()


@native
@pytest.mark.parametrize("name", APPLIED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_recognised(name: str, dtype: str, tmp_path: Path):
    model = load(served(name), tmp_path, dtype)
    assert tuple(apply_passes(model, PASSES[:-1]).values()) == APPLIED[name]


def test_without_compiled_operations_the_passes_apply_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layer_ops, "load", lambda *_: TorchLayerOps())
    model = load(served("llama"), tmp_path)
    expected = logits_of(model)
    assert tuple(apply_passes(model).values()) == (*APPLIED["llama"], 0)
    assert all(isinstance(layer, PlainLayer) for layer in model.module.model.layers)
    assert (logits_of(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_without_packed_products_the_other_passes_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As with an older torch, or on another device."""
    monkeypatch.setattr(layer_ops, "load", lambda *_: TorchLayerOps())
    monkeypatch.setattr(TorchLayerOps, "linear", lambda *_: None)
    model = load(served("llama"), tmp_path)
    expected = logits_of(model)
    assert tuple(apply_passes(model).values()) == (9, 0, 7, 3, 3, 3, 1, 0)
    assert (logits_of(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.skipif(not has_own_products(), reason="no compiled products for this processor")
def test_a_layer_is_two_calls_where_all_its_parts_are_operations(tmp_path: Path):
    for name in ("llama", "qwen3", "gemma3", "phi3", "granite"):
        model = load(served(name), tmp_path)
        apply_passes(model)
        assert all(isinstance(layer, WholeLayer) for layer in model.module.model.layers)
        assert isinstance(model.compute, WholeModel) == (name != "granite")


@pytest.mark.skipif(not has_own_products(), reason="no compiled products for this processor")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_a_stack_of_layers_computes_what_they_do_one_by_one(name: str, tmp_path: Path):
    model = load(served(name), tmp_path)
    assert apply_passes(model)["fuse_stack"] == len(model.attention_modules) - 1
    answers = [paged_logits(model, remote) for remote in (None, SilentDaemons(), SilentDaemons(every=2))]
    assert [called for _, called in answers] == [1, 1, 1]  # the last layer alone
    model.compute.stack = None
    expected, one_by_one = paged_logits(model, None)
    assert one_by_one == len(model.attention_modules)
    assert all(torch.equal(logits, expected) for logits, _ in answers)


@pytest.mark.skipif(not has_own_products(), reason="no compiled products for this processor")
def test_layers_of_different_shapes_are_no_stack(tmp_path: Path):
    ops, stacked = CpuLayerOps(), []
    for at, heads in enumerate((4, 2)):
        model = load(
            Architecture("one", "LlamaConfig", {"num_attention_heads": heads, "head_dim": 16}), tmp_path / str(at)
        )
        apply_passes(model)
        layer = model.module.model.layers[0]
        assert isinstance(layer, WholeLayer)
        stacked.append(StackedLayer(layer.op, layer.attention.params))
        kv_heads = layer.attention.heads_of[1]
        assert ops.stack(stacked[-1:], heads, kv_heads) is not None
        assert ops.stack(stacked[-1:], heads, kv_heads + 1) is None
    assert ops.stack(stacked, heads, kv_heads) is None


class SilentDaemons:
    """In the place of ``RemoteAttention``: daemons that are to be asked in every so many layers, and hold nothing."""

    def __init__(self, every: int = 1) -> None:
        self.every = every

    def asks(self, params: LayerParams) -> bool:
        return params.layer % self.every == 0

    def may_be_left_out(self, params: LayerParams, nobody_asks: bool) -> bool:
        return nobody_asks or not self.asks(params)

    def askers(self, q: Tensor) -> None:
        return None

    def submit(self, params: LayerParams, q: Tensor, left: LeftAttention) -> bool:
        return False


class CountingKernels(CpuKernels):
    """Attributes: rows: of each layer whose attention was asked for by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def micro_attention(self, q: Tensor, *others: object) -> None:
        self.rows.append(len(q))
        super().micro_attention(q, *others)  # type: ignore[arg-type]


@pytest.mark.skipif(not has_own_products(), reason="no compiled products for this processor")
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])  # the second has windows
@pytest.mark.parametrize("wanted", [(0, 1), (1,), ()])
def test_the_last_layer_attends_for_sampled_rows_alone(name: str, wanted: tuple[int, ...], tmp_path: Path):
    model = load(served(name), tmp_path)
    apply_passes(model)
    expected, _ = paged_logits(model, None, (0, 1))
    kernels = CountingKernels()
    got, _ = paged_logits(model, None, wanted, sampled=True, kernels=kernels)
    assert got.shape == (len(wanted), VOCAB_SIZE)
    assert torch.allclose(got, expected[list(wanted)], rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert kernels.rows[-1:] == ([len(wanted)] if wanted else kernels.rows[-1:])
    assert kernels.rows.count(43) == len(kernels.rows) - (len(wanted) > 0)
    # Other daemons that hold what is seen get all rows, as in every layer, if anybody asks.
    kernels = CountingKernels()
    got, _ = paged_logits(model, SilentDaemons(), wanted, sampled=True, kernels=kernels)
    assert torch.allclose(got, expected[list(wanted)], rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert set(kernels.rows) == {43}
    assert len(kernels.rows) == len(model.attention_modules) - (not wanted)


def paged_logits(
    model: Model,
    remote: SilentDaemons | None,
    wanted: Sequence[int] = (0, 1),
    sampled: bool = False,
    kernels: CpuKernels | None = None,
) -> tuple[Tensor, int]:
    """Logits of two sequences over a pool of blocks, and how many layers were called for them one by one.

    Args:
        wanted: sequences whose last row is.
        sampled: the step's plan says so.
    """
    lengths, block_tokens = (40, 3), 16
    attention = model.shape.attention
    blocks = [-(-length // block_tokens) for length in lengths]
    pool = torch.zeros(sum(blocks), attention.layers, attention.kv_heads, 2, block_tokens, attention.head_dim)
    context = DistAttention(kernels or CpuKernels(), pool, remote)
    context.attach_to(model.module)
    starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    plan = AttentionPlan(
        query_start=starts,
        query_pos=torch.zeros(2, dtype=torch.int32),
        block_start=torch.tensor([0, blocks[0], sum(blocks)], dtype=torch.int32),
        block_ids=torch.arange(sum(blocks), dtype=torch.int32),
        block_pos=torch.cat([torch.arange(count) * block_tokens for count in blocks]).int(),
        max_query_len=max(lengths),
    )
    positions = torch.cat([torch.arange(length) for length in lengths])
    slots = torch.cat([torch.arange(lengths[0]), blocks[0] * block_tokens + torch.arange(lengths[1])])
    tokens = torch.randint(0, model.shape.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    calls = []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.module.model.layers]
    last = AttentionPlan(
        query_start=torch.arange(len(wanted) + 1, dtype=torch.int32),
        query_pos=torch.tensor([lengths[at] - 1 for at in wanted], dtype=torch.int32),
        block_start=torch.tensor([0, *itertools.accumulate(blocks[at] for at in wanted)], dtype=torch.int32),
        block_ids=torch.cat([torch.empty(0), *(plan.block_ids.split(blocks)[at] for at in wanted)]).int(),
        block_pos=torch.cat([torch.empty(0), *(plan.block_pos.split(blocks)[at] for at in wanted)]).int(),
        max_query_len=min(len(wanted), 1),
    )
    context.begin_step(StepTensors(slots, plan, last if sampled else None))
    rows = torch.tensor([(39, 42)[at] for at in wanted], dtype=torch.int64)
    logits = model.forward(tokens, positions, rows, None)
    assert context.calls == len(model.attention_modules)
    assert 0 < context.times.local_attention_s <= context.times.attention_s
    for hook in hooks:
        hook.remove()
    return logits, len(calls)


@pytest.mark.parametrize("name", ["llama", "mixtral", "starcoder2"])
@pytest.mark.parametrize("rows", [[], [6], [0, 3, 4]])
def test_rows_that_nobody_wants_change_nothing(name: str, rows: list[int], tmp_path: Path):
    model = load(served(name), tmp_path)
    apply_passes(model)
    assert isinstance(model.compute, WholeModel)
    ids, positions = torch.randint(0, VOCAB_SIZE, (7,), generator=torch.Generator().manual_seed(3)), torch.arange(7)
    some, every = (model.forward(ids, positions, torch.tensor(r, dtype=torch.int64)) for r in (rows, range(7)))
    assert some.shape == (len(rows), VOCAB_SIZE)
    assert torch.allclose(some, every[rows], rtol=0, atol=1e-4 * float(every.abs().max()))


@pytest.mark.skipif(not has_own_products(), reason="no compiled products for this processor")
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_reads_the_packed_weights(tied: bool, tmp_path: Path):
    settings = {**served("llama").settings, "tie_word_embeddings": tied}
    model = load(Architecture("tied", "LlamaConfig", settings), tmp_path)
    expected = logits_of(model)
    plain = model.module.model.embed_tokens.weight
    apply_passes(model)
    embedding = model.module.model.embed_tokens
    assert isinstance(embedding, PackedEmbedding) == tied
    ids = torch.tensor([[0, 255, 17, 64, 63]])
    assert torch.equal(embedding(ids), plain[ids])
    assert (logits_of(model) - expected).abs().max() <= 1e-4 * expected.abs().max()
    held = [parameter for parameter in model.module.parameters() if parameter.shape == plain.shape]
    assert len(held) == (0 if tied else 1)


class LowRank(nn.Linear):
    """An adapter, as a subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., : self.out_features].mean(-1, keepdim=True)


def test_odd_modules_are_left_alone(tmp_path: Path):
    """An adapter, a layer that somebody listens to, a norm with an addition, and queries that are clipped."""
    model = load(served("llama"), tmp_path)
    layers = model.module.model.layers
    adapter = LowRank(48, 64)
    adapter.load_state_dict(layers[0].mlp.gate_proj.state_dict(), strict=False)
    layers[0].mlp.gate_proj = adapter
    heard: list[int] = []
    layers[1].self_attn.k_proj.register_forward_hook(lambda *_: heard.append(1))
    norm = layers[2].input_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) + 0.01 * x
    attention = layers[2].self_attn
    project = attention.q_proj.forward
    attention.q_proj.forward = lambda x: project(x) * 1.5
    expected = logits_of(model)
    heard.clear()
    apply_passes(model)
    assert (logits_of(model) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert layers[0].mlp.gate_proj is adapter
    assert heard
    assert layers[2].input_layernorm is norm


class Clipping(nn.Module):
    """Takes an attention module's place and clips what comes out of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, object]:
        output, weights = self.inner(*args, **kwargs)
        return output.clamp(-20, 20), weights


def test_what_shows_only_at_large_values_is_not_missed(tmp_path: Path):
    model = load(served("llama"), tmp_path)
    layer = model.module.model.layers[0]
    layer.self_attn = Clipping(layer.self_attn)
    assert apply_passes(model)["fuse_layers"] == 2
    assert isinstance(model.module.model.layers[0].self_attn, Clipping)


def test_a_model_that_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The last check sees what no other pass's own check has seen."""
    model = load(served("llama"), tmp_path)

    def spoil(*_: object) -> int:
        model.module.model.norm.weight.data.mul_(1.5)
        return 1

    monkeypatch.setattr("services.instance.passes.apply.fuse_mlps", spoil)
    with pytest.raises(UnsupportedModelError, match="the logits"):
        apply_passes(model)


def parts(count: int) -> tuple[list[nn.Linear], FusedLinear, list[LinearPart]]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 3 + n, bias=n != 1).requires_grad_(False) for n in range(count)]
    fused = FusedLinear(linears.stacked(layers), [layer.out_features for layer in layers])
    return layers, fused, [LinearPart(fused, n) for n in range(count)]


def test_parts_of_a_fused_layer_answer_as_the_layers_did():
    layers, _, replaced = parts(3)
    first, second = torch.randn(2, 4, 6)
    for inputs in ([first] * 3, [first, second, first], [second, second, first], [first] * 3):
        for layer, part, x in zip(layers, replaced, inputs, strict=True):
            assert torch.allclose(part(x), layer(x), atol=1e-6)


def test_a_fused_layer_keeps_nothing_once_every_part_was_asked():
    _, fused, replaced = parts(2)
    computed: list[int] = []
    fused.linear.register_forward_hook(lambda *_: computed.append(1))
    x = torch.randn(4, 6)
    for part in replaced:
        part(x)
    assert len(computed) == 1
    assert fused.holds_nothing
    x.mul_(2)  # the same tensor in the next step
    for part in replaced:
        part(x)
    assert len(computed) == 2


def test_passes_are_chosen_by_name():
    keys = {"cluster": "c", "member_id": "m", "etcd": ["e"], "model": "m", "local_kvdaemon_id": "k", "socket_dir": "s"}
    assert parse_config(InstanceConfig, keys).passes == PASSES
    assert parse_config(InstanceConfig, {**keys, "passes": []}).passes == ()
    some: Sequence[PassName] = ("pack_linears",)
    assert parse_config(InstanceConfig, {**keys, "passes": list(some)}).passes == some
    with pytest.raises(ConfigError, match="passes"):
        parse_config(InstanceConfig, {**keys, "passes": ["fuse_everything"]})
