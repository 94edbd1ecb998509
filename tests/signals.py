"""A signal to a process of a test, in force when the call returns."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

STOP_TIMEOUT_S = 30.0


def send_signal(pid: int, signum: signal.Signals) -> None:
    """Sends it; returns from SIGSTOP when every thread has stopped, since until then some of them may still answer."""
    os.kill(pid, signum)
    if signum != signal.SIGSTOP:
        return
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while any(_state(thread) not in "TZ" for thread in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, f"process {pid} has threads that do not stop"
        time.sleep(0.001)


def _state(thread: Path) -> str:
    """One letter, as proc(5) has it; "Z" of a thread that has ended."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
