"""What the doctor says of GPUs that this machine does not have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from services.launcher.gpu_check import GpuFacts, judge_gpus, judge_mps, look_for_gpus

GOOD = GpuFacts(("NVIDIA H200",), "12.8", ("NVIDIA H200",), ((9, 0),), "/tmp/nvidia-mps", True)


@pytest.mark.parametrize(
    ("changes", "works", "words"),
    [
        ({}, True, "cuda:0 NVIDIA H200 (9.0)"),
        ({"driver_names": None, "built_for": None, "names": (), "capabilities": ()}, True, "runs on the CPU"),
        ({"driver_names": (), "names": (), "capabilities": ()}, True, "runs on the CPU"),
        ({"built_for": None, "names": (), "capabilities": ()}, False, "NVIDIA H200, but this torch was built without"),
        ({"names": (), "capabilities": ()}, False, "new enough for CUDA 12.8"),
        ({"names": ("Tesla T4",), "capabilities": ((7, 5),)}, False, "8.0 (Ampere) or newer"),
    ],
)
def test_gpus(changes: dict[str, object], works: bool, words: str) -> None:
    answer, detail = judge_gpus(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]
    assert answer is works
    assert words in detail


def test_mps() -> None:
    assert judge_mps(GOOD) == (True, "running, by /tmp/nvidia-mps")
    works, detail = judge_mps(dataclasses.replace(GOOD, mps_answers=False))
    assert not works
    assert "nvidia-cuda-mps-control -d" in detail


def test_this_machine_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in (("nvidia-smi", "echo NVIDIA L4; echo NVIDIA L4"), ("nvidia-cuda-mps-control", "cat")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{answer}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    facts = look_for_gpus()
    assert facts.driver_names == ("NVIDIA L4", "NVIDIA L4")
    assert facts.mps_directory == str(tmp_path)
    assert not facts.mps_answers  # the program is there, and nobody listens
    (tmp_path / "control").touch()
    assert look_for_gpus().mps_answers
    monkeypatch.setenv("PATH", "")
    nobody = look_for_gpus()
    assert nobody.driver_names is None
    assert not nobody.mps_answers
