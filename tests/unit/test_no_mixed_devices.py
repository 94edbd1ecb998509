"""A model's whole way on a device that is not the CPU: torch's fake tensors compute nothing, and refuse a mixture.

The device is "meta": a torch without CUDA knows too little of "cuda" to slice such a tensor.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from architectures import served
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import AttentionKernels, AttentionPlan, LayerParams
from kernels.layer_ops import TorchLayerOps
from kernels.layer_stack import NOT_BEGUN, LeftAttention
from services.dataplane.host_device import record_by_repeating
from services.dataplane.interpreted_device import InterpretedDevice
from services.dataplane.remote_attention import RemoteAttention
from services.instance.batch import Batch, upload_batch
from services.instance.dist_attention import DistAttention, StepTensors
from services.instance.model import Model, load_model
from services.instance.passes import apply
from services.instance.passes.apply import apply_passes
from services.instance.passes.whole_model import WholeModel
from services.instance.recorded_model import RecordedModel, record_steps

GPU = torch.device("meta")


class _FakeGpu(InterpretedDevice):
    """Crosses by a copy to a GPU that is not there."""

    tensors = GPU

    def _cross(self, staged: Tensor) -> Tensor:
        return staged.to(GPU)

    def record(self, work):
        return record_by_repeating(work)


class _FakeKernels(AttentionKernels):
    """Looks at where everything is."""

    name = "fake"

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        plans = (plan.query_start, plan.query_pos, plan.block_start, plan.block_ids, plan.block_pos)
        assert {tensor.device for tensor in (q, pool, out, lse, *plans)} == {GPU}

    def merge_partials(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None = None
    ) -> None:
        assert {tensor.device for tensor in (out, lse, part_out, part_lse)} == {GPU}

    def store_kv(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
        assert {tensor.device for tensor in (k, v, pool, slots)} == {GPU}


class _OtherDaemons(RemoteAttention):
    """Merges something into every layer."""

    def __init__(self, kernels: AttentionKernels) -> None:
        self._own = kernels

    def submit(self, params: LayerParams, q: Tensor, left: LeftAttention = NOT_BEGUN) -> bool:
        assert q.device == GPU
        return True

    def collect(self, out: Tensor, lse: Tensor) -> None:
        self._own.merge_partials(out, lse, torch.empty_like(out), torch.empty_like(lse))


def to_gpu(part: object, seen: set[int]) -> object:
    """The same with its tensors on the GPU; modules and operations are changed in place."""
    if isinstance(part, Tensor):
        moved = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=GPU)
        return nn.Parameter(moved, requires_grad=False) if isinstance(part, nn.Parameter) else moved
    if isinstance(part, tuple | list):
        return type(part)(to_gpu(item, seen) for item in part)
    if isinstance(part, dict):
        for key, value in part.items():
            part[key] = to_gpu(value, seen)
    elif id(part) not in seen and not isinstance(part, type):
        seen.add(id(part))
        if dataclasses.is_dataclass(part):
            for field in dataclasses.fields(part):
                object.__setattr__(part, field.name, to_gpu(getattr(part, field.name), seen))
        elif hasattr(part, "__dict__"):
            to_gpu(vars(part), seen)
    return part


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "granite", "mistral", "starcoder2"])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_step_on_a_gpu(name: str, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as torch goes: embedding to logits, what the attention function gets, and what a step brings."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(TorchLayerOps, "linear", lambda *_: None)  # as on a GPU: weights stay plain
    monkeypatch.setattr(apply.layer_ops, "load", lambda *_: TorchLayerOps())
    model = load_model(served(name).write(tmp_path / name), "float32", None)
    apply_passes(model)
    device, kernels = _FakeGpu(), _FakeKernels()
    with FakeTensorMode():
        _move(model)
        pool = torch.empty(8, *model.shape.geometry(16, "float32").block_shape, device=GPU)
        attention = DistAttention(kernels, pool, _OtherDaemons(kernels), device)
        attention.attach_to(model.module)
        if recorded:
            if not isinstance(model.compute, WholeModel):
                pytest.skip("its way through the model is transformers' own")
            assert record_steps(model, device, 4) > 0
            assert isinstance(model.compute, RecordedModel)
        for rows, wanted in ((4, 4), (3, 3), (6, 1), (6, 0)):
            batch = upload_batch(_batch(rows, wanted), device)
            attention.begin_step(batch.step)
            logits = model.forward(batch.token_ids, batch.positions, batch.logit_rows, batch.long_rows)
            assert logits.device == GPU
            assert logits.shape == (wanted, model.shape.vocab_size)


def _move(model: Model) -> None:
    seen = {id(model.shape), id(model.module.config)}
    to_gpu(model.module, seen)
    if isinstance(model.compute, WholeModel):
        to_gpu(model.compute, seen)
    model.device = GPU


def _batch(rows: int, wanted: int) -> Batch:
    ints = [torch.zeros(n, dtype=torch.int32) for n in (2, 1, 2, 3, 3)]
    plan = AttentionPlan(*ints, max_query_len=rows)
    numbers = torch.zeros(rows, dtype=torch.int64)
    return Batch(numbers, numbers, StepTensors(numbers, plan), (), torch.zeros(wanted, dtype=torch.int64), None)


def test_what_mixes_devices_is_refused() -> None:
    with FakeTensorMode():
        on_gpu, on_host = torch.empty(3, device=GPU), torch.empty(3)
        with pytest.raises(Exception, match="two devices, meta and cpu"):
            on_gpu + on_host
