"""The SDK as a user gets it: its wheel in an environment that has nothing else, and the examples against a gateway."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gateway_pair import running_pair
from gateway_rig import TEXT

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
INSTALL_TIMEOUT_S = 150
RUN_TIMEOUT_S = 60
# What pip says where it can reach no index, nor has what it needs from an earlier time.
OFFLINE = re.compile(r"connection broken|No matching distribution found for (grpcio|protobuf|googleapis)|ProxyError")


def environment() -> dict[str, str]:
    """Without anything by which the new environment could see this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the SDK and what it depends on."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "sdk"
    shutil.copytree(ROOT / "sdk", source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(root), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = root.glob("infinitellm-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(root / "venv")], check=True, timeout=INSTALL_TIMEOUT_S)
    python = root / "venv" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--retries", "0", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    installed = subprocess.run(
        install, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, env=environment(), cwd=root
    )
    if installed.returncode and OFFLINE.search(installed.stderr):
        pytest.skip("no package index can be reached from here for what the SDK depends on")
    assert installed.returncode == 0, installed.stderr
    return python


async def run(python: Path, cwd: Path, example: str, *arguments: str) -> str:
    """What an example prints."""
    process = await asyncio.create_subprocess_exec(
        *(str(python), str(ROOT / "examples" / example), *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
        cwd=cwd,
    )
    async with asyncio.timeout(RUN_TIMEOUT_S):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


def test_the_examples_run_with_nothing_but_the_wheel(python: Path, tmp_path: Path) -> None:
    code = "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))"
    command = [str(python), "-I", "-c", code]  # and not what lies in the current directory
    listed = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=RUN_TIMEOUT_S, env=environment()
    )
    names = set(listed.stdout.split()) - {"pip", "setuptools"}
    assert names == {"infinitellm", "grpcio", "protobuf", "googleapis-common-protos", "typing_extensions"}

    async def scenario() -> None:
        async with pair.instance() as played:
            out = await run(python, tmp_path, "quickstart.py", "--address", pair.first.grpc, pair.second.grpc)
            first, _, rest = out.partition("\n")
            assert first == (TEXT * 2).encode()[:32].decode(errors="replace")
            assert rest.startswith("[32 tokens, length]\n1: ")
            assert len(played.submitted) == 4

            out = await run(python, tmp_path, "asyncio_streams.py", "--address", pair.first.grpc)
            assert "whole: 64 tokens" in out
            assert "cancelled: 8 tokens" in out

            out = await run(python, tmp_path, "resume_sse.py", pair.first.http, pair.second.http)
            assert out.count(" | ") == 1
            assert out.replace(" | ", "") == (TEXT * 9).encode()[:64].decode(errors="replace") + "\n"

    with running_pair(tmp_path) as pair:
        asyncio.run(scenario())
