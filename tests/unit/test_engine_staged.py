"""The engine and its daemons on a device whose memory is not the host's: what crosses, crosses in time and in whole.

The kernels are the plain ones here; tests/cluster/test_serving_interpreted.py has Triton's.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engine_rig import EngineRig, check_a_lost_lender
from small_llama import write_small_llama

from kernels import AttentionKernels, AttentionPlan
from kernels.reference import ReferenceKernels
from services.dataplane.interpreted_device import InterpretedDevice
from services.instance.batch import Batch, upload_batch
from services.instance.dist_attention import StepTensors
from services.instance.recorded_model import RecordedModel


class _StagedDevice(InterpretedDevice):
    """Triton either compiles or interprets in a process, and other tests of this one compile."""

    def load_kernels(self, num_threads: int) -> AttentionKernels:
        return ReferenceKernels()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    write_small_llama(path, seed=5)
    return path


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> InterpretedDevice:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return _StagedDevice()


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def test_the_same_tokens_as_on_the_cpu(model: Path, device: InterpretedDevice) -> None:
    """A prompt over three pools, blocks that spill while others decode, a cached prefix, draws with a seed."""
    long, short = prompt_of(500, 1), prompt_of(70, 2)
    answers: list[dict[str, list[int]]] = []
    for on in (None, device):
        with EngineRig(model, local_blocks=12, lenders=(10, 10), workspace=6, device=on) as rig:
            rig.submit("long", long, 120)
            rig.submit("drawn", short, 60, temperature=0.9, seed=7)
            rig.wait_until(lambda rig=rig: len(dict(rig.snapshot.placement).get("long", {})) > 1)
            rig.wait("long", "drawn")
            for name in ("first", "second"):
                rig.submit(name, prompt_of(200, 4), 4)
                rig.wait(name)
            assert rig.cached_tokens("second") == 64 * 3
            assert rig.tokens("second") == rig.tokens("first")
            assert isinstance(rig.model.compute, RecordedModel) is (on is device)
            answers.append({name: rig.tokens(name) for name in ("long", "drawn")})
            rig.check_nothing_held()
    on_cpu, staged = answers
    assert staged == on_cpu
    assert len(staged["long"]) == 120


def test_a_lost_lender_costs_a_recomputation_only(model: Path, device: InterpretedDevice) -> None:
    check_a_lost_lender(model, device, prompt_of(500, 3), 60)


@pytest.mark.parametrize("long_rows", [None, torch.tensor([True, False, True])])
def test_a_batch_is_uploaded_whole(device: InterpretedDevice, long_rows: torch.Tensor | None) -> None:
    ints = [torch.arange(n, dtype=torch.int32) for n in (3, 2, 3, 5, 5)]
    numbers = [torch.arange(n) + n for n in (3, 3, 3, 2)]
    step = StepTensors(numbers[2], AttentionPlan(*ints, max_query_len=2))
    batch = Batch(numbers[0], numbers[1], step, (), numbers[3], long_rows)
    uploaded = upload_batch(batch, device)
    assert uploaded.shares == ()
    assert uploaded.step.local.max_query_len == 2
    assert (uploaded.long_rows is None) is (long_rows is None)
    for own, theirs in zip(_tensors(batch), _tensors(uploaded), strict=True):
        assert own.dtype == theirs.dtype
        assert torch.equal(own, theirs)
        assert own.data_ptr() != theirs.data_ptr()


def _tensors(batch: Batch) -> list[torch.Tensor]:
    plan = batch.step.local
    plans = [plan.query_start, plan.query_pos, plan.block_start, plan.block_ids, plan.block_pos]
    long_rows = [] if batch.long_rows is None else [batch.long_rows]
    return [batch.token_ids, batch.positions, batch.step.slots, batch.logit_rows, *plans, *long_rows]
