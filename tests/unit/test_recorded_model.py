"""Steps that are recorded: which, how they are padded, and that they answer what the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import served
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import LayerParams
from services.dataplane.host_device import HostDevice
from services.dataplane.interpreted_device import InterpretedDevice
from services.instance.dist_attention import AttentionContext
from services.instance.model import Model, load_model
from services.instance.passes.apply import apply_passes
from services.instance.passes.whole_model import WholeModel
from services.instance.recorded_model import RecordedModel, padded_size, record_steps, recorded_sizes


class Mixing(AttentionContext):
    """Attention of a kind: each row sees the rows before it, alike, and only rows of the step."""

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, params: LayerParams, sinks: Tensor | None) -> Tensor:
        self.rows.add(len(q))
        seen = (v * k[..., :1].tanh()).cumsum(0).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return (seen * q[..., :1].tanh() * (1 + params.layer)).to(q.dtype)


@given(st.integers(1, 500), st.integers(0, 600))
def test_sizes(most_rows: int, rows: int) -> None:
    sizes = recorded_sizes(most_rows)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] >= min(most_rows, 128)
    size = padded_size(rows, sizes)
    if 0 < rows <= sizes[-1]:
        assert size is not None
        assert rows <= size <= max(2 * rows, 1)
    else:
        assert size is None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> InterpretedDevice:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return InterpretedDevice()


def load(name: str, directory: Path) -> Model:
    model = load_model(served(name).write(directory / name), "float32", None)
    apply_passes(model)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "smollm3", "starcoder2", "mixtral"])
def test_recorded_steps_answer_what_the_model_does(name: str, tmp_path: Path, device: InterpretedDevice) -> None:
    """Steps of all sizes, larger and smaller ones by turns: what an earlier one left in the padding must not show."""
    model = load(name, tmp_path)
    whole = model.compute
    assert isinstance(whole, WholeModel)
    attention = Mixing()
    attention.attach_to(model.module)
    assert record_steps(model, device, 8) == 4
    recorded = model.compute
    assert isinstance(recorded, RecordedModel)
    generator = torch.Generator().manual_seed(1)
    for rows in (8, 1, 5, 2, 7, 3, 8, 4, 6, 9):
        tokens = torch.randint(0, model.shape.vocab_size, (rows,), generator=generator)
        positions = torch.randint(0, model.shape.max_model_len, (rows,), generator=generator)
        for wanted in (torch.arange(rows), torch.arange(0, rows, 2), torch.arange(0)):
            attention.rows.clear()
            model.compute = recorded
            got = model.forward(tokens, positions, wanted).clone()
            assert attention.rows == {rows}, "attention is called for the step's own rows"
            model.compute = whole
            torch.testing.assert_close(got, model.forward(tokens, positions, wanted), rtol=1e-4, atol=1e-4)


def test_what_is_not_recorded(tmp_path: Path, device: InterpretedDevice) -> None:
    on_host, by_transformers, two_regimes = load("llama", tmp_path), load("gpt2", tmp_path), load("phi3", tmp_path)
    assert record_steps(on_host, HostDevice(), 8) == 0
    assert isinstance(on_host.compute, WholeModel)
    assert record_steps(by_transformers, device, 8) == 0  # no pass knows its layers
    assert record_steps(two_regimes, device, 8) == 0  # its rotary embedding looks at the positions to choose
    assert not isinstance(two_regimes.compute, RecordedModel)


def test_a_model_that_cannot_be_recorded_stays_as_it_is(
    tmp_path: Path, device: InterpretedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama", tmp_path)
    whole = model.compute

    def refuse(self: InterpretedDevice, work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(InterpretedDevice, "record", refuse)
    assert record_steps(model, device, 8) == 0
    assert model.compute is whole
