"""The engine, its daemons and their pools on a GPU in one process: tokens, recorded steps, lost lenders."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from architectures import served
from engine_rig import EngineRig, check_a_lost_lender
from small_llama import write_small_llama

from services.dataplane.device import Device
from services.dataplane.devices import open_device
from services.instance.model import load_model
from services.instance.passes.apply import apply_passes
from services.instance.passes.trace import StandIn
from services.instance.recorded_model import RecordedModel, record_steps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    write_small_llama(path, seed=5)
    return path


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device("cuda")


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=length)


def test_the_same_tokens_as_on_the_cpu(model: Path, device: Device) -> None:
    """Local and remote blocks, several requests at once; float32 rounds alike but for the order of sums."""
    prompts = {f"r{seed}": prompt_of(60 + 150 * seed, seed) for seed in range(4)}
    answers: list[dict[str, list[int]]] = []
    for on in (None, device):
        with EngineRig(model, local_blocks=16, lenders=(16, 16), workspace=6, device=on) as rig:
            for name, prompt in prompts.items():
                rig.submit(name, prompt, 12)
            rig.wait(*prompts)
            assert isinstance(rig.model.compute, RecordedModel) is (on is device)
            answers.append({name: rig.tokens(name) for name in prompts})
            rig.check_nothing_held()
    on_cpu, on_gpu = answers
    assert on_gpu == on_cpu


def test_a_lost_lender_costs_a_recomputation_only(model: Path, device: Device) -> None:
    check_a_lost_lender(model, device, prompt_of(500, 3), 40)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "starcoder2"])
def test_cuda_graphs_compute_what_the_model_does(name: str, tmp_path: Path, device: Device) -> None:
    model = load_model(served(name).write(tmp_path / name), "bfloat16", None, device.tensors)
    apply_passes(model)
    StandIn().attach_to(model.module)
    whole = model.compute
    assert record_steps(model, device, 8) == 4
    recorded = model.compute
    for rows in (8, 1, 5, 3, 8, 2):
        tokens = torch.randint(0, model.shape.vocab_size, (rows,), device=device.tensors)
        positions = torch.randint(0, model.shape.max_model_len, (rows,), device=device.tensors)
        wanted = torch.arange(rows, device=device.tensors)
        model.compute = recorded
        got = model.forward(tokens, positions, wanted).clone()
        model.compute = whole
        torch.testing.assert_close(got, model.forward(tokens, positions, wanted), rtol=2e-2, atol=2e-2)
