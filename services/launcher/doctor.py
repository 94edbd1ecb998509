"""``infinite-llm doctor``: what would keep a cluster from running on this machine, or from being fast?"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from services.core.errors import ConfigError
from services.launcher.binaries import find_binary
from services.launcher.console import table
from services.launcher.gpu_check import judge_gpus, judge_mps, look_for_gpus
from services.launcher.ports import claim_port

_LEAST_PYTHON = (3, 11)
_LEAST_MEMORY_GIB = 4.0
_GIB = 1 << 30


class Verdict(Enum):
    OK = "ok"
    SLOW = "slow"  # runs, and could be faster
    FAILS = "FAILS"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        detail: what was found, and what to do unless it is ok.
    """

    subject: str
    verdict: Verdict
    detail: str


def doctor(http_port: int, grpc_port: int) -> int:
    """Prints what was found; answers 1 if something would keep a cluster from running."""
    found = list(findings(http_port, grpc_port))
    print(table(("", "", ""), [(finding.subject, finding.verdict.value, finding.detail) for finding in found]).lstrip())
    return int(any(finding.verdict is Verdict.FAILS for finding in found))


def findings(http_port: int, grpc_port: int) -> Iterator[Finding]:
    """Looks at one thing after another; nothing is changed."""
    yield _python()
    yield _looked_at("torch", _torch)
    yield _looked_at("transformers", lambda: (Verdict.OK, _version("transformers")))
    yield _looked_at("CPU kernels", _cpu_kernels)
    yield from _gpus()
    for binary in ("etcd", "redis-server"):
        yield _looked_at(binary, lambda name=binary: (Verdict.OK, str(find_binary(name))))  # type: ignore[misc]
    yield _looked_at("memory", _memory)
    for option, port in (("--http-port", http_port), ("--grpc-port", grpc_port)):
        yield _looked_at(option, lambda at=(option, port): (Verdict.OK, str(claim_port(*at))))  # type: ignore[misc]


def _looked_at(subject: str, look: Callable[[], tuple[Verdict, str]]) -> Finding:
    try:
        verdict, detail = look()
    except (ConfigError, ImportError, OSError) as error:
        return Finding(subject, Verdict.FAILS, str(error))
    return Finding(subject, verdict, detail)


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] < _LEAST_PYTHON:
        return Finding("Python", Verdict.FAILS, f"{version}; {'.'.join(map(str, _LEAST_PYTHON))} or newer is needed")
    return Finding("Python", Verdict.OK, version)


def _torch() -> tuple[Verdict, str]:
    return Verdict.OK, _version("torch")


def _version(package: str) -> str:
    import importlib

    return str(importlib.import_module(package).__version__)


def _cpu_kernels() -> tuple[Verdict, str]:
    from kernels.cpu import CpuKernels, find_library

    if find_library() is None:
        return Verdict.SLOW, "not built, attention runs in plain torch: install a C compiler and run `make setup` again"
    instructions = CpuKernels(1).instruction_set
    if instructions == "baseline":
        return Verdict.SLOW, "this processor has neither AVX2, AVX-512 nor NEON with bfloat16"
    return Verdict.OK, instructions


def _gpus() -> Iterator[Finding]:
    try:
        facts = look_for_gpus()
    except ImportError:  # of torch: told already
        return
    works, detail = judge_gpus(facts)
    yield Finding("GPU", Verdict.OK if works else Verdict.SLOW, detail)
    if facts.names:
        works, detail = judge_mps(facts)
        yield Finding("MPS", Verdict.OK if works else Verdict.SLOW, detail)


def _memory() -> tuple[Verdict, str]:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    cores = len(os.sched_getaffinity(0))
    detail = f"{available:.1f} GiB free, {cores} processors"
    if available < _LEAST_MEMORY_GIB:
        return Verdict.SLOW, f"{detail}: pools and the model's weights must fit together"
    return Verdict.OK, detail
