"""What ``infinite-llm doctor`` says of GPUs: whether torch reaches them, whether they will do, and whether MPS runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from services.dataplane.device_name import LEAST_CAPABILITY

_TIMEOUT_S = 10.0
_DEFAULT_PIPES = "/tmp/nvidia-mps"
_CONTROL = "nvidia-cuda-mps-control"


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What a machine tells of its GPUs.

    Attributes:
        driver_names: of the GPUs, by nvidia-smi; None: there is no nvidia-smi, or it fails.
        built_for: version of CUDA that torch was built for, if any.
        names, capabilities: of the GPUs that torch sees.
        mps_directory: where a control daemon of MPS would listen.
        mps_answers: whether one does.
    """

    driver_names: tuple[str, ...] | None
    built_for: str | None
    names: tuple[str, ...]
    capabilities: tuple[tuple[int, int], ...]
    mps_directory: str
    mps_answers: bool


def look_for_gpus() -> GpuFacts:
    """Asks torch, nvidia-smi and MPS."""
    import torch

    count = torch.cuda.device_count()
    directory = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", _DEFAULT_PIPES)
    return GpuFacts(
        _by_the_driver(),
        torch.version.cuda,
        tuple(torch.cuda.get_device_name(index) for index in range(count)),
        tuple(torch.cuda.get_device_capability(index) for index in range(count)),
        directory,
        (Path(directory) / "control").exists() and _output([_CONTROL], "get_server_list\n") is not None,
    )


def judge_gpus(facts: GpuFacts) -> tuple[bool, str]:
    """Whether ``--device cuda`` would work, or nothing says that it should; and in words."""
    if not facts.names:
        if not facts.driver_names:
            return True, "no device: everything runs on the CPU"
        found = ", ".join(facts.driver_names)
        if facts.built_for is None:
            return False, f"{found}, but this torch was built without CUDA: install one that was, for --device cuda"
        return False, (
            f"{found} by nvidia-smi, but torch sees none: look at CUDA_VISIBLE_DEVICES, and whether the driver is new "
            f"enough for CUDA {facts.built_for}"
        )
    told = ", ".join(
        f"cuda:{index} {name} ({'.'.join(map(str, capability))})"
        for index, (name, capability) in enumerate(zip(facts.names, facts.capabilities, strict=True))
    )
    if max(facts.capabilities) < LEAST_CAPABILITY:
        return False, f"{told}: compute capability 8.0 (Ampere) or newer is needed for --device cuda"
    return True, told


def judge_mps(facts: GpuFacts) -> tuple[bool, str]:
    """Whether processes compute on a GPU side by side; in words."""
    if facts.mps_answers:
        return True, f"running, by {facts.mps_directory}"
    return False, (
        f"not running (nobody listens in {facts.mps_directory}): instances and daemons on one GPU would take turns. "
        f"Start it as the user that runs the cluster: {_CONTROL} -d"
    )


def _by_the_driver() -> tuple[str, ...] | None:
    names = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], "")
    return None if names is None else tuple(line.strip() for line in names.splitlines() if line.strip())


def _output(command: list[str], question: str) -> str | None:
    """What a program answers; None where there is none, or it fails, or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
