"""NVIDIA's Multi-Process Service for the processes that a benchmark starts, while a block of code runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_CONTROL = "nvidia-cuda-mps-control"
_VARIABLES = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
_TIMEOUT_S = 30.0


def mps_is_installed() -> bool:
    return shutil.which(_CONTROL) is not None


@contextmanager
def mps(wanted: bool) -> Iterator[None]:
    """Processes started inside use a control daemon of their own, or none, whatever runs on the machine."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    with tempfile.TemporaryDirectory(prefix="mps-") as directory:
        os.environ.update(dict.fromkeys(_VARIABLES, directory))  # nobody listens there otherwise
        try:
            if wanted:
                subprocess.run([_CONTROL, "-d"], check=True, timeout=_TIMEOUT_S)
            yield
        finally:
            if wanted:
                subprocess.run([_CONTROL], input="quit\n", text=True, check=False, timeout=_TIMEOUT_S)
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
