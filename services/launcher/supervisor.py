"""Keeps a plan's processes running, as Kubernetes would: who dies is started again, with growing pauses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from services.core.errors import UnavailableError
from services.launcher.child import Child
from services.launcher.plan import Kind, ProcessSpec

POLL_S = 0.1
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 10.0
# A process that has run this long has started well; its next restart is quick again.
STABLE_S = 30.0
GRACE_S = 15.0
# Of the end: the users before what they use, and together what does not use each other.
_STAGES: tuple[tuple[Kind, ...], ...] = (("gateway",), ("instance",), ("kvdaemon", "gmanager", "redis"), ("etcd",))

Report = Callable[[str], None]


@dataclass(slots=True)
class _Slot:
    spec: ProcessSpec
    child: Child | None = None
    started_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    restart_at: float | None = field(default=None)  # monotonic; None: not waiting for a restart


class Supervisor:
    """The children of one launcher. Belongs to the main thread: a child dies with the *thread* that started it."""

    def __init__(self, configs: Path, logs: Path, report: Report) -> None:
        self._configs = configs
        self._logs = logs
        self._report = report
        self._slots: list[_Slot] = []

    def start(self, specs: Sequence[ProcessSpec]) -> None:
        """Writes the configuration files and starts the processes, in order."""
        for spec in specs:
            if spec.config is not None:
                text = yaml.safe_dump(dict(spec.config), sort_keys=False)
                (self._configs / f"{spec.name}.yaml").write_text(text, encoding="utf-8")
            slot = _Slot(spec)
            self._slots.append(slot)
            self._spawn(slot)

    def pids(self) -> dict[str, int]:
        """The running children by name."""
        return {slot.spec.name: slot.child.pid for slot in self._slots if slot.child is not None}

    def require_running(self) -> None:
        """Raises UnavailableError, with the tail of its log, if any child has ended: nothing may die while starting."""
        for slot in self._slots:
            ended = slot.child.exit_text() if slot.child is not None else None
            if slot.child is not None and ended is not None:
                raise UnavailableError(
                    f"{slot.spec.name} {ended} while starting. The end of {slot.child.log_file}:\n{slot.child.tail()}"
                )

    async def run(self) -> None:
        """Watches over the children until cancelled."""
        while True:
            for slot in self._slots:
                self._look_after(slot)
            await asyncio.sleep(POLL_S)

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Ends all children in the order of ``_STAGES``: SIGTERM, and SIGKILL for those that are still there after
        ``grace_s``."""
        deadline = time.monotonic() + grace_s
        for kinds in _STAGES:
            children = [slot.child for slot in self._slots if slot.spec.kind in kinds and slot.child is not None]
            for child in children:
                child.terminate()
            for child in children:
                await asyncio.to_thread(child.wait, max(0.0, deadline - time.monotonic()))
                if child.exit_text() is None:
                    self._report(f"{child.name} did not end in time and is killed")
                child.kill()
        self._slots.clear()

    def _spawn(self, slot: _Slot) -> None:
        slot.child = Child(slot.spec.name, slot.spec.argv, self._logs / f"{slot.spec.name}.log")
        slot.started_at = time.monotonic()
        slot.restart_at = None

    def _look_after(self, slot: _Slot) -> None:
        now = time.monotonic()
        if slot.child is None:
            if slot.restart_at is not None and now >= slot.restart_at:
                self._spawn(slot)
                self._report(f"{slot.spec.name} has been started again")
            return
        ended = slot.child.exit_text()
        if ended is None:
            return
        text = f"{slot.spec.name} {ended}"
        if not slot.spec.restart:
            self._report(f"{text}; restart the cluster. The end of its log:\n{slot.child.tail()}")
        else:
            stable = now - slot.started_at >= STABLE_S
            pause_s = FIRST_PAUSE_S if stable else slot.pause_s
            slot.pause_s = min(2 * pause_s, MAX_PAUSE_S)
            slot.restart_at = now + pause_s
            self._report(f"{text}; starting it again in {pause_s:g} s (log: {slot.child.log_file})")
        slot.child = None
