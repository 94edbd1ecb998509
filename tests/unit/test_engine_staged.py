"""The engine and its daemons on a device whose memory is not the host's: what crosses, crosses in time and in whole.

The kernels are the plain ones here; tests/cluster/test_serving_interpreted.py has Triton's.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from engine_rig import EngineRig
from small_llama import write_small_llama

from kernels import AttentionKernels
from kernels.reference import ReferenceKernels
from services.dataplane.interpreted_device import InterpretedDevice
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
    prompt = prompt_of(500, 3)
    with EngineRig(model, local_blocks=12, lenders=(10,), workspace=6, device=device) as rig:
        rig.submit("undisturbed", prompt, 60)
        rig.wait("undisturbed")
        rig.submit("r", prompt, 60)
        rig.wait_until(lambda: len(rig.tokens("r")) > 5)
        rig.lenders[0].revoke()
        rig.wait("r")
        assert rig.tokens("r") == rig.tokens("undisturbed")
        rig.check_nothing_held()
