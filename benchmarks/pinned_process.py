"""A process on a core of its own that does what it is told over a pipe."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, Self

TIMEOUT_S = 120.0  # for an answer


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a process says last when its work raises."""

    trace: str


class PinnedProcess:
    """A spawned process; a context manager, which ends it.

    Args:
        core: the one it runs on.
        work: a function of a module, called there with its end of the pipe and ``arguments``.
    """

    def __init__(self, core: int, work: Callable[..., None], *arguments: object) -> None:
        spawning = mp.get_context("spawn")
        self._pipe, self._far = spawning.Pipe()
        self._process = spawning.Process(target=_enter, args=(self._far, core, work, arguments), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self._far.close()  # so that the end of the process is the end of the pipe
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def tell(self, command: object) -> None:
        self._pipe.send(command)

    def hand_over(self, descriptor: int) -> None:
        """Passes on a file descriptor, which the work takes with ``multiprocessing.reduction.recv_handle``."""
        reduction.send_handle(self._pipe, descriptor, self._process.pid)

    def hear(self, timeout_s: float = TIMEOUT_S) -> Any:
        """What the work sends next.

        Raises:
            TimeoutError: nothing came.
            RuntimeError: the work raised, or the process is gone.
        """
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"a process of the benchmark gave no answer within {timeout_s:g} s")
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RuntimeError("a process of the benchmark has ended") from None
        if isinstance(answer, _Failure):
            raise RuntimeError(f"a process of the benchmark failed:\n{answer.trace}")
        return answer


def _enter(pipe: Connection, core: int, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    os.sched_setaffinity(0, {core})
    try:
        work(pipe, *arguments)
    except EOFError:  # the benchmark is gone
        return
    except Exception:
        pipe.send(_Failure(traceback.format_exc()))
