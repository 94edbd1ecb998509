"""A server under measurement: all of its processes on the same cores, started by one command, ended without a trace."""

from __future__ import annotations

import http.client
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from benchmarks.peers.processes import Process, family
from services.core.errors import ConfigError, UnavailableError
from services.launcher.child import Child
from services.launcher.ports import HOST

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
_POLL_S = 0.2
_KILL_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Serving:
    """What servers that are compared are all started with.

    Attributes:
        checkpoint: directory of the model.
        cores: processors of the whole server, its front included.
        max_model_len: longest context in tokens.
        max_num_seqs: sequences computed at the same time at most.
        kv_bytes: memory of the KV cache.
    """

    checkpoint: Path
    cores: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """How to start a server that answers on ``HOST:port``.

    Attributes:
        argv: program and arguments.
        environment: variables on top of this process's own.
        directory: where it runs; None: where this process does.
    """

    name: str
    model: str
    port: int
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    directory: Path | None = None


class PinnedServer:
    """A running server. ``with PinnedServer(...)`` waits until it is healthy; afterwards all its processes are gone."""

    def __init__(self, command: ServerCommand, cores: Sequence[int], log_file: Path) -> None:
        self.name = command.name
        self.model = command.model
        self.address = f"{HOST}:{command.port}"
        where = () if command.directory is None else (f"--chdir={command.directory}",)
        variables = (*where, *(f"{name}={value}" for name, value in command.environment.items()))
        pinned = (_program("taskset"), "--cpu-list", ",".join(map(str, cores)), *command.argv)
        self._child = Child(command.name, (_program("env"), *variables, *pinned), log_file)
        self._started: list[Process] = []

    def __enter__(self) -> Self:
        try:
            self._wait_until_healthy()
        except BaseException:
            self.close()
            raise
        self._started = family(self._child.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def processor_s(self) -> dict[Process, float]:
        """Processor time that each process of the server has taken so far, in seconds."""
        return {process: process.processor_s() for process in family(self._child.pid)}

    def processor_s_since(self, before: Mapping[Process, float]) -> float:
        """What they have taken together since ``before``.

        Raises: UnavailableError if a process of the server has ended since its start: something went wrong, and what
            was measured is not the whole server.
        """
        now = self.processor_s()
        if ended := [process.pid for process in self._started if not process.alive()]:
            raise UnavailableError(
                f"{self.name}: processes {ended} have ended. The end of its log:\n{self._child.tail()}"
            )
        return sum(taken - before.get(process, 0.0) for process, taken in now.items())

    def idle_share(self, seconds: float, at_most: float) -> float:
        """Processor time that it takes while nobody asks it for anything, in cores.

        Raises: ConfigError if it is more than ``at_most``: it would slow down others.
        """
        before = self.processor_s()
        time.sleep(seconds)
        share = self.processor_s_since(before) / seconds
        if share > at_most:
            raise ConfigError(f"{self.name} takes {share:.0%} of a core while it has nothing to do")
        return share

    def close(self) -> None:
        """Ends the server: asks it first, and does not rely on its ending all that it has started."""
        processes = family(self._child.pid)
        self._child.terminate()
        self._child.wait(STOP_TIMEOUT_S)
        self._child.kill()
        for process in processes:
            process.kill()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(process.alive() for process in processes) and time.monotonic() < deadline:
            time.sleep(_KILL_POLL_S)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _healthy(self.address):
            if (ended := self._child.exit_text()) is not None:
                raise UnavailableError(f"{self.name} {ended} while starting. The end of its log:\n{self._child.tail()}")
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self.name} did not start in time. The end of its log:\n{self._child.tail()}")
            time.sleep(_POLL_S)


def _healthy(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"{name} is not installed")
    return path
