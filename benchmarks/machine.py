"""What a result was measured on and with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

_COMMAND_TIMEOUT_S = 20.0
_REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "triton", "transformers", "grpcio")


def describe_machine() -> dict[str, str | int | float]:
    """CPU model, cores this process may use, memory in GiB, GPUs if there are any, and versions of what matters."""
    machine: dict[str, str | int | float] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    gpus = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    if gpus:
        machine["gpu"] = ", ".join(gpus.splitlines())
    for package in _PACKAGES:
        try:
            machine[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return machine


def current_commit(repository: Path = _REPOSITORY) -> str:
    """Hash of the checked-out commit, with ``-dirty`` if tracked files differ from it; ``unknown`` without git."""
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return _output(command) or "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _output(command: Sequence[str]) -> str:
    """What a command prints; empty if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return ""
    return done.stdout.strip()
