"""What ``device: cuda:1`` means in a configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from services.core.errors import ConfigError

LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16, and what the kernels' tiles need of shared memory
_NAME = re.compile(r"(cpu|cuda|interpreter)(?::(\d{1,3}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class DeviceName:
    """Attributes: index: which of several GPUs."""

    kind: Literal["cpu", "cuda", "interpreter"]
    index: int = 0


def parse_device(text: str) -> DeviceName:
    """``"cpu"``; ``"cuda"`` or ``"cuda:N"``; ``"interpreter"``: the CPU, by the GPU's kernels and ways, for tests.

    Raises:
        ConfigError: it is something else.
    """
    match = _NAME.fullmatch(text)
    if match is None or (match[2] is not None and match[1] != "cuda"):
        raise ConfigError(f"device {text!r}: wanted is cpu, cuda, cuda:N (N counts the GPUs from 0) or interpreter")
    if match[1] == "cuda":
        return DeviceName("cuda", int(match[2] or 0))
    return DeviceName("cpu" if match[1] == "cpu" else "interpreter")
