"""How a process ended, in words."""

from __future__ import annotations

import signal


def exit_text(code: int) -> str:
    """``code``: as subprocess has it, the negative number of a signal."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
