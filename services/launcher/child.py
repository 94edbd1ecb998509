"""One process of the cluster: started, watched, ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from services.runtime import die_with_parent
from services.runtime.exit_text import exit_text

TAIL_LINES = 25
_TAIL_BYTES = 64 * 1024


class Child:
    """A running process with a log file. It is killed when the launcher dies, however the launcher dies."""

    def __init__(self, name: str, argv: Sequence[str], log_file: Path) -> None:
        self.name = name
        self.log_file = log_file
        command = [sys.executable, "-I", "-S", str(die_with_parent.__file__), str(os.getpid()), *argv]
        with log_file.open("ab") as log:
            # A process group of its own: Ctrl-C in the terminal reaches the launcher, which ends the others in order.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_text(self) -> str | None:
        """None while it runs, else how it ended, in words."""
        code = self._process.poll()
        return None if code is None else exit_text(code)

    def wait(self, timeout_s: float) -> None:
        """Waits for its end, up to ``timeout_s``."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def terminate(self) -> None:
        """Asks it to end."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """Ends it. Answers when it is gone."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def tail(self) -> str:
        """The last lines of its log."""
        with self.log_file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:]) or "    (empty)"
