"""A process and everything it has started, looked up in /proc."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat behind the name, which may itself contain anything.
_STATE, _PARENT, _USER_TICKS, _SYSTEM_TICKS, _STARTED = 0, 1, 11, 12, 19


@dataclass(frozen=True, slots=True)
class Process:
    """A process, and none that gets its number later.

    Attributes:
        started: in clock ticks since the machine's start.
    """

    pid: int
    started: int

    def alive(self) -> bool:
        """Whether it has not ended yet; who has not waited for it does not matter."""
        fields = self._fields()
        return bool(fields) and fields[_STATE] not in "ZX"

    @property
    def command(self) -> tuple[str, ...]:
        """Its command line; empty if it is gone."""
        with suppress(OSError):
            return tuple(Path(f"/proc/{self.pid}/cmdline").read_text().rstrip("\0").split("\0"))
        return ()

    def processor_s(self) -> float:
        """Processor time that it has taken since its start, in seconds, to a hundredth; 0 if it is gone."""
        return _taken_s(self._fields())

    def main_thread_s(self) -> float:
        """The part of it that its first thread has taken."""
        return _taken_s(_stat(self.pid, f"task/{self.pid}/")) if self._fields() else 0.0

    def kill(self) -> None:
        """Ends it, if it is still there."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _fields(self) -> list[str]:
        fields = _stat(self.pid)
        return fields if fields and int(fields[_STARTED]) == self.started else []


def family(pid: int) -> list[Process]:
    """``pid`` and all living processes below it, parents before children. Empty if it is gone."""
    found: dict[int, Process] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))):
            found[int(entry.name)] = Process(int(entry.name), int(fields[_STARTED]))
            children.setdefault(int(fields[_PARENT]), []).append(int(entry.name))
    pids = [pid] if pid in found else []
    for parent in pids:
        pids += children.get(parent, [])
    return [found[member] for member in pids]


def _taken_s(fields: list[str]) -> float:
    return (int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])) / _TICKS_PER_S if fields else 0.0


def _stat(pid: int, task: str = "") -> list[str]:
    """The fields of /proc/PID/stat behind the name, or of one of its tasks; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/{task}stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
