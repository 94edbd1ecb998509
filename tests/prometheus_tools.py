"""Prometheus' own programs, where they are installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def prometheus_tool(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``; skips the test where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH: apt-get install prometheus has both of Prometheus' programs")
    return path


def promtool(*arguments: str, given: str | None = None) -> tuple[int, str]:
    """Its exit code, and all that it printed.

    Args:
        given: what it reads from standard input.
    """
    command = [prometheus_tool("promtool"), *arguments]
    done = subprocess.run(
        command, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    return done.returncode, done.stdout
