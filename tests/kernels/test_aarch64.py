"""The native kernels for aarch64: cross-compiled, and run in an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "cpu" / "src"

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="about the CPU kernels"),
    pytest.mark.skipif(
        shutil.which(COMPILER) is None or shutil.which(EMULATOR) is None,
        reason=f"needs {COMPILER} and {EMULATOR} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("aarch64") / "native_check"
    sources = [*SOURCES.glob("*.c"), HERE / "native_check.c"]
    flags = ["-O1", "-std=gnu11", "-fno-math-errno", "-static", "-pthread"]
    command = [COMPILER, *flags, f"-I{SOURCES}", *map(str, sources), "-o", str(file), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return file


@pytest.mark.parametrize("instructions", ["neon-bf16", "baseline"])
def test_kernels_for_aarch64_agree_with_float64(program: Path, instructions: str) -> None:
    environment = {**os.environ, "INFINITE_LLM_CPU_ISA": instructions}
    command = [EMULATOR, "-cpu", "max", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{instructions} float32")
    assert "81 cases, 0 dtypes failed" in done.stdout
